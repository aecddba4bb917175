"""The answers a run gave: how long they are, which never ended their thought, and which to show side by side.

`<model>_<data set>_responses.jsonl` holds every answer in full, up to 8192 tokens each. A report needs the lengths of
all and the text of a dozen, so one pass keeps a few numbers and a byte offset per answer, and the text is read again.
"""

import hashlib
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_merge.errors import UserError
from qwen_merge.evaluation.thoughts import split

Key = tuple[str, str]  # data set, question


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered question, without its text."""

    file: Path
    offset: int  # bytes
    tokens: int | None
    thought_tokens: int | None
    closed: bool | None  # False: the thought never ended, the answer was scored as empty; None: no thought
    digest: bytes  # of what was scored, without case and outer spaces: equal digests are equal answers


@dataclass(frozen=True)
class Lengths:
    """Of the answers whose length was written down."""

    count: int
    mean: float
    median: float
    p95: float


def read_responses(file: Path, dataset: str) -> dict[Key, Answer]:
    """The answers of one file. Where a resumed evaluation repeats a question, the last answer counts.

    A line that a kill cut short is left out, and said so: a resumed evaluation asks that question again on a new line.

    Raises:
        UserError: a line is not a JSON object with what a report needs; the message has file and line.
    """
    answers: dict[Key, Answer] = {}
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.startswith(b"{") and not line.rstrip().endswith(b"}"):
                print(f"{file}, line {number} was cut short by a kill; left out", file=sys.stderr)
            elif line.strip():
                entry = parsed_line(line, file, number)
                answers[str(entry.get("dataset") or dataset), _key(entry, file, number)] = Answer(
                    file,
                    offset,
                    _count(entry, "tokens", file, number),
                    _count(entry, "thought_tokens", file, number),
                    _closed(entry, file, number),
                    hashlib.sha256(str(entry.get("answer") or "").strip().casefold().encode()).digest()[:16],
                )
            offset += len(line)
    return answers


def parsed_line(line: bytes, file: Path, number: int) -> dict:
    try:
        entry = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(
            f"{file}, line {number} is not JSON ({error}). A run that was killed may leave such a line: delete it."
        ) from None
    if not isinstance(entry, dict):
        raise UserError(f"{file}, line {number} is {type(entry).__name__}, expected a JSON object. Make the file anew.")
    return entry


def _wrong(file: Path, number: int, field: str, value: object, expected: str) -> UserError:
    return UserError(
        f"{file}, line {number}: {field!r} is {value!r}, expected {expected}. Evaluate that data set again."
    )


def _key(entry: dict, file: Path, number: int) -> str:
    if not isinstance(entry.get("key"), (str, int)):
        raise _wrong(file, number, "key", entry.get("key"), "the question's index")
    return str(entry["key"])


def _count(entry: dict, field: str, file: Path, number: int) -> int | None:
    value = entry.get(field)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise _wrong(file, number, field, value, "a number of tokens or null")
    return value


def _closed(entry: dict, file: Path, number: int) -> bool | None:
    value = entry.get("closed")
    if value is not None and not isinstance(value, bool):
        raise _wrong(file, number, "closed", value, "true, false or null")
    return value


def full_text(answer: Answer) -> dict:
    """The line an answer came from."""
    with answer.file.open("rb") as lines:
        lines.seek(answer.offset)
        return json.loads(lines.readline())


def thought_of(entry: dict) -> str:
    """What the model thought before it answered; the prompt may have opened the thought before its first word."""
    return split(str(entry.get("response") or ""), opened=entry.get("closed") is False).thought


def quantile(ordered: Sequence[int], share: float) -> float:
    """Between neighbours by linear interpolation, as numpy's default."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def lengths(values: Iterable[int | None]) -> Lengths | None:
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    return Lengths(len(ordered), sum(ordered) / len(ordered), quantile(ordered, 0.5), quantile(ordered, 0.95))


def choose(runs: Sequence[dict[Key, Answer]], samples: int, seed: int) -> list[Key]:
    """Questions that two runs or more answered: those with different answers first, the data sets in turn.

    In turn, because a data set of 5000 questions would otherwise crowd out one of 218.
    """
    answered: dict[Key, list[bytes]] = defaultdict(list)
    for run in runs:
        for key, answer in run.items():
            answered[key].append(answer.digest)
    shared = sorted(key for key, digests in answered.items() if len(digests) > 1)
    random.Random(seed).shuffle(shared)
    turn: dict[tuple[bool, str], int] = defaultdict(int)
    ranked: list[tuple[bool, int, int, Key]] = []
    for key in shared:
        group = (len(set(answered[key])) == 1, key[0])
        ranked.append((group[0], turn[group], len(ranked), key))
        turn[group] += 1
    return [key for *_, key in sorted(ranked)[: max(samples, 0)]]
