"""A user's own sets to the record format, in two passes: `qwen-merge data import SET%SHARE … --sets FILE`.

The first reads every row of every set: texts, tags, whether the files are there. What is wrong is told for all sets at
once, before anything is written. The second draws the share and opens the files of the rows that were drawn
(`own_units`): pictures keep their bytes, videos become frames. What cannot be opened is told at the end, for all sets
at once; the rest is kept for --resume, as after a kill. Memory is some of a row group, whatever the size of a set.

A share is exact: of N sound rows the whole part of N times the share, each row with the same chance, always the same
ones for a seed. With `--drop` rows that are wrong are left out and counted in the manifest instead.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_merge.data import dataset_info, own_rows, own_units
from qwen_merge.data.conversations import Dropped
from qwen_merge.data.convert import summary
from qwen_merge.data.counts import Counts
from qwen_merge.data.disk import told
from qwen_merge.data.frames import FrameOptions
from qwen_merge.data.manifest import Manifest, package_versions
from qwen_merge.data.own_sets import OwnSet, find
from qwen_merge.data.progress import Progress
from qwen_merge.data.shards import ShardInfo
from qwen_merge.data.units import run_units
from qwen_merge.data.workspace import State, Workspace
from qwen_merge.errors import UserError

MEND = "Mend them, or give --drop to leave them out and count them."
GO_ON = "Mend them and give --resume, or give --resume --drop to leave them out and count them."
SILENT = (
    "  {:>10,} answers will get no loss in a recipe with `mask_history: true`, as those for grafts: others follow them "
    "in their row. --turns each makes each a row of its own"
)


@dataclass
class Options:
    """What decides a set's rows beside its annotations; a manifest has it. Not `drop`: a restart may give it, and what
    it left out is in the counts."""

    frames: FrameOptions
    seed: int = 0
    drop: bool = False
    shard_mb: int = 512
    turns: str = own_rows.WHOLE

    def to_json(self, entry: OwnSet) -> dict:
        frames = {f"video_{name}": value for name, value in asdict(self.frames).items()}
        return {
            **frames,
            "seed": self.seed,
            "shard_mb": self.shard_mb,
            "turns": self.turns,
            "digest of annotation_path": entry.digest(),
            "folder of data_path": str(entry.folder.resolve()),
        }


def run(arguments: Any) -> int:
    """`qwen-merge data import`."""
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on with what is there, --overwrite begins anew: give one of them.")
    options = Options(frame_options(arguments), arguments.seed, arguments.drop, arguments.shard_mb, arguments.turns)
    entries = find(arguments.sets, arguments.registry)
    known = dataset_info.read(arguments.output)
    problems, todo = [], []
    for entry in entries:
        if problem := _taken(entry, known, arguments.output):
            problems.append(problem)
        recorded = options.to_json(entry)
        space = Workspace(arguments.output, entry.name)
        if problem := space.problem(recorded, arguments.resume, arguments.overwrite):
            problems.append(problem)
        todo.append((entry, recorded))
    if problems:
        raise UserError.from_list("nothing was begun:", problems)
    found = []
    for entry in entries:
        try:
            found.append(look(entry, options.turns))
            wrong = [] if options.drop else _told(entry, found[-1], MEND)
            problems += wrong or _empty(entry, found[-1])
        except UserError as error:
            problems.append(f"{entry.name}: {error}")
    if problems:
        raise UserError.from_list("nothing was begun:", problems)
    how = (arguments.engine, arguments.workers, arguments.resume, arguments.overwrite)
    for (entry, recorded), counts in zip(todo, found, strict=True):
        unusable = write(entry, recorded, counts, arguments.output, options, *how)
        drawn_rows = entry.rows_of(counts.rows_out)
        problems += [] if options.drop else _told(entry, unusable, GO_ON)
        if options.drop and unusable.dropped == drawn_rows:
            problems.append(f"{entry.name}: none of the {drawn_rows:,} rows can be used ({_reasons(unusable)})")
    if problems:
        raise UserError.from_list("these sets are not finished; what is sound of them is kept:", problems)
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


def look(entry: OwnSet, turns: str = own_rows.WHOLE) -> Counts:
    """First pass: how many rows there are, and why some cannot be used. `rows_out`: the sound ones."""
    counts = Counts()
    for place, row in own_rows.judged(entry.annotations, entry.folder, turns):
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
    engine: str = "processes",
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Counts:
    """Second pass: write a set and enlist it. What it gives back has only drops of rows whose files cannot be used.

    found: of the first pass. With such drops the set stays half done without `options.drop`; what is sound is kept.
    """
    unusable = Counts()
    with told(output / entry.name), Workspace(output, entry.name) as space:
        if space.begin(recorded, resume, overwrite) is State.FINISHED:
            dataset_info.enlist(output, entry.name, entry.name)
            say(f"{entry.name}: finished already, nothing to do")
            return unusable
        shard_bytes = options.shard_mb * 2**20
        plan = own_units.plan(entry, found.rows_out, options.seed, options.turns, shard_bytes, space)
        done = _done(space)
        progress = Progress(entry.name, "imported", plan["planned"], len(done), say, "parts")

        def finished(result: dict) -> None:
            space.journal.append(result)
            done[result["imported"]] = result
            progress.step(sum(line["counts"]["rows_out"] for line in done.values()))

        unit = {"folder": str(space.folder), "frames": asdict(options.frames), "shard_bytes": shard_bytes}
        todo = [{**unit, "unit": number} for number in range(plan["planned"]) if number not in done]
        run_units(todo, own_units.import_unit, engine, workers, finished)
        results = [done[number] for number in range(plan["planned"])]
        counts = Counts.from_json(plan["counts"])
        for result in results:
            counts.merge(Counts.from_json(result["counts"]))
            unusable.merge(Counts(drops=Counts.from_json(result["counts"]).drops))
        if not counts.rows_out and options.drop:
            space.discard()
            return unusable
        if unusable.drops and not options.drop:
            return unusable
        manifest = _manifest(entry, recorded, options, plan, results, counts)
        space.finish(manifest)
        dataset_info.enlist(output, entry.name, entry.name)
        say(summary(manifest))
        if plan["silent"]:
            say(SILENT.format(plan["silent"]))
    return unusable


def _done(space: Workspace) -> dict[int, dict]:
    """The units that need not be done again. One whose rows had files that cannot be used is: they may be mended."""
    lines = {line["imported"]: line for line in space.journal.entries() if "imported" in line}
    return {
        unit: line
        for unit, line in lines.items()
        if not line["counts"]["drops"] and space.has(ShardInfo(**shard) for shard in line["shards"])
    }


def _manifest(
    entry: OwnSet, recorded: dict, options: Options, plan: dict, results: list[dict], counts: Counts
) -> Manifest:
    seen = Counter[str]()
    for result in results:
        seen.update(result["pictures"])
    frames = sum(result["frames"] for result in results)
    return Manifest(
        name=entry.name,
        source=entry.annotations.name,
        revision=recorded["digest of annotation_path"],
        options=recorded,
        seed=options.seed,
        counts=counts,
        shards=[ShardInfo(**shard) for result in results for shard in result["shards"]],
        versions=package_versions("av") if frames else package_versions(),
        extra={
            "pictures": dict(sorted(seen.items())),
            "frames of videos": frames,
            "share": entry.share,
            "answers before the last of a row": plan["silent"],
        },
    )


def _told(entry: OwnSet, counts: Counts, way_out: str) -> list[str]:
    """A line for each reason for which rows cannot be used."""
    return [
        f"{entry.name}: {drop['rows']:,} rows: {reason}, such as {'; '.join(drop['examples'])}. {way_out}"
        for reason, drop in counts.drops.items()
    ]
