"""One number out of a score file, in percent.

VLMEvalKit has a form for each kind of benchmark: multiple choice leaves fractions with a row a split (`report_acc`),
short answers leave percent in one row (`ImageVQADataset.evaluate`), judged answers leave a row a skill with `tot` and
`acc` (`MathVista_acc`, `MATH_V_acc`, `MMVet_acc`, `evaluate_logicvista`), and OCRBench leaves JSON. A form that is none
of them gives no number, rather than one on a guessed scale.
"""

import csv
import json
import math
from pathlib import Path

from qwen_merge.errors import UserError
from qwen_merge.report.published import Task

Scores = dict[str | None, float]  # split (None: the whole) to percent
SKILLS = ("Task&Skill", "Subject", "Category")  # how judged benchmarks head the column that has a row `Overall`


def read_score(file: Path, task: Task | None) -> tuple[Scores, int | None]:
    """(percent per split, number of questions where the file has it); nothing for a form that is not known.

    Raises:
        UserError: the file is broken, or a known task's file lacks its number.
    """
    column = task.column if task else "Overall"
    if file.suffix == ".json":
        values = read_json(file)
        if not isinstance(values, dict) or column not in values:
            return _missing(file, column, task)
        return {None: _finite(values[column], file, column)}, None
    rows = _read_csv(file)
    header = rows[0].keys() if rows else set()
    for label in SKILLS if task is None else (task.row[0],) if task.row else ():
        if {label, "acc"} <= header:
            return _skills(file, rows, label, task)
    if column not in header or (task and task.row):
        return _missing(file, column, task)
    if "split" in header:
        return _splits(file, rows, column, task), None
    return {None: _finite(rows[0][column], file, column)}, None


def _skills(file: Path, rows: list[dict[str, str]], label: str, task: Task | None) -> tuple[Scores, int | None]:
    overall = [row for row in rows if row[label] == "Overall"]
    if len(overall) != 1:
        return _missing(file, "row Overall", task)
    total = overall[0].get("tot") or ""
    return {None: _finite(overall[0]["acc"], file, "acc")}, int(total) if total.isdigit() else None


def _splits(file: Path, rows: list[dict[str, str]], column: str, task: Task | None) -> Scores:
    fractions = {row["split"]: _finite(row[column], file, column) for row in rows}
    if any(not 0 <= fraction <= 1 for fraction in fractions.values()):
        if task is None:
            return {}  # another form, on a scale of its own
        raise UserError(f"{file} has an {column} outside 0 to 1, which VLMEvalKit does not write. Evaluate it again.")
    if len(fractions) == 1 and (task is None or task.split is None):
        return {None: 100 * next(iter(fractions.values()))}
    return {split: 100 * fraction for split, fraction in sorted(fractions.items())}


def _missing(file: Path, column: str, task: Task | None) -> tuple[Scores, int | None]:
    if task is None:
        return {}, None
    raise UserError(f"{file} has no {column}, where VLMEvalKit writes the number. Delete it and evaluate again.")


def read_json(file: Path) -> object:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}). Delete it and evaluate that data set again.") from None


def _read_csv(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not CSV ({error}). Delete it and evaluate that data set again.") from None


def _finite(value: object, file: Path, column: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{file}: {column} is {value!r}, expected a number. Delete it and evaluate that set again.")
    return number
