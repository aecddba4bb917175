"""The table of results for a README or a pull request, with the same numbers and notes as the page."""

import re

from qwen_merge.report.table import Cell, Table, count_of, note_of

LEGEND = (
    "A signed difference is to the published number of the same size, made with the published settings; one in "
    "parentheses is not comparable, for the reason its note gives. Letters: settings. Numbers in brackets: notes.",
    "Answers: how many there were, and how many of them never closed their thought (open), which score as empty.",
)


def markdown(table: Table) -> str:
    """The whole file."""
    notes = table.notes()
    labels = [_escaped(column.label) for column in table.columns]
    lines = _head([*labels, *(f"{name} (published)" for name in table.published)])
    for row in table.rows:
        cells = [_cell(cell, notes) for cell in row.cells]
        cells += ["" if value is None else f"{value:.2f}" for value in row.published]
        lines.append(f"| {_escaped(row.name)} | " + " | ".join(cells) + " |")
    lines += ["", *_head([f"{label}, answers" for label in labels])]
    for row in table.rows:
        counts = ["" if cell is None else count_of(cell) or "unknown" for cell in row.cells]
        lines.append(f"| {_escaped(row.name)} | " + " | ".join(counts) + " |")
    lines.append("")
    for column in table.columns:
        lines += [f"- {_escaped(column.label)}: {_escaped(warning)}" for warning in column.warnings]
    lines += [f"- ({letter}) {_escaped(text)}" for letter, text in table.conditions.items()]
    lines += [f"- [{number}] {_escaped(text)}" for text, number in notes.items()]
    lines += [f"- {_escaped(remark)}" for remark in (*table.remarks, *LEGEND)]
    return "\n".join(lines) + "\n"


def _head(heads: list[str]) -> list[str]:
    return ["| task | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]


def _cell(cell: Cell | None, notes: dict[str, int]) -> str:
    if cell is None:
        return ""
    text = cell.shown
    if cell.shown_difference:
        text += f" {cell.shown_difference}" if cell.comparable else f" ({cell.shown_difference})"
    return f"{text} ({cell.condition})[{notes[note_of(cell)]}]"


def _escaped(text: str) -> str:
    """Names come from folders and files: nothing in them may end a cell or begin a tag."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\r", " ").replace("\n", " ")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", text)
