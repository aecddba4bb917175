"""Apply one minimal unified diff, forwards or backwards.

Hunks are found by their text, not by their line numbers, so that one diff serves a release and a nearby commit. That
is safe here because the caller compares the sha256 of the file before and after; a hunk whose text does not occur
exactly once is an error all the same.
"""

import re
from dataclasses import dataclass


class DiffError(ValueError):
    """A hunk does not fit the text, or fits it more than once."""


@dataclass(frozen=True)
class Hunk:
    before: str
    after: str


def parse(diff: str) -> list[Hunk]:
    """The hunks of a unified diff of one file, in their order."""
    hunks = []
    for body in re.split(r"^@@ .*@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = [f"{line}\n" for line in body.rstrip("\n").split("\n")]
        if any(line[0] not in " +-" for line in lines):
            raise DiffError(f"not a line of a unified diff: {next(line for line in lines if line[0] not in ' +-')!r}")
        hunks.append(
            Hunk(
                before="".join(line[1:] for line in lines if line[0] != "+"),
                after="".join(line[1:] for line in lines if line[0] != "-"),
            )
        )
    if not hunks:
        raise DiffError("the diff has no hunk")
    return hunks


def apply(diff: str, text: str, *, reverse: bool = False) -> str:
    """The text after the diff, or with `reverse` the text before it.

    Raises:
        DiffError: a hunk's lines do not occur exactly once.
    """
    for number, hunk in enumerate(parse(diff), start=1):
        old, new = (hunk.after, hunk.before) if reverse else (hunk.before, hunk.after)
        if text.count(old) != 1:
            raise DiffError(f"hunk {number} fits {text.count(old)} places; expected exactly one")
        text = text.replace(old, new)
    return text
