"""One converter for ReCap, SynthDoG and LLaVA-OneVision: source rows in, shards in the record format out.

    qwen-merge data convert LLaVA_ReCap_CC3M --workers 8

Each source file is a unit: it is streamed, its rows are judged one by one, and its shards and counts are complete
before the journal says so. A restart does the units that the journal lacks. Units know nothing of each other, so the
number of workers and the engine change nothing in the output.

Sampling to a maximum is in `sample`, what becomes of one row in `rows`.
"""

import functools
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_merge.data import conversations, dataset_info, rows, sample, sources
from qwen_merge.data.counts import Counts
from qwen_merge.data.disk import told
from qwen_merge.data.manifest import Manifest, package_versions
from qwen_merge.data.progress import Progress
from qwen_merge.data.schema import Record
from qwen_merge.data.sets import SETS, PublicSet, find_sets, input_folder
from qwen_merge.data.shards import ShardInfo, ShardWriter
from qwen_merge.data.teacher.steps import decontaminate_option
from qwen_merge.data.units import run_units
from qwen_merge.data.workspace import State, Workspace
from qwen_merge.errors import UserError


@dataclass
class Options:
    """What decides a set's rows; a restart must give the same. `max_rows`: None for the set's own, 0 for all."""

    input: Path | None = None
    revision: str | None = None
    max_rows: int | None = None
    limit: int | None = None
    seed: int = 0
    shard_mb: int = 512
    decontaminate: list[Path] = field(default_factory=list)

    def maximum(self, entry: PublicSet) -> int | None:
        return entry.maximum if self.max_rows is None else self.max_rows or None

    def to_json(self, entry: PublicSet, local: sources.Source | None) -> dict:
        recorded = {
            # Not the way to the files, which may be written in many ways: their names are below, their content in the
            # journal and in the manifest.
            "revision": self.revision,
            "max_rows": self.maximum(entry),
            "limit": self.limit,
            "seed": self.seed,
            "shard_mb": self.shard_mb,
            "decontaminate": _evaluation_files(tuple(self.decontaminate)),
        }
        if local:
            recorded["files of --input"] = _named(local)
        return recorded


