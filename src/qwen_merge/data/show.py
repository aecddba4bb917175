"""One HTML page about a set, to look at before training on it.

    qwen-merge data show text2image --recipe examples/train_qwen_merge/train_qwen_merge_vl_4B_stage3.yaml

Random rows with their pictures and texts, token counts as LLaMA-Factory makes them with the stage's template and
tokenizer, histograms of lengths and picture sizes, and what the manifest counted. The page fetches nothing and runs
nothing; everything from the set is escaped.
"""

import argparse
import difflib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from qwen_merge.data import check_recipe, check_rows, check_sets
from qwen_merge.data.check_rows import Row
from qwen_merge.data.check_summary import Summary
from qwen_merge.data.look_command import RECIPES
from qwen_merge.data.show_page import render
from qwen_merge.errors import UserError
from qwen_merge.report.write import write_all


@dataclass
class Shown:
    """A row on the page: its `place` in the set, what the file holds, and what was measured."""

    place: str
    example: dict
    row: Row


@dataclass
class Look:
    """What the page is about. `recipe`: path, or None; `uncounted`: why there are no token counts, or an empty text."""

    files: check_sets.SetFiles
    recipe: Path | None
    arguments: check_recipe.Arguments | None
    uncounted: str
    summary: Summary
    shown: list[Shown]
    seed: int


def run(arguments: argparse.Namespace) -> int:
    """`qwen-merge data show`."""
    output = arguments.output or Path(f"{Path(arguments.set).name}.html")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output} cannot be written: expected a file name in a folder that exists.")
    look = look_at(
        arguments.set,
        dataset_dir=arguments.dataset_dir,
        recipe=arguments.recipe,
        model=arguments.model,
        rows=arguments.rows,
        measure=arguments.measure,
        seed=arguments.seed,
    )
    write_all({output: render(look)})
    mean = look.summary.tokens.mean
    if look.uncounted:
        tokens = f"no token counts: {look.uncounted}"
    else:
        tokens = "tokens of none of them could be counted" if mean is None else f"{mean:,.0f} tokens a row"
    print(f"{output}: {len(look.shown)} rows of {look.files.rows:,}, {look.summary.rows.rows_in:,} measured; {tokens}")
    return 0


def look_at(
    name: str,
    *,
    dataset_dir: Path | None = None,
    recipe: Path | None = None,
    model: str | None = None,
    rows: int = 24,
    measure: int = 2000,
    seed: int = 0,
) -> Look:
    """Read a set, named in dataset_info.json or by its path.

    `rows`: shown; `measure`: rows that the histograms count, drawn uniformly, 0 for all; both depend on `seed` only.

    Raises:
        UserError: no such set or recipe, or no readable row.
    """
    check_recipe.require_llamafactory()
    recipe = recipe or _recipe_of(name)
    config = check_recipe.read(recipe, [], model) if recipe else None
    folder = dataset_dir or Path((config or {}).get("dataset_dir") or "data")
    files = _find(name, folder)
    if not files.rows:
        raise UserError.from_list(f"{name} cannot be shown:", files.problems or ["it has no row"])
    parsed, uncounted = _arguments(config, recipe)
    summary, shown = Summary(), []
    measured, wanted = _choice(files, rows, measure, seed)
    unit = {"recipe": config if parsed else None, "count": not uncounted, "attributes": vars(files.attributes)}
    reader = check_rows.reader_of(unit)
    first = 0
    for shard in files.shards:
        mine = None if measured is None else [row - first for row in measured if 0 <= row - first < shard.rows]
        groups = list(range(len(shard.groups)))
        for number, example in check_rows.rows_of(str(shard.path), files.columns, groups, mine):
            row = reader.measure(example)
            place = f"{shard.path.name} row {number}"
            summary.add(row, place, reader.encoder.cutoff if reader.encoder else None)
            if first + number in wanted:
                shown.append(Shown(place, example, row))
        first += shard.rows
    return Look(files, recipe, parsed, uncounted, summary, shown, seed)


def _recipe_of(name: str) -> Path | None:
    """The kit's first recipe that trains on the set; files there that are no recipe are passed over."""
    for path in sorted(RECIPES.glob("*.yaml")):
        try:
            content = check_recipe.read(path)
        except UserError:
            continue
        if name in [each.strip() for each in str(content.get("dataset", "")).split(",")]:
            return path
    return None


def _find(name: str, folder: Path) -> check_sets.SetFiles:
    info = folder / check_sets.NAME
    try:
        names = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
        if not isinstance(names, dict):
            raise ValueError(f"it holds {type(names).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{info} is not the list of sets: {error}") from None
    if name in names:
        return check_sets.find_set(name, str(folder))
    if Path(name).exists():
        return check_sets.find_path(Path(name))
    near = difflib.get_close_matches(name, names, 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ", and no folder or file either."
    raise UserError(f"{name} is not in {info}{hint} --dataset-dir names another folder.")


def _arguments(config: dict | None, recipe: Path | None) -> tuple[check_recipe.Arguments | None, str]:
    """LLaMA-Factory's arguments, and why tokens cannot be counted (empty when they can)."""
    if config is None:
        return None, f"no recipe in {RECIPES} names this set; give one with --recipe"
    parsed, problems = check_recipe.parse(config)
    if parsed is None:
        raise UserError.from_list(f"{recipe} cannot be used:", problems)
    try:
        check_recipe.load(parsed)
    except UserError as error:
        return parsed, str(error)
    return parsed, ""


def _choice(files: check_sets.SetFiles, rows: int, measure: int, seed: int) -> tuple[list[int] | None, set[int]]:
    """Ascending numbers of the rows to measure (None: all), and those of them to show."""
    draw = random.Random(f"{seed} {files.name}")
    count = max(rows, measure)
    if measure == 0 or count >= files.rows:
        return None, set(draw.sample(range(files.rows), min(rows, files.rows)))
    chosen = draw.sample(range(files.rows), count)
    return sorted(chosen), set(chosen[:rows])
