"""A user's own sets to the record format, in two passes: `qwen-merge data import SET%SHARE … --sets FILE`.

The first reads every row of every set: texts, tags, whether the files are there. What is wrong is told for all sets at
once, before anything is written. The second draws the share and opens the files of the rows that were drawn: pictures
keep their bytes, videos become frames. Memory is some of a row group, whatever the size of a set.

A share is exact: of N sound rows the whole part of N times the share, each row with the same chance, always the same
ones for a seed. With `--drop` rows that are wrong are left out and counted in the manifest instead.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_merge.data import dataset_info, json_rows, own_rows, pictures
from qwen_merge.data.conversations import VIDEO_TAG, Dropped
from qwen_merge.data.convert import summary
from qwen_merge.data.counts import Counts
from qwen_merge.data.disk import told
from qwen_merge.data.frames import FrameOptions, frames_of
from qwen_merge.data.manifest import Manifest, package_versions
from qwen_merge.data.own_sets import OwnSet, find
from qwen_merge.data.rows import kinds_of
from qwen_merge.data.sample import NOT_SAMPLED
from qwen_merge.data.schema import Record
from qwen_merge.data.shards import ShardWriter
from qwen_merge.data.workspace import State, Workspace
from qwen_merge.errors import UserError

MEND = "Mend them, or give --drop to leave them out and count them."


@dataclass
class Options:
    """What decides a set's rows beside its annotations; a manifest has it."""

    frames: FrameOptions
    seed: int = 0
    drop: bool = False
    shard_mb: int = 512

    def to_json(self, entry: OwnSet) -> dict:
        frames = {f"video_{name}": value for name, value in asdict(self.frames).items()}
        return {
            **frames,
            "seed": self.seed,
            "drop": self.drop,
            "shard_mb": self.shard_mb,
            "digest of annotation_path": entry.digest(),
            "folder of data_path": str(entry.folder.resolve()),
        }


def run(arguments: Any) -> int:
    """`qwen-merge data import`."""
    options = Options(frame_options(arguments), arguments.seed, arguments.drop, arguments.shard_mb)
    entries = find(arguments.sets, arguments.registry)
    known = dataset_info.read(arguments.output)
    problems, todo = [], []
    for entry in entries:
        if problem := _taken(entry, known, arguments.output):
            problems.append(problem)
        recorded = options.to_json(entry)
        if problem := Workspace(arguments.output, entry.name).problem(recorded, True, arguments.overwrite):
            problems.append(problem)
        todo.append((entry, recorded))
    if problems:
        raise UserError.from_list("nothing was begun:", problems)
    found = []
    for entry in entries:
        try:
            found.append(look(entry))
            wrong = [] if options.drop else _told(entry, found[-1])
            problems += wrong or _empty(entry, found[-1])
        except UserError as error:
            problems.append(f"{entry.name}: {error}")
    if problems:
        raise UserError.from_list("nothing was begun:", problems)
    for (entry, recorded), counts in zip(todo, found, strict=True):
        unusable = write(entry, recorded, counts, arguments.output, options, arguments.overwrite)
        drawn_rows = entry.rows_of(counts.rows_out)
        problems += [] if options.drop else _told(entry, unusable)
        if options.drop and _dropped(unusable) == drawn_rows:
            problems.append(f"{entry.name}: none of the {drawn_rows:,} rows can be used ({_reasons(unusable)})")
    if problems:
        raise UserError.from_list("these sets were not written:", problems)
    return 0


def _taken(entry: OwnSet, known: dict, output: Path) -> str | None:
    """Why a training would not find the set under its name: what is enlisted already stays as it is."""
    there = known.get(entry.name, {"file_name": entry.name})
    place = there.get("file_name") if isinstance(there, dict) else there
    if place == entry.name:
        return None
    return (
        f"{output / dataset_info.NAME} has another set of the name {entry.name}, in {place!r}, which a training would "
        "read. Give yours another name."
    )


def _empty(entry: OwnSet, counts: Counts) -> list[str]:
    """Why no row would be left; LLaMA-Factory loads no set without rows. counts: of the first pass."""
    if entry.rows_of(counts.rows_out):
        return []
    if not counts.rows_in:
        return [f"{entry.name}: {entry.annotations} has no row"]
    if not counts.rows_out:
        return [f"{entry.name}: none of its {counts.rows_in:,} rows can be used ({_reasons(counts)})"]
    return [
        f"{entry.name}: {entry.share:g} percent of {counts.rows_out:,} rows are less than one row. Take more, "
        f"at least {math.ceil(10_000 / counts.rows_out) / 100:g}"
    ]


def _reasons(counts: Counts) -> str:
    return ", ".join(f"{drop['rows']:,}: {reason}" for reason, drop in counts.drops.items())


def _dropped(counts: Counts) -> int:
    return sum(drop["rows"] for drop in counts.drops.values())