def convert(
    entry: PublicSet,
    output: Path,
    options: Options,
    engine: str = "processes",
    workers: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Manifest | None:
    """Convert one set into `<output>/<file_name>/`; None when it was finished already.

    Raises:
        UserError: the state on disk asks for --resume or --overwrite; a source or an option is wrong; the output's
            dataset_info.json is broken.
    """
    dataset_info.read(output)
    with told(output / entry.file_name), Workspace(output, entry.file_name) as space:
        local = sources.local_source(options.input, entry.split) if options.input else None
        recorded = options.to_json(entry, local)
        state = space.begin(recorded, resume, overwrite)
        if state is State.FINISHED:
            if problem := _other_files(output, entry, local):
                raise UserError(problem)
            dataset_info.enlist(output, entry.name, entry.file_name)
            say(f"{entry.name}: finished already, nothing to do")
            return None
        source = local or _hub_source(entry, options, space)
        _same_files(source, options, space)
        manifest = _convert(entry, source, options, recorded, space, engine, workers, say)
        space.finish(manifest)
        dataset_info.enlist(output, entry.name, entry.file_name)
        say(summary(manifest))
        return manifest


def _hub_source(entry: PublicSet, options: Options, space: Workspace) -> sources.Source:
    """The commit is looked up once: a restart goes on with the one that was found first."""
    for line in space.journal.entries():
        if "source" in line:
            return sources.Source.from_json(line["source"])
    source = sources.hub_source(entry, options.revision)
    space.journal.append({"source": source.to_json()})
    return source


def _convert(
    entry: PublicSet,
    source: sources.Source,
    options: Options,
    recorded: dict,
    space: Workspace,
    engine: str,
    workers: int,
    say: Callable[[str], None],
) -> Manifest:
    units = 1 if options.limit else sources.unit_count(source)
    maximum = options.maximum(entry)
    plan = {
        "set": entry.name,
        "source": source.to_json(),
        "folder": str(space.folder),
        "seed": options.seed,
        "limit": options.limit,
        "shard_bytes": options.shard_mb * 2**20,
        "index": rows.save_index(options.decontaminate, space.folder),
        "sampled": False,
    }
    total = sources.total_rows(source) if maximum and not options.limit else options.limit
    if maximum and (total is None or total > maximum):
        plan["sampled"] = True
        sample.draw(plan, units, maximum, space, engine, workers, say)

    done = {line["converted"]: line for line in space.journal.entries() if "converted" in line}
    # Whether there is a sample depends on the rows of all files, of which those still to do may have been mended.
    done = {unit: line for unit, line in done.items() if line.get("sampled", plan["sampled"]) == plan["sampled"]}
    done = {unit: line for unit, line in done.items() if space.has(ShardInfo(**shard) for shard in line["shards"])}
    progress = Progress(entry.name, "converted", units, len(done), say)

    def finished(result: dict) -> None:
        space.journal.append(result)
        done[result["converted"]] = result
        progress.step(sum(line["counts"]["rows_out"] for line in done.values()))

    run_units(
        [{**plan, "unit": unit} for unit in range(units) if unit not in done], convert_unit, engine, workers, finished
    )
    counts = Counts()
    shards = []
    seen: dict[str, int] = {}
    for unit in range(units):
        counts.merge(Counts.from_json(done[unit]["counts"]))
        shards += [ShardInfo(**shard) for shard in done[unit]["shards"]]
        for kind, number in done[unit]["pictures"].items():
            seen[kind] = seen.get(kind, 0) + number
    extra = {"pictures": dict(sorted(seen.items())), "units": units, "maximum": maximum}
    if plan["index"]:
        extra["evaluation sets"] = rows.load_index(plan["index"]).summary
    return Manifest(
        name=entry.name,
        source=f"{source.name}{f', {source.config}' if source.config else ''}",
        revision=source.recorded_revision(),
        options=recorded,
        seed=options.seed,
        counts=counts,
        shards=shards,
        versions=package_versions(*(["imagehash"] if plan["index"] else [])),
        extra=extra,
    )


def convert_unit(unit: dict) -> dict:
    """Convert one unit: write its shards and return its counts. Doing it again replaces equal files by equal files."""
    entry = SETS[unit["set"]]
    folder = Path(unit["folder"])
    chosen = sample.chosen(folder, unit["unit"]) if unit["sampled"] else None
    index = rows.load_index(unit["index"])
    counts = Counts()
    seen: dict[str, int] = {}
    columns = (*rows.TEXT_COLUMNS[entry.kind], *sources.PICTURES)
    with ShardWriter(folder / "shards", f"part-{unit['unit']:05d}", unit["shard_bytes"]) as writer:
        for number, row in rows.rows_of(unit, columns):
            counts.rows_in += 1
            place = rows.place_of(unit, number, row)
            try:
                messages = rows.messages_of(entry, row, index)
                if chosen is not None and number not in chosen:
                    raise conversations.Dropped(sample.NOT_SAMPLED, "")
                data, picture = rows.picture_of(entry, row, index)
            except conversations.Dropped as dropped:
                counts.drop(dropped.reason, f"{place}: {dropped.example}" if dropped.example else place)
                continue
            writer.add(Record(messages, [data]))
            counts.rows_out += 1
            for kind in rows.kinds_of(picture):
                seen[kind] = seen.get(kind, 0) + 1
        shards = writer.close()
    return {
        "converted": unit["unit"],
        "sampled": unit["sampled"],
        "counts": counts.to_json(),
        "shards": [shard.to_json() for shard in shards],
        "pictures": seen,
    }


def _named(source: sources.Source) -> str:
    """Local files by their names, in one line. Not by their content: a file that was cut short and fetched again must
    not undo what was made of the others; _same_files() looks at those."""
    files = source.recorded_revision()
    assert isinstance(files, list)
    digest = hashlib.sha256(repr([file["file"] for file in files]).encode()).hexdigest()[:12]
    return f"{len(files)} files, digest of their names {digest}"


def _other_files(output: Path, entry: PublicSet, local: sources.Source | None) -> str | None:
    """What is wrong if the set is finished and was made of other versions of these files."""
    space = Workspace(output, entry.file_name)
    if local is None or not space.finished:
        return None
    before, now = Manifest.read(space.manifest_path).revision, local.recorded_revision()
    assert isinstance(now, list)
    if before == now:
        return None
    changed = [file["file"] for file in now if not isinstance(before, list) or file not in before]
    example = f", such as {changed[0]}" if changed else ""
    return (
        f"{space.final} was made of other versions of {len(changed)} files of --input{example}. Give --overwrite to "
        "make it anew, or another --output."
    )


def _same_files(source: sources.Source, options: Options, space: Workspace) -> None:
    """Note in the journal which files are read, and that those of the units that are done are still the same: drawn
    from, or converted. A sample from one version of a file would take other rows of the next.

    Raises:
        UserError: one is not.
    """
    if source.builder == "hub":
        return
    files = source.recorded_revision()
    assert isinstance(files, list)
    before = None
    done = set()
    for line in space.journal.entries():
        before = line.get("files", before)
        done |= {line.get("drawn"), line.get("converted")}
    if before is None:
        space.journal.append({"files": files})
        return
    read = files if options.limit and done - {None} else [file for unit, file in enumerate(files) if unit in done]
    changed = [file["file"] for file in read if file not in before]
    if changed:
        raise UserError(
            f"{space.final}: {len(changed)} files of --input were read and have changed since, such as "
            f"{changed[0]}. Bring them back to go on with --resume, or give --overwrite to start anew."
        )
    if files != before:
        space.journal.append({"files": files})


@functools.cache  # asked for twice a set, of perhaps ninety; the files can be gigabytes
def _evaluation_files(paths: tuple[Path, ...]) -> list[list[str]] | None:
    return decontaminate_option(list(paths))


def summary(manifest: Manifest) -> str:
    """Rows in, rows out, and the reasons, most frequent first."""
    counts = manifest.counts
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{manifest.name}: {counts.rows_in:,} rows in, {counts.rows_out:,} out, {len(manifest.shards)} shards, "
        f"{size / 1e6:,.1f} MB"
    ]
    for reason, entry in sorted(counts.drops.items(), key=lambda item: -item[1]["rows"]):
        lines.append(f"  {entry['rows']:>10,} dropped: {reason}")
    if not counts.rows_out:
        lines.append("  nothing is left: the folder is empty and no recipe can use it")
    return "\n".join(lines)


