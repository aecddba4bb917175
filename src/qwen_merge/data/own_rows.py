"""One row of a user's own set: its text with a tag for each picture and video, and their files; or the reason why not.

    {"image": "a.jpg" or ["a.jpg", …], "video": "clip.mp4" or […],
     "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

`qwen-merge data import` reads it. A row without files is text. Other keys are left alone.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_merge.data import json_rows
from qwen_merge.data.conversations import VIDEO_TAG, Dropped, alternating, check_text
from qwen_merge.data.schema import ASSISTANT, IMAGE_TAG

TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}
NO_IMPORT = (
    "`messages` in place of `conversations`: LLaMA-Factory's own format, which needs no import, but an entry in "
    "dataset_info.json"
)
TAG = re.compile("|".join(TAGS.values()))
WHOLE, EACH = TURNS = ("whole", "each")


@dataclass
class OwnRow:
    """`files`: (tag, path) in the order of the tags in `messages`."""

    messages: list[dict[str, str]]
    files: list[tuple[str, Path]]

    @property
    def answers(self) -> int:
        return len(self.messages) // 2


def judged(annotations: Path, folder: Path, turns: str = WHOLE) -> Iterator[tuple[str, "OwnRow | Dropped"]]:
    """Each row's place, and the row or why it cannot be used. turns: `each` makes each answer a row of its own."""
    for number, content in json_rows.rows(annotations):
        place = place_of(number, content)
        try:
            row = read(content, folder)
        except Dropped as dropped:
            yield place, dropped
            continue
        if turns == WHOLE or row.answers == 1:
            yield place, row
            continue
        for answer, part in enumerate(by_answer(row), 1):
            yield f"{place} answer {answer}", part


def by_answer(row: OwnRow) -> Iterator[OwnRow]:
    """For each answer the turns up to it, with the files of these.

    A training whose template has room for thoughts can have loss on the last answer of a row alone: what inference
    sends before an answer that is asked for is not what it sends of one that was given.
    """
    for end in range(2, len(row.messages) + 1, 2):
        messages = row.messages[:end]
        tags = sum(len(TAG.findall(message["content"])) for message in messages)
        yield OwnRow(messages, row.files[:tags])


def read(row: object, folder: Path) -> OwnRow:
    """A row, its files found and not opened. folder: where relative paths begin.

    Raises:
        Dropped: why it cannot be trained on.
    """
    if not isinstance(row, dict):
        raise Dropped("a row is no JSON object", repr(row))
    if "conversations" not in row and isinstance(row.get("messages"), list):
        raise Dropped(NO_IMPORT, repr(row["messages"])[:200])
    messages = alternating(row.get("conversations"))
    text = "\n".join(message["content"] for message in messages)
    check_text(text, ("<audio>",))
    for message in messages:
        if message["role"] == ASSISTANT and (match := TAG.search(message["content"])):
            raise Dropped(f"{match.group()} in an answer", message["content"])
        if not message["content"].strip():
            raise Dropped("an empty turn", text)
    given = {tag: _paths(row.get(key), key, folder) for key, tag in TAGS.items()}
    tags = TAG.findall(text)
    for key, tag in TAGS.items():
        if tags.count(tag) != len(given[tag]):
            seen = f"{tags.count(tag)} tags, {len(given[tag])} files"
            raise Dropped(f"{tag} tags and files of {key!r} differ in number", seen)
    for path in [path for paths in given.values() for path in paths]:
        if not os.path.isfile(path):  # no error where it cannot be a path at all, as a picture in base64
            raise Dropped("a file is missing", str(path))
    queues = {tag: iter(paths) for tag, paths in given.items()}
    return OwnRow(messages, [(tag, next(queues[tag])) for tag in tags])


def place_of(number: int, row: object) -> str:
    identity = row.get("id") if isinstance(row, dict) else None
    return f"row {number}{f' (id {identity})' if identity not in (None, '') else ''}"


def expanded(messages: list[dict[str, str]], counts: list[int]) -> list[dict[str, str]]:
    """The messages with `counts` picture tags in place of each tag of a picture or video, in their order."""
    numbers = iter(counts)
    return [
        {**message, "content": TAG.sub(lambda _: IMAGE_TAG * next(numbers), message["content"])} for message in messages
    ]


def _paths(value: object, key: str, folder: Path) -> list[Path]:
    values = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(values, list) or not all(isinstance(path, str) and path and "\0" not in path for path in values):
        raise Dropped(f"{key!r} is neither a path nor a list of paths", repr(value))
    return [folder / path for path in values]
