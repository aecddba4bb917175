"""One row of a public set, judged: its text, its picture, or the named reason why it is dropped.

Both passes of `qwen-merge data convert` ask here: which rows may be drawn, and what they become.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from qwen_merge.data import conversations, pictures, sources
from qwen_merge.data.schema import IMAGE_TAG, USER
from qwen_merge.data.sets import SETS, PublicSet

# What a source's rows are told by; the last is the one without which a file holds no such rows at all.
TEXT_COLUMNS = {"conversations": ("id", "conversations"), "synthdog": ("ground_truth",)}


def messages_of(entry: PublicSet, row: dict, index: Any) -> list[dict[str, str]]:
    """The row's text in the record format, or Dropped; needs no picture, so the first pass asks it too."""
    if entry.kind == "synthdog":
        return conversations.page(row.get("ground_truth"), entry.instruction)
    messages = conversations.conversation(row.get("conversations"))
    if index is not None:
        for message in messages:
            if message["role"] == USER:
                hit = index.question_hit(message["content"].replace(IMAGE_TAG, "").strip())
                if hit is not None:
                    raise conversations.Dropped("question is in an evaluation set", hit)
    return messages


def picture_of(entry: PublicSet, row: dict, index: Any) -> tuple[bytes, pictures.Picture]:
    found = sources.pictures_of(row)
    if len(found) != 1:
        raise conversations.Dropped("no picture" if not found else "more than one picture", f"{len(found)} pictures")
    data = found[0]
    try:
        picture = pictures.check(data, entry.max_pixels)
    except pictures.PictureError as error:
        raise conversations.Dropped(error.reason, error.detail) from None
    assert data is not None
    hit = index.picture_hit(data) if index is not None else None
    if hit is not None:
        raise conversations.Dropped("picture is in an evaluation set", hit)
    return data, picture


def kinds_of(picture: pictures.Picture) -> Iterator[str]:
    """What the manifest counts of the pictures that were kept."""
    yield f"{picture.format} {picture.mode}"
    if picture.animated:
        yield "animated (training sees the first frame)"
    if picture.rotated:
        yield "rotated by EXIF (training does not turn them)"
    if picture.mode.startswith(("I;16", "I")):
        yield "16-bit grey (training clips them to white)"


def rows_of(unit: dict, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """The rows of a unit with their numbers.

    Raises:
        UserError: a file cannot be read, or has not the column that holds this kind's text.
    """
    source = sources.Source.from_json(unit["source"])
    text = TEXT_COLUMNS[SETS[unit["set"]].kind][-1]
    if unit["limit"]:  # a trial: the first rows of all files, in one unit
        files = range(sources.unit_count(source))
        every = (row for file in files for row in sources.rows(source, file, columns, text))
        return enumerate(islice(every, unit["limit"]))
    return enumerate(sources.rows(source, unit["unit"], columns, text))


def place_of(unit: dict, number: int, row: dict) -> str:
    identity = row.get("id")
    return f"unit {unit['unit']} row {number}{f' id {identity}' if identity not in (None, '') else ''}"


def save_index(paths: list[Path], folder: Path) -> str | None:
    """The evaluation sets to keep out, read once, for all workers to load; None without any.

    An index that was saved before is used if it loads.
    """
    if not paths:
        return None
    from qwen_merge.data.decontaminate import Index

    path = folder / "evaluation-index"
    load_index.cache_clear()  # of this very path, before --overwrite
    try:
        load_index(str(path))
    except (OSError, ValueError):
        Index.read(paths).save(path)
    return str(path)


@lru_cache(maxsize=1)  # once a process
def load_index(path: str | None) -> Any:
    if path is None:
        return None
    from qwen_merge.data.decontaminate import Index

    return Index.load(Path(path))
