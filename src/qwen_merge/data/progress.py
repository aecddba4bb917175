"""The lines that a long conversion prints."""

import time
from collections.abc import Callable


class Progress:
    """A line each ten seconds at most, and one at the end."""

    def __init__(
        self, name: str, verb: str, units: int, done: int, say: Callable[[str], None], what: str = "files"
    ) -> None:
        self.name, self.verb, self.units, self.done, self.say, self.what = name, verb, units, done, say, what
        self.last = time.monotonic()
        if done:
            say(f"{name}: {done} of {units} {what} were {verb} before")

    def step(self, rows: int) -> None:
        self.done += 1
        if self.done == self.units or time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            kept = f", {rows:,} rows kept" if rows else ""
            self.say(f"{self.name}: {self.done} of {self.units} {self.what} {self.verb}{kept}")