def frame_options(arguments: Any) -> FrameOptions:
    """Raises UserError for bounds that leave nothing between them."""
    options = FrameOptions(
        arguments.video_fps,
        arguments.video_min_frames,
        arguments.video_max_frames,
        arguments.video_min_pixels,
        arguments.video_max_pixels,
    )
    for name in ("frames", "pixels"):
        least, most = getattr(options, f"min_{name}"), getattr(options, f"max_{name}")
        if least > most:
            raise UserError(f"--video-min-{name} is {least} and --video-max-{name} {most}; expected no more than that.")
    return options


def look(entry: OwnSet) -> Counts:
    """First pass: how many rows there are, and why some cannot be used. `rows_out`: the sound ones."""
    counts = Counts()
    for place, row in _judged(entry):
        counts.rows_in += 1
        if isinstance(row, Dropped):
            counts.drop(row.reason, f"{place}: {row.example}")
        else:
            counts.rows_out += 1
    return counts


def write(
    entry: OwnSet,
    recorded: dict,
    found: Counts,
    output: Path,
    options: Options,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Counts:
    """Second pass: write a set and enlist it. What it gives back has only drops of rows whose files cannot be used.

    found: of the first pass. With such drops nothing is written without `options.drop`, nor where no row is left.
    """
    unusable = Counts()
    with told(output / entry.name), Workspace(output, entry.name) as space:
        # Half done: begun again from its first row.
        if space.begin(recorded, True, overwrite) is State.FINISHED:
            dataset_info.enlist(output, entry.name, entry.name)
            say(f"{entry.name}: finished already, nothing to do")
            return unusable
        counts, seen, frames = Counts(), dict[str, int](), 0
        draw = drawn(found.rows_out, entry.rows_of(found.rows_out), options.seed, entry.name.partition("%")[0])
        with ShardWriter(space.shards, "part-00000", options.shard_mb * 2**20) as writer:
            for place, row in _judged(entry):
                counts.rows_in += 1
                try:
                    if isinstance(row, Dropped):
                        raise row
                    if not next(draw, False):
                        raise Dropped(NOT_SAMPLED, "")
                    try:
                        images, parts = _opened(row, options, seen)
                    except Dropped as dropped:
                        unusable.drop(dropped.reason, f"{place}: {dropped.example}")
                        raise
                except Dropped as dropped:
                    counts.drop(dropped.reason, f"{place}: {dropped.example}" if dropped.example else place)
                    continue
                writer.add(Record(own_rows.expanded(row.messages, parts), images))
                counts.rows_out += 1
                frames += sum(part for part, (tag, _) in zip(parts, row.files, strict=True) if tag == VIDEO_TAG)
            if unusable.drops and not (options.drop and counts.rows_out):
                writer.abort()
                space.discard()
                return unusable
            shards = writer.close()
        manifest = Manifest(
            name=entry.name,
            source=entry.annotations.name,
            revision=recorded["digest of annotation_path"],
            options=recorded,
            seed=options.seed,
            counts=counts,
            shards=shards,
            versions=package_versions("av") if frames else package_versions(),
            extra={"pictures": dict(sorted(seen.items())), "frames of videos": frames, "share": entry.share},
        )
        space.finish(manifest)
        dataset_info.enlist(output, entry.name, entry.name)
        say(summary(manifest))
    return unusable


def drawn(rows: int, wanted: int, seed: int, name: str) -> Iterator[bool]:
    """For each of `rows` rows in their order whether it is drawn; of all choices of `wanted` each is as likely."""
    dice = random.Random(f"{seed}:{name}")
    for left in range(rows, 0, -1):
        taken = dice.random() * left < wanted
        wanted -= taken
        yield taken


def _judged(entry: OwnSet) -> Iterator[tuple[str, "own_rows.OwnRow | Dropped"]]:
    """Each row's place, and the row or why it cannot be used."""
    for number, row in json_rows.rows(entry.annotations):
        place = own_rows.place_of(number, row)
        try:
            yield place, own_rows.read(row, entry.folder)
        except Dropped as dropped:
            yield place, dropped


def _opened(row: own_rows.OwnRow, options: Options, seen: dict[str, int]) -> tuple[list[bytes], list[int]]:
    """The pictures of a row, and how many of them stand for each of its files."""
    images, parts, kinds = [], [], []
    for tag, path in row.files:
        if tag == VIDEO_TAG:
            found = frames_of(path, options.frames)
        else:
            try:
                found = [path.read_bytes()]
                kinds += list(kinds_of(pictures.check(found[0])))
            except pictures.PictureError as error:
                raise Dropped(error.reason, f"{path}: {error.detail}") from None
            except OSError as error:
                raise Dropped("a file cannot be read", f"{path}: {error.strerror}") from None
        images += found
        parts.append(len(found))
    for kind in kinds:
        seen[kind] = seen.get(kind, 0) + 1
    return images, parts


def _told(entry: OwnSet, counts: Counts) -> list[str]:
    """A line for each reason for which rows cannot be used."""
    return [
        f"{entry.name}: {drop['rows']:,} rows: {reason}, such as {drop['examples'][0]}. {MEND}"
        for reason, drop in counts.drops.items()
    ]
