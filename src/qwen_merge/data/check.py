"""A stage's data before a GPU is rented: is everything there, would LLaMA-Factory take it, how much training is it.

    qwen-merge data check examples/train_qwen_merge/train_qwen_merge_vl_4B_stage1.yaml --world-size 8

The recipe, the sets and every row are checked and all problems come in one message (exit code 2); the figures are
printed all the same. Rows are streamed and workers return sums, so memory does not grow with the data.
"""

import argparse
import math
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

from qwen_merge.data import check_recipe, check_rows, check_sets
from qwen_merge.data.check_report import figures, lines
from qwen_merge.data.check_steps import PLANNED_TEMPLATES, Steps, map_batches, packed_samples, planned_packs, steps
from qwen_merge.data.check_summary import Summary
from qwen_merge.data.manifest import require_writable, write_json
from qwen_merge.data.units import run_units
from qwen_merge.errors import UserError

UNIT_BYTES = 64 * 2**20  # of a file; what a worker reads before it reports
WORKER_BYTES = 256 * 2**20  # below that a worker's start (15 seconds of imports) costs more than it saves


@dataclass
class Checked:
    """A set after its rows were read. `used`: rows of the files that LLaMA-Factory would read."""

    files: check_sets.SetFiles
    summary: Summary
    used: int

    @property
    def estimated(self) -> bool:
        return self.summary.rows.rows_in < self.used or self.files.attributes.num_samples is not None

    @property
    def samples(self) -> int:
        """Rows that become samples; scaled up where not all were read, or where the set is sampled itself."""
        return round(self.summary.rows.rows_out * self._scale)

    @property
    def tokens(self) -> int:
        """In one epoch, after the cut."""
        return round(self.summary.tokens.total * self._scale)

    @property
    def _scale(self) -> float:
        read = self.summary.rows.rows_in
        wanted = self.files.attributes.num_samples
        return (self.used if wanted is None else wanted) / read if read else 0.0


@dataclass
class Check:
    """Everything that was found out. `steps` is None when the recipe could not be parsed or there is no row."""

    config: dict
    sets: list[Checked]
    problems: list[str]
    notes: list[str]
    world_size: int
    steps: Steps | None = None
    arguments: check_recipe.Arguments | None = None
    lengths: dict[str, list[int | None]] = field(default_factory=dict)  # of each row, kept for packing only

    @property
    def counted(self) -> bool:
        """Whether tokens were counted."""
        return any(each.summary.tokens.count for each in self.sets)


def run(arguments: argparse.Namespace) -> int:
    """`qwen-merge data check`."""
    if arguments.json:  # before hours of reading
        require_writable(arguments.json)
    check_recipe.require_llamafactory()
    config = check_recipe.read(arguments.recipe, arguments.overrides, arguments.model)
    result = check(config, arguments.world_size, arguments.sample, arguments.seed, arguments.workers)
    print("\n".join(lines(result, str(arguments.recipe))))
    if arguments.json:
        write_json(arguments.json, figures(result))
    if result.problems:
        sys.stdout.flush()
        raise UserError.from_list(f"{arguments.recipe}: {len(result.problems)} problems:", result.problems)
    print("no problem found")
    return 0


def check(
    config: dict, world_size: int = 8, sample: int | None = None, seed: int = 0, workers: int | None = None
) -> Check:
    """Check a recipe (its keys and values) and its sets. Problems are returned, not raised.

    `sample`: rows of each set to read, None for all; `workers`: processes, None to choose.
    """
    check_recipe.require_llamafactory()
    arguments, problems = check_recipe.parse(config)
    names = [name.strip() for name in str(config.get("dataset") or "").split(",") if name.strip()]
    found, more = check_sets.find_sets(names, str(config.get("dataset_dir") or "data"))
    problems += more
    count = False
    if arguments:
        try:
            check_recipe.load(arguments)
            count = True
        except UserError as error:
            problems.append(str(error))
    result = Check(config, [], problems, [], world_size, arguments=arguments)
    limit = arguments.data.max_samples if arguments else None
    for files in found:
        problems += files.problems
        result.notes += files.notes
        if files.shards:
            result.sets.append(Checked(files, Summary(), min(files.rows, limit or files.rows)))
    _read_rows(result, count, sample, seed, workers)
    for each in result.sets:
        problems += _row_problems(each)
    result.notes += _unaccounted(config, arguments)
    _count_steps(result, sample)
    return result


def work(unit: dict) -> dict:
    """Measure a unit's rows: {"set", "first", "summary", "lengths"}. Runs in a worker."""
    reader = check_rows.reader_of(unit)
    cutoff = reader.encoder.cutoff if reader.encoder else None
    summary, lengths = Summary(), []
    for number, example in check_rows.rows_of(unit["file"], unit["columns"], unit["groups"], unit["wanted"]):
        if unit["end"] is not None and number >= unit["end"]:
            break
        row = reader.measure(example)
        summary.add(row, f"{Path(unit['file']).name} row {number}", cutoff)
        lengths.append(row.tokens)
    return {
        "set": unit["set"],
        "number": unit["number"],
        "summary": summary.to_json(),
        "lengths": lengths if unit["lengths"] else [],
    }


