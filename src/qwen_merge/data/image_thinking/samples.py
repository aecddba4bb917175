"""A seeded, uniform sample of each converted set: 1,000 rows a set by default, kept with their pictures.

    <output>/image_thinking.answers/samples/<set>.parquet

They are copied once, because three steps need their pictures and reading a whole set for one row in a hundred takes
longer than the copy. Each row gets a number from the seed, its set and its place, and the rows with the smallest are
taken; memory holds the numbers of the sample and one row group.

Of a conversation with several turns the first is asked about: it is the only one whose question stands for itself. The
later turns are left out, and such rows are counted.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_merge.data.counts import Counts
from qwen_merge.data.disk import told
from qwen_merge.data.manifest import Manifest, manifest_path
from qwen_merge.data.schema import IMAGE_TAG, USER
from qwen_merge.data.teacher import filters
from qwen_merge.data.teacher.steps import sha256_of
from qwen_merge.data.teacher.texts import mark_in, share_of
from qwen_merge.errors import UserError

FOLDER = "llavaonevision_converted"
ROWS = 1000  # a set
SAMPLE = pa.schema(
    [(name, pa.string()) for name in ("id", "set", "question", "reference")] + [("picture", pa.binary())]
)
GROUP_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Sample:
    id: str  # the set's name and the row's number in it
    set: str
    question: str
    reference: str
    picture: bytes

    def mark(self) -> str:
        """Of everything in it: answers belong to this very sample, not to whatever has its id."""
        digest = hashlib.sha256(json.dumps([self.id, self.set, self.question, self.reference]).encode("ascii"))
        digest.update(self.picture)
        return digest.hexdigest()[:24]


def converted_sets(folder: Path, names: list[str]) -> dict[str, Path]:
    """The converted sets to draw from: name and folder, all of `folder` or the named ones.

    Raises:
        UserError: a name without a folder, or nothing there.
    """
    there = {path.name: path for path in sorted(folder.iterdir()) if _is_set(path)} if folder.is_dir() else {}
    missing = [f"{name}: {folder / name} is not there" for name in names if name not in there]
    if missing:
        raise UserError.from_list(
            "these sets cannot be sampled; convert them first (`qwen-merge data convert`):", missing
        )
    if not there:
        raise UserError(
            f"{folder} holds no converted set. Run `qwen-merge data convert onevision` first, or give their folder "
            "with --input."
        )
    return {name: path for name, path in there.items() if not names or name in names}


def _is_set(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and any(path.glob("*.parquet"))


def fingerprint(folder: Path) -> list:
    """Names and sha256 of a set's shards: another conversion is another source.

    The hashes are the manifest's where it fits the files, else they are worked out, which reads the whole set.

    Raises:
        UserError: the manifest or a shard cannot be read.
    """
    paths = _shards(folder)
    described = manifest_path(folder.parent, folder.name)
    if described.is_file():
        listed = {shard.name: shard for shard in Manifest.read(described).shards}
        if {name: shard.bytes for name, shard in listed.items()} == {
            path.name: os.path.getsize(path) for path in paths
        }:
            return [[path.name, listed[path.name].sha256] for path in paths]
    return [[path.name, sha256_of(path)] for path in paths]


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def draw(name: str, folder: Path, rows: int, seed: int, target: Path, index: Any = None) -> dict[str, Any]:
    """Draw from one set and write the sample; complete or not at all.

    Args:
        index: evaluation sets; samples that are near-copies of their items are left out, and not replaced.

    Returns:
        {"counts": of the drawn rows, "seen": rows in the set, "eligible": …, "several_turns": … of the drawn}

    Raises:
        UserError: a shard cannot be read, or the sample cannot be written.
    """
    chosen, seen, eligible, unfit = _choose(name, folder, rows, seed)
    counts = Counts(rows_in=len(chosen))
    several = 0
    with told(target.parent):
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        pending: list[dict[str, Any]] = []
        with pq.ParquetWriter(
            temporary, SAMPLE, compression="none", use_dictionary=False, write_statistics=False
        ) as writer:
            for number, messages, pictures in _rows_at(folder, chosen):
                key = f"{name}/{number}"
                question, reference = _first_turn(messages)
                if hit := filters.near_copy(index, question, pictures[0]):
                    counts.drop(filters.NEAR_COPY, f"{key}: {hit}")
                    continue
                counts.rows_out += 1
                several += len(messages) > 2
                pending.append(
                    {"id": key, "set": name, "question": question, "reference": reference, "picture": pictures[0]}
                )
                if sum(len(row["picture"]) for row in pending) >= GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist(pending, SAMPLE))
                    pending = []
            if pending:
                writer.write_table(pa.Table.from_pylist(pending, SAMPLE))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    return {
        "counts": counts.to_json(),
        "seen": seen,
        "eligible": eligible,
        "unfit": unfit,
        "several_turns": several,
    }


def _choose(name: str, folder: Path, rows: int, seed: int) -> tuple[list[int], int, int, dict[str, int]]:
    """(numbers of the drawn rows in order, rows seen, rows eligible, reasons of the others): texts are read only."""
    largest: list[tuple[float, int]] = []  # a heap of the smallest, the largest of them on top
    seen = eligible = 0
    unfit: dict[str, int] = {}
    for path in _shards(folder):
        with _explained(path):
            # The path of each picture is null; read for the length of its list, so that no picture's bytes are.
            for batch in pq.ParquetFile(path).iter_batches(1024, columns=["messages", "images.list.element.path"]):
                for row in batch.to_pylist():
                    reason = _unfit(row["messages"], len(row["images"] or ()))
                    if reason:
                        unfit[reason] = unfit.get(reason, 0) + 1
                    else:
                        eligible += 1
                        entry = (-share_of(seed, f"{name}/{seen}"), seen)
                        if len(largest) < rows:
                            heapq.heappush(largest, entry)
                        elif rows:
                            heapq.heappushpop(largest, entry)
                    seen += 1
    return sorted(number for _, number in largest), seen, eligible, dict(sorted(unfit.items()))


def _unfit(messages: list[dict[str, str]], pictures: int) -> str | None:
    if pictures != 1:
        return "not exactly one picture"
    if len(messages) < 2 or messages[0]["role"] != USER:
        return "no question and answer"
    question, reference = _first_turn(messages)
    if not question or not reference:
        return "empty question or answer"
    return "media tag or control token" if mark_in(question) or mark_in(reference) else None


def _first_turn(messages: list[dict[str, str]]) -> tuple[str, str]:
    return messages[0]["content"].replace(IMAGE_TAG, "", 1).strip(), messages[1]["content"].strip()


def _rows_at(folder: Path, numbers: list[int]) -> Iterator[tuple[int, list[dict[str, str]], list[bytes]]]:
    """The rows with these numbers, in order; only row groups that hold one are read."""
    wanted = iter(numbers)
    number = next(wanted, None)
    begin = 0
    for path in _shards(folder):
        with _explained(path):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                end = begin + file.metadata.row_group(group).num_rows
                if number is not None and number < end:
                    table = file.read_row_group(group)
                    while number is not None and number < end:
                        row = table.slice(number - begin, 1).to_pylist()[0]
                        yield number, row["messages"], [picture["bytes"] for picture in row["images"]]
                        number = next(wanted, None)
                begin = end


def read_samples(target: Path) -> Iterator[Sample]:
    """A drawn sample's rows in order, one row group in memory."""
    with _explained(target):
        file = pq.ParquetFile(target)
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group).to_pylist():
                yield Sample(**row)


class _explained:
    """Reading errors as a message that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError | pa.ArrowException | KeyError | json.JSONDecodeError):
            raise UserError(f"{self.path} cannot be read ({type(error).__name__}: {error}). Make it anew.") from error