def run(arguments: Any) -> int:
    """`qwen-merge data convert`: every set's state is looked at before the first one is begun."""
    entries = find_sets(arguments.sets)
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on with what is there, --overwrite begins anew: give one of them.")
    todo = []
    problems = []
    for entry in entries:
        options = Options(
            revision=arguments.revision,
            max_rows=arguments.max_rows,
            limit=arguments.limit,
            seed=arguments.seed,
            shard_mb=arguments.shard_mb,
            decontaminate=arguments.decontaminate,
        )
        try:
            local = None
            if arguments.input:
                options.input = input_folder(arguments.input, entry, len(entries) > 1)
                local = sources.local_source(options.input, entry.split)
            problem = Workspace(arguments.output, entry.file_name).problem(
                options.to_json(entry, local), arguments.resume, arguments.overwrite
            )
            if not problem and not arguments.overwrite:
                problem = _other_files(arguments.output, entry, local)
        except UserError as error:
            problem = str(error)
        if problem:
            problems.append(problem)
        todo.append((entry, options))
    if problems:
        raise UserError(problems[0]) if len(problems) == 1 else UserError.from_list("nothing was begun:", problems)
    for entry, options in todo:
        convert(
            entry, arguments.output, options, arguments.engine, arguments.workers, arguments.resume, arguments.overwrite
        )
    return 0