def units_of(each: Checked, sample: int | None, seed: int) -> list[dict]:
    """Pieces of a set: consecutive row groups of one file, with the wanted rows when only a sample is read."""
    chosen = None
    if sample is not None and sample < each.used:
        chosen = sorted(random.Random(f"{seed} {each.files.name}").sample(range(each.used), sample))
    units: list[dict] = []
    first = 0  # row of the set that the file begins with
    for shard in each.files.shards:
        end = min(shard.rows, each.used - first)
        if end <= 0:
            break
        wanted = None if chosen is None else [row - first for row in chosen if first <= row < first + end]
        a_row = shard.bytes / max(shard.rows, 1)
        pending: list[int] = []
        pending_bytes = 0.0
        for group, rows in enumerate(shard.groups):
            pending.append(group)
            pending_bytes += rows * a_row
            if pending_bytes >= UNIT_BYTES or group == len(shard.groups) - 1:
                units.append({"file": str(shard.path), "groups": pending, "wanted": wanted, "end": end})
                pending, pending_bytes = [], 0.0
        first += shard.rows
    return units


def _read_rows(result: Check, count: bool, sample: int | None, seed: int, workers: int | None) -> None:
    packing = bool(result.arguments and result.arguments.data.packing)
    units = []
    for index, each in enumerate(result.sets):
        shared = {
            "set": index,
            "recipe": result.config if result.arguments else None,
            "count": count,
            "attributes": check_sets.to_json(each.files.attributes),
            "columns": each.files.columns,
            "lengths": packing,
        }
        units += [{**shared, **unit} for unit in units_of(each, sample, seed)]
    for number, unit in enumerate(units):
        unit["number"] = number
    if workers is None:
        share = sum(each.files.bytes for each in result.sets) / WORKER_BYTES
        workers = max(1, min(os.cpu_count() or 1, math.ceil(share)))
    # Merged in the order of the rows, so that examples are the first ones under any `workers`.
    early: dict[int, dict] = {}
    merged = 0
    bar = sys.stderr.isatty()

    def on_done(unit: dict) -> None:
        nonlocal merged
        early[unit["number"]] = unit
        while merged in early:
            part = early.pop(merged)
            each = result.sets[part["set"]]
            each.summary.merge(Summary.from_json(part["summary"]))
            result.lengths.setdefault(each.files.name, []).extend(part["lengths"])
            merged += 1
        if bar:
            print(f"\r{merged} of {len(units)} parts read ", end="", file=sys.stderr, flush=True)

    run_units(units, work, workers=workers, on_done=on_done)
    if bar and units:
        print(file=sys.stderr)


def _row_problems(each: Checked) -> list[str]:
    problems = []
    for counts, effect in ((each.summary.rows, "LLaMA-Factory would leave out"), (each.summary.stops, "stops at")):
        for reason, entry in sorted(counts.drops.items()):
            rows = f"{entry['rows']:,} row{'s' if entry['rows'] > 1 else ''}"
            said = f"{effect} {rows}" if counts is each.summary.rows else f"training {effect} {rows}"
            problems.append(f"{each.files.name}: {said}: {reason} ({'; '.join(entry['examples'])})")
    return problems


def _unaccounted(config: dict, arguments: check_recipe.Arguments | None) -> list[str]:
    """Settings that change what is trained on and that the figures leave out."""
    if arguments is None:
        return []
    data, notes = arguments.data, []
    if data.mix_strategy != "concat":
        notes.append(f"mix_strategy {data.mix_strategy} repeats or drops rows; tokens and steps are those of concat.")
    if data.val_size > 1e-6:
        notes.append(f"val_size {data.val_size:g} takes rows away; tokens and steps count them.")
    if data.streaming:
        notes.append("streaming: an epoch has no length there; max_steps decides.")
    if data.tokenized_path:
        notes.append(f"tokenized_path {data.tokenized_path}: if that folder exists the sets are not read at all.")
    return notes


def _count_steps(result: Check, sample: int | None) -> None:
    if result.arguments is None or not result.sets:
        return
    samples = sum(each.samples for each in result.sets)
    if result.arguments.data.packing:
        if result.counted and not any(each.estimated for each in result.sets):
            samples = _packed(result)
        else:
            result.notes.append("packing: samples and steps are those without it; every row must be read to know more.")
    training = result.arguments.training
    if samples:
        result.steps = steps(
            samples,
            training.per_device_train_batch_size,
            training.gradient_accumulation_steps,
            result.world_size,
            training.num_train_epochs,
            training.max_steps,
        )


def _packed(result: Check) -> int:
    """Samples after packing: the lengths of all rows, in batches as `datasets` maps them."""
    assert result.arguments is not None
    data = result.arguments.data
    rows = [length for each in result.sets for length in result.lengths[each.files.name]]
    if result.arguments.finetuning.stage == "sft" and data.template in PLANNED_TEMPLATES:
        group = result.world_size * result.arguments.training.per_device_train_batch_size
        return planned_packs([length for length in rows if length is not None], data.cutoff_len, group)
    start, batches = 0, []
    for size in map_batches(len(rows), data.preprocessing_num_workers, data.preprocessing_batch_size):
        batches.append([length for length in rows[start : start + size] if length is not None])
        start += size
    return packed_samples(batches, data.cutoff_len)
