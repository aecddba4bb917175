"""The table as data, once: HTML and Markdown only dress it, so their numbers cannot differ.

Two rules decide what may stand where. Numbers of one column share everything but the data set: a model answering
some benchmarks at one resolution and some at another is two rows of a paper, not one. And a difference to a published
number counts only where the published settings were used.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qwen_merge.errors import UserError
from qwen_merge.report.published import CORRECTIONS, PUBLISHED, ROW_OF_SIZE, SETTINGS_OF_ROW, TASKS, Task
from qwen_merge.report.responses import Answer, Key
from qwen_merge.report.results import Evaluation, Run

ABSENT = "not stated"
SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z0-9])")


@dataclass
class Column:
    """Numbers of one run that may stand together."""

    run: Run
    evaluations: list[Evaluation]
    label: str = ""
    warnings: list[str] = field(default_factory=list)  # for the head of the column

    @property
    def answers(self) -> dict[Key, Answer]:
        return {key: answer for evaluation in self.evaluations for key, answer in evaluation.responses.items()}


@dataclass
class Cell:
    """One number with everything that must be said about it."""

    value: float | None
    difference: float | None = None  # to the published number of the same size
    comparable: bool = False
    notes: list[str] = field(default_factory=list)  # why it is not comparable
    condition: str = ""  # the letter of its settings
    answers: int | None = None
    unclosed: int | None = None
    judge: str = ""

    @property
    def shown(self) -> str:
        return "—" if self.value is None else f"{self.value:.2f}"

    @property
    def shown_difference(self) -> str:
        if self.difference is None:
            return ""
        return f"{self.difference:+.2f}".replace("-", "−")


@dataclass
class Row:
    name: str
    cells: list[Cell | None]
    published: list[float | None]


@dataclass
class Table:
    columns: list[Column]
    published: list[str]
    rows: list[Row]
    conditions: dict[str, str]  # letter to text
    remarks: tuple[str, ...] = CORRECTIONS

    def notes(self) -> dict[str, int]:
        """Text to number, in the order of the table."""
        texts = dict.fromkeys(note_of(cell) for row in self.rows for cell in row.cells if cell)
        return {text: number for number, text in enumerate(texts, start=1)}


def arrange(runs: list[Run], split: bool) -> list[Column]:
    """Columns of equal settings: one a run, or with `split` as many as it takes.

    Raises:
        UserError: a run has several settings and `split` is off; the message names each differing key.
    """
    columns, problems = [], []
    for run in runs:
        groups: list[Column] = []
        for evaluation in run.evaluations:
            for column in groups:
                if _together(column.evaluations, evaluation):
                    column.evaluations.append(evaluation)
                    break
            else:
                groups.append(Column(run, [evaluation], run.label))
        if len(groups) > 1:
            differing = _differing(groups)
            if not split:
                problems.append(f"{run.label}:" + "".join(f"\n      {line}" for line in differing))
            for number, column in enumerate(groups, start=1):
                column.label = f"{run.label} [{number}]"
        columns += groups
    if problems:
        raise UserError.from_list("numbers with different settings do not go into one column.", problems)
    return columns


def _together(present: list[Evaluation], new: Evaluation) -> bool:
    """Unknown settings cannot be shown to differ: such a number is marked where it stands. With known ones in the
    column, only the known are compared."""
    for old in present:
        if _identity_text(old) != _identity_text(new) and None not in (_identity_text(old), _identity_text(new)):
            return False
        if _judges_differ(old, new):
            return False
    return True


def _identity_text(evaluation: Evaluation) -> str | None:
    identity = evaluation.identity()
    return None if identity is None else json.dumps(identity, sort_keys=True, default=str)


def _judges_differ(one: Evaluation, other: Evaluation) -> bool:
    if one.judges is None or one.judges != other.judges:
        return False
    return None not in (one.judge, other.judge) and one.judge != other.judge


def _differing(groups: list[Column]) -> list[str]:
    """`key: value (data sets), value (data sets)`, a line a key."""
    evaluations = [evaluation for column in groups for evaluation in column.evaluations]
    known = [(evaluation, identity) for evaluation in evaluations if (identity := evaluation.identity()) is not None]
    lines = []
    for key in sorted({key for _, identity in known for key in identity}):
        line = _by_value((_text(identity.get(key)), evaluation.dataset) for evaluation, identity in known)
        if line:
            lines.append(f"{key}: {line}")
    for family in sorted({evaluation.judges for evaluation in evaluations if evaluation.judges}):
        judged = [e for e in evaluations if e.judges == family and e.judge is not None]
        line = _by_value((_text(evaluation.judge), evaluation.dataset) for evaluation in judged)
        if line:
            lines.append(f"judge: {line}")
    return [*lines, "Evaluate again with the same settings, or pass --split-by-settings for a column each."]


def _by_value(pairs: Iterable[tuple[str, str]]) -> str:
    by_value: dict[str, list[str]] = {}
    for value, dataset in pairs:
        by_value.setdefault(value, []).append(dataset)
    if len(by_value) < 2:
        return ""
    return "; ".join(f"{value} ({', '.join(datasets)})" for value, datasets in by_value.items())


def _text(value: object) -> str:
    return ABSENT if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def size_of(run: Run) -> str | None:
    """`4B`, from the model's name or else its path."""
    stated = [evaluation.settings.get("model_path") for evaluation in run.evaluations if evaluation.settings]
    for text in (run.model, *stated):
        if isinstance(text, str) and (found := SIZE.findall(text)):
            return f"{found[-1]}B"
    return None


