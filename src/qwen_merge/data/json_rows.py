"""The rows of an annotation file, one at a time: a JSON array of objects, or JSONL. Memory: some of the longest row.

    for number, row in rows(path): ...      `qwen-merge data import`

An array of gigabytes in one line is read in pieces, too. What is no JSON ends the reading, with the row's number:
behind it nothing can be told apart.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from qwen_merge.errors import UserError

PIECE = 2**20  # characters
LONGEST_ROW = 2**26  # characters: where an array's row has no end by then, the file is broken and not the row long
_BLANKS = re.compile(r"[ \t\r\n]*")


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, from 0 on; the row, whatever JSON it is).

    Raises:
        UserError: the file cannot be read, or is no JSON from some row on.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            while (begins := file.read(1)) and begins.isspace():
                pass
            yield from _of_array(file, path) if begins == "[" else _of_lines(file, begins, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a JSON or JSONL file of annotations.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start} of a piece of it).") from None


def _of_lines(file, begins: str, path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    for line in chain([begins + file.readline()], file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _broken(path, number, error) from None
        yield number, row
        number += 1


def _of_array(file, path: Path) -> Iterator[tuple[int, Any]]:
    """Behind the opening bracket. A row that does not end in what was read is tried again with twice as much of it."""
    decode, text, at, number = json.JSONDecoder().raw_decode, "", 0, 0

    def more() -> bool:
        nonlocal text, at
        piece = file.read(max(PIECE, len(text) - at))
        text, at = text[at:] + piece, 0
        return bool(piece)

    def sign() -> str:
        """What comes next that is not blank; nothing at the end of the file."""
        nonlocal at
        while True:
            at = _BLANKS.match(text, at).end()  # type: ignore[union-attr]
            if at < len(text) or not more():
                return text[at : at + 1]

    while (found := sign()) != "]":
        if number:
            if found != ",":
                raise _broken(path, number, f"a comma or ] has to be before it, and there is {found!r}")
            at += 1
            sign()
        while True:
            try:
                row, at = decode(text, at)
                break
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or len(text) - at > LONGEST_ROW or not more():
                    raise _broken(path, number, error) from None
        yield number, row
        number += 1
    at += 1
    if found := sign():
        raise UserError(f"{path}: behind the array's end there is {found!r}; expected one array of objects.")


def _broken(path: Path, number: int, error: object) -> UserError:
    return UserError(
        f"{path}: row {number} is no JSON ({error}). Expected an array of objects, [{{...}}, {{...}}], or an object a "
        "line; nothing behind such a place can be read."
    )
