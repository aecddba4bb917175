"""An append-only file of JSON lines that survives `kill -9`: what was written is read again, what was torn is not.

    journal = Journal(path); journal.append({"id": 1, ...}); journal.read()

A line counts once its newline is in the file. A process killed in the middle of a write leaves a line without one: it
is passed over in reading and cut off before the next append, so that no line is ever glued to a torn one. Each append,
or each batch of them, is forced to the disk before it returns.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from qwen_merge.data.disk import refusal
from qwen_merge.errors import UserError


class Journal:
    """One writer at a time; readers may read meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = -1

    def append(self, entry: object) -> None:
        """Write one JSON-able object as one line and force it to the disk."""
        self.extend([entry])

    def extend(self, entries: Iterable[object]) -> None:
        """Write a batch with one force to the disk, which takes milliseconds: once a batch, not once a line.

        Raises:
            UserError: it cannot be written (a full disk, a folder without permission). What was there stays whole.
        """
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        data = "".join(lines).encode("utf-8", "surrogatepass")
        if not data:
            return
        try:
            if self._file < 0:
                self._open()
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except BaseException as error:
            self.close()  # half a line may be there: the next append opens the file again, which cuts it off
            if isinstance(error, OSError):
                raise refusal(error, self.path) from error
            raise

    def read(self) -> list:
        """All whole lines, oldest first. A file that does not exist is an empty journal."""
        return list(self.entries())

    def entries(self) -> Iterator:
        """As read(), one at a time.

        Raises:
            UserError: a line that ends in a newline is not JSON: something else wrote to the file.
        """
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line.decode("utf-8", "surrogatepass"))
                except ValueError:
                    raise UserError(
                        f"{self.path}: line {number} is not JSON: {line[:80]!r}. The file was changed by something "
                        "else; mend the line, or start anew with --overwrite."
                    ) from None

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, _end_of_last_line(self._file))
        if new:
            sync_directory(self.path.parent)


def _end_of_last_line(file: int) -> int:
    """Where the last newline ends; 0 if there is none."""
    end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that a journal's line may vouch for: complete and on the disk, or not there at all.

    Args:
        write: given the open file. Two processes may write the same path, for a lost worker's unit is done again.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Force a directory's names to the disk: a file renamed into it stays there after a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