def off_published(evaluation: Evaluation, published_row: str) -> list[str]:
    """Each way in which a number was not made as the published one; empty: it was."""
    wanted = SETTINGS_OF_ROW[published_row]
    if wanted is None:
        return [f"the settings of the published {published_row} are not stated"]
    identity = evaluation.identity()
    if identity is None:
        return ["settings unknown"]
    reasons = [
        f"{key} {_text(identity.get(key))}, published {_text(value)}"
        for key, value in wanted.items()
        if identity.get(key) != value
    ]
    task = evaluation.task
    if task and task.judges and task.published_judge and evaluation.judge != task.published_judge:
        reasons.append(f"judge {_text(evaluation.judge)}, published {task.published_judge}")
    if reasons:
        reasons[0] = f"not the published setting: {reasons[0]}"
    if task and task.judges and task.published_judge is None:
        reasons.append("the judge of the published number is unknown")
    return reasons


def build(columns: list[Column]) -> Table:
    letters: dict[str, str] = {}
    rows: dict[tuple[str, str | None], Row] = {}
    for position, column in enumerate(columns):
        reference = ROW_OF_SIZE.get(size_of(column.run) or "")
        for evaluation in column.evaluations:
            letter = _letter(letters, column, evaluation)
            numbers: Mapping[str | None, float | None] = evaluation.numbers or {_published_split(evaluation): None}
            for split, value in numbers.items():
                row = rows.setdefault((evaluation.dataset, split), _row(evaluation, split, len(columns)))
                row.cells[position] = _cell(evaluation, split, value, reference, letter)
        column.warnings = _warnings(column, reference)
    conditions = {letter: text for text, letter in letters.items()}
    if any(value is not None for row in rows.values() for value in row.published):
        return Table(columns, list(PUBLISHED), _ordered(rows), conditions)
    for row in rows.values():  # one's own tables only: nothing was published about them
        row.published = []
    return Table(columns, [], _ordered(rows), conditions, remarks=())


def _published_split(evaluation: Evaluation) -> str | None:
    return evaluation.task.split if evaluation.task else None


