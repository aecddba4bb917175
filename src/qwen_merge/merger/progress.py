"""Progress of a long copy: a bar on a terminal, a plain line now and then in a log file."""

import sys
import time
from types import TracebackType

LINE_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Counts bytes towards `total`. A context manager; `update(n)` adds n bytes."""

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label, self.done = total, label, 0
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr)

    def update(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.last_line >= LINE_EVERY:
            self._line()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        share = 100 * self.done / max(self.total, 1)
        seconds = self.last_line - self.started
        print(
            f"{self.label}: {share:.0f}% of {_size(self.total)} after {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None:
            self._line()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
