"""A user's own set in units of rows, for `qwen-merge data import`: planned once, then each done anywhere and again.

`plan` writes the rows that were drawn to files, so many rows or a shard's bytes of pictures in each; `import_unit`
makes such a file's shards. Both are in the journal, so a run that was killed goes on with the units that are left.
Units do not depend on the number of workers: what a set becomes is the same, byte for byte.
"""

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from qwen_merge.data import own_rows, pictures
from qwen_merge.data.conversations import VIDEO_TAG, Dropped
from qwen_merge.data.counts import Counts
from qwen_merge.data.frames import FrameOptions, frames_of
from qwen_merge.data.journal import write_whole
from qwen_merge.data.own_rows import OwnRow
from qwen_merge.data.own_sets import OwnSet
from qwen_merge.data.rows import kinds_of
from qwen_merge.data.sample import NOT_SAMPLED
from qwen_merge.data.schema import Record
from qwen_merge.data.shards import ShardWriter
from qwen_merge.data.workspace import Workspace

UNIT_ROWS = 1000


def plan(entry: OwnSet, sound: int, seed: int, turns: str, shard_bytes: int, space: Workspace) -> dict:
    """Draw the share of `sound` rows and write it as units; or what an earlier run planned.

    Returns: the journal's line: `planned`, how many units; `counts` without the rows that were drawn, but in `rows_in`;
    `silent`, how many of their answers stand before a row's last one and are in no row of their own.
    """
    for line in space.journal.entries():
        if "planned" in line:
            return line
    counts, silent, units, size = Counts(), 0, 0, 0
    draw = drawn(sound, entry.rows_of(sound), seed, entry.name.partition("%")[0])
    rows: list[str] = []
    (space.folder / "rows").mkdir(exist_ok=True)
    for place, row in own_rows.judged(entry.annotations, entry.folder, turns):
        counts.rows_in += 1
        if isinstance(row, Dropped):
            counts.drop(row.reason, f"{place}: {row.example}")
        elif not next(draw, False):
            counts.drop(NOT_SAMPLED, place)
        else:
            more = sum(_size(path) for _, path in row.files)
            if len(rows) >= UNIT_ROWS or (rows and size + more > shard_bytes):
                _save(space.folder, units, rows)
                rows, units, size = [], units + 1, 0
            rows.append(json.dumps([place, row.messages, [(tag, str(path.absolute())) for tag, path in row.files]]))
            size += more
            silent += row.answers - 1 if turns == own_rows.WHOLE else 0
    if rows:
        _save(space.folder, units, rows)
        units += 1
    line = {"planned": units, "counts": counts.to_json(), "silent": silent}
    space.journal.append(line)
    return line


def drawn(rows: int, wanted: int, seed: int, name: str) -> Iterator[bool]:
    """For each of `rows` rows in their order whether it is drawn; of all choices of `wanted` each is as likely."""
    dice = random.Random(f"{seed}:{name}")
    for left in range(rows, 0, -1):
        taken = dice.random() * left < wanted
        wanted -= taken
        yield taken


def import_unit(unit: dict) -> dict:
    """Open the files of a unit's rows and write its shards. `counts`: what came out, and drops of rows whose files
    cannot be used; `rows_in` is the plan's. Doing it again replaces equal files by equal files."""
    folder, options = Path(unit["folder"]), FrameOptions(**unit["frames"])
    counts, seen, frames = Counts(), dict[str, int](), 0
    for cached in (_picture, _frames):  # another run may have seen other files there
        cached.cache_clear()
    with (
        open(_path(folder, unit["unit"]), encoding="utf-8") as lines,
        ShardWriter(folder / "shards", f"part-{unit['unit']:05d}", unit["shard_bytes"]) as writer,
    ):
        for line in lines:
            place, messages, files = json.loads(line)
            row = OwnRow(messages, [(tag, Path(path)) for tag, path in files])
            try:
                images, parts, kinds = _opened(row, options)
            except Dropped as dropped:
                counts.drop(dropped.reason, f"{place}: {dropped.example}")
                continue
            writer.add(Record(own_rows.expanded(row.messages, parts), images))
            counts.rows_out += 1
            frames += sum(part for part, (tag, _) in zip(parts, row.files, strict=True) if tag == VIDEO_TAG)
            for kind in kinds:
                seen[kind] = seen.get(kind, 0) + 1
        shards = writer.close()
    return {
        "imported": unit["unit"],
        "counts": counts.to_json(),
        "shards": [shard.to_json() for shard in shards],
        "pictures": seen,
        "frames": frames,
    }


def _opened(row: OwnRow, options: FrameOptions) -> tuple[list[bytes], list[int], list[str]]:
    """The pictures of a row, how many of them stand for each of its files, and what kinds its own pictures are of."""
    images, parts, kinds = list[bytes](), [], list[str]()
    for tag, path in row.files:
        if tag == VIDEO_TAG:
            found = _frames(path, options)
        else:
            picture, its_kinds = _picture(path)
            found = (picture,)
            kinds += its_kinds
        images += found
        parts.append(len(found))
    return images, parts, kinds


# Rows of one conversation, and often of one picture, follow each other.


@lru_cache(maxsize=8)
def _picture(path: Path) -> tuple[bytes, tuple[str, ...]]:
    try:
        data = path.read_bytes()
        return data, tuple(kinds_of(pictures.check(data)))
    except pictures.PictureError as error:
        raise Dropped(error.reason, f"{path}: {error.detail}") from None
    except OSError as error:
        raise Dropped("a file cannot be read", f"{path}: {error.strerror}") from None


@lru_cache(maxsize=2)
def _frames(path: Path, options: FrameOptions) -> tuple[bytes, ...]:
    return tuple(frames_of(path, options))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone since it was looked for; opening it says so
        return 0


def _path(folder: Path, unit: int) -> Path:
    return folder / "rows" / f"{unit:05d}.jsonl"


def _save(folder: Path, unit: int, rows: list[str]) -> None:
    write_whole(_path(folder, unit), lambda file: file.write("".join(f"{row}\n" for row in rows).encode()))