def _letter(letters: dict[str, str], column: Column, evaluation: Evaluation) -> str:
    identity = evaluation.identity()
    if identity is None:
        text = "settings unknown: there is no settings file beside the scores"
    else:
        text = ", ".join(f"{key} {_text(value)}" for key, value in identity.items() if value is not None)
    text = f"{column.label}: {text}"
    if text not in letters:
        number, letter = len(letters), ""
        while number >= 0:
            number, rest = divmod(number, 26)
            letter, number = chr(97 + rest) + letter, number - 1
        letters[text] = letter
    return letters[text]


def _row(evaluation: Evaluation, split: str | None, width: int) -> Row:
    task = evaluation.task
    name = task.name if task else evaluation.dataset
    if split is not None:
        name += f" [{split}]"
    is_published = task is not None and split == task.split
    published = [PUBLISHED[model][evaluation.dataset] if is_published else None for model in PUBLISHED]
    return Row(name, [None] * width, published)


def _ordered(rows: dict[tuple[str, str | None], Row]) -> list[Row]:
    order = {task.dataset: index for index, task in enumerate(TASKS)}
    last = len(order)
    ordered = sorted(rows, key=lambda at: (order.get(at[0], last), at[0] if at[0] not in order else "", at[1] or ""))
    return [rows[at] for at in ordered]


def _cell(evaluation: Evaluation, split: str | None, value: float | None, reference: str | None, letter: str) -> Cell:
    task = evaluation.task
    cell = Cell(value, condition=letter, answers=evaluation.answers, unclosed=evaluation.unclosed)
    cell.judge = _judge_text(evaluation, task)
    if value is None:
        cell.notes.append("answered, not scored")
        return cell
    if task is None or split != task.split:
        if task and task.split is None:
            cell.notes.append("the published number is not said to be this split")
        return cell
    if reference is None:
        cell.notes.append("no published model of this size")
        return cell
    cell.difference = value - PUBLISHED[reference][task.dataset]
    cell.notes += off_published(evaluation, reference)
    if task.questions and evaluation.answers is not None and evaluation.answers != task.questions:
        cell.notes.append(f"{evaluation.answers} of {task.questions} questions: not comparable")
    cell.comparable = not cell.notes
    return cell


def _judge_text(evaluation: Evaluation, task: Task | None) -> str:
    if task and task.judges is None:
        return "scored by rule"
    if evaluation.judge is None:
        return "judge unknown"
    if evaluation.judges == "options" and evaluation.judge != "exact_matching":
        # VLMEvalKit names files after the judge asked for, and matches exactly, with a warning, without a key for it.
        return f"judge {evaluation.judge} (exact matching, if there was no key for it)"
    return f"judge {evaluation.judge}"


def _warnings(column: Column, reference: str | None) -> list[str]:
    """What holds for the whole column belongs into its head, where nobody overlooks it."""
    if any(evaluation.settings is None for evaluation in column.evaluations):
        some = "" if all(evaluation.settings is None for evaluation in column.evaluations) else " for some numbers"
        warnings = [f"settings unknown{some}"]
    else:
        warnings = []
    wanted = SETTINGS_OF_ROW.get(reference or "")
    identities = [identity for evaluation in column.evaluations if (identity := evaluation.identity()) is not None]
    if wanted and identities:
        off = [
            f"{key} {_text(identities[0].get(key))}" for key, value in wanted.items() if identities[0].get(key) != value
        ]
        if off:
            warnings.append("not the published setting: " + ", ".join(off))
    return warnings


def note_of(cell: Cell) -> str:
    """What holds for many cells alike, and so becomes one numbered note: the judge, and why nothing is compared."""
    unknown = [] if cell.value is None or cell.unclosed is not None else ["open thoughts unknown: no answers file"]
    return "; ".join([cell.judge, *unknown, *cell.notes])


def count_of(cell: Cell) -> str:
    """`1500, 12 open`: answers, and those whose thought never closed, which score as empty."""
    if cell.answers is None:
        return ""
    return f"{cell.answers}, {cell.unclosed} open" if cell.unclosed else str(cell.answers)
