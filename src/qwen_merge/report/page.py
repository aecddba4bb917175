"""The page: one HTML file that fetches nothing and runs nothing.

Answers, questions and names are other people's text. Everything goes through `text`, which escapes; markup is only
what stands in this module, `charts.py` and `page.html`. A content policy in the page forbids scripts and requests, so
that a mistake here would still load nothing.
"""

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from qwen_merge.report.charts import bins, histogram, loss_chart
from qwen_merge.report.losses import Training
from qwen_merge.report.responses import Answer, Key, choose, full_text, lengths, thought_of
from qwen_merge.report.table import Cell, Column, Table, count_of, note_of

PAGE = Path(__file__).with_name("page.html")
THUMBNAIL = 300  # pixels, the longer side
PICTURES = 4  # a question
FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
SHOWN = 6000  # characters of an answer or thought; the file has the rest


def render(table: Table, trainings: Sequence[Training], samples: int, seed: int) -> str:
    """The whole page.

    Raises:
        UserError: never; what cannot be read was refused when it was read.
    """
    columns = [column for column in table.columns if column.answers]
    sections = {
        "RESULTS": _results(table) if table.columns else "",
        "CURVES": _curves(trainings) if trainings else "",
        "LENGTHS": _lengths(columns) if columns else "",
        "SAMPLES": _samples(columns, samples, seed) if columns and samples > 0 else "",
    }
    # One pass: an answer that holds a marker must not be replaced in turn.
    return re.sub(r"<!-- ([A-Z]+) -->", lambda found: sections[found[1]], PAGE.read_text(encoding="utf-8"))


def text(value: object) -> str:
    """Escaped, and without the control characters HTML forbids and direction marks that would reorder the page."""
    kept = FORBIDDEN.sub("\ufffd", str(value))
    return html.escape(kept)


def name(value: str) -> str:
    """A name in a narrow column breaks after an underscore rather than within a word."""
    return text(value).replace("_", "_<wbr>")


def _results(table: Table) -> str:
    notes = table.notes()
    heads = []
    for column in table.columns:
        warnings = "".join(f'<small class="warning">{text(warning)}</small>' for warning in column.warnings)
        heads.append(f"<th>{name(column.label)}{warnings}</th>")
    heads += [f'<th class="low">{name(model)}<small>published</small></th>' for model in table.published]
    lines = [f"<thead><tr><th>task</th>{''.join(heads)}</tr></thead><tbody>"]
    for row in table.rows:
        cells = [_cell(cell, notes) for cell in row.cells]
        cells += [f'<td class="low">{"" if value is None else f"{value:.2f}"}</td>' for value in row.published]
        lines.append(f"<tr><th>{name(row.name)}</th>{''.join(cells)}</tr>")
    conditions = "".join(f"<li><b>{letter}</b> {text(said)}</li>" for letter, said in table.conditions.items())
    numbered = "".join(f"<li><b>{number}</b> {text(said)}</li>" for said, number in notes.items())
    remarks = "".join(f"<li>{text(remark)}</li>" for remark in table.remarks)
    return f"""<h2>Results, in percent</h2>
<p class="legend"><span class="good">+</span> and <span class="bad">−</span>: difference to the published number of the
same size, made with the published settings. <span class="low">(in parentheses)</span>: not comparable, the note says
why. Small: number of answers, and how many of them never closed their thought (open), which score as empty. Raised:
settings (letter) and note (number), both below.</p>
<div class="wide"><table class="numbers results">{"".join(lines)}</tbody></table></div>
<h3>Settings</h3><ul class="notes">{conditions}</ul>
<h3>Notes</h3><ul class="notes">{numbered}</ul><ul class="notes">{remarks}</ul>"""


def _cell(cell: Cell | None, notes: dict[str, int]) -> str:
    if cell is None:
        return "<td></td>"
    difference = ""
    if cell.shown_difference:
        if cell.comparable:
            mark = "good" if cell.difference and cell.difference > 0 else "bad" if cell.difference else ""
            difference = f'<span class="difference {mark}">{cell.shown_difference}</span>'
        else:
            difference = f'<span class="difference low">({cell.shown_difference})</span>'
    kind = ' class="warning"' if cell.unclosed else ""
    count = f"<small{kind}>{count_of(cell)}</small>"
    marks = f"<sup>{cell.condition} {notes[note_of(cell)]}</sup>"
    return f'<td><span class="value">{cell.shown}</span>{marks} {difference}{count}</td>'


def _curves(trainings: Sequence[Training]) -> str:
    figures = []
    for training in trainings:
        facts = [f"last logged loss {training.losses[-1][1]:.4g}"]
        done = training.losses[-1][0]
        facts.append(f"{done} of {training.total_steps} steps" if training.total_steps else f"{done} steps")
        if training.runtime:
            facts.append(f"time {training.runtime}")
        warning = f"{training.not_finite} logged losses are no numbers" if training.not_finite else ""
        figures.append(
            f"<figure><figcaption><b>{text(training.label)}</b><small>{text(', '.join(facts))}</small>"
            f'<small class="bad">{warning}</small></figcaption>{loss_chart(training)}</figure>'
        )
    return (
        "<h2>Training loss</h2><p class='legend'>Thin: as logged; bold: smoothed; below: learning rate; over steps. "
        "The loss axis is logarithmic where the loss falls by more than a factor of five.</p>"
        f"<div class='stages'>{''.join(figures)}</div>"
    )


def _lengths(columns: Sequence[Column]) -> str:
    """What each run's answers measure, and how they differ on the questions that two runs share."""
    everything = [
        answer.tokens for column in columns for answer in column.answers.values() if answer.tokens is not None
    ]
    edges = bins(everything) if everything else []
    lines = [
        "<thead><tr><th>run</th><th>answers</th><th>mean tokens</th><th>median</th><th>p95</th>"
        "<th>mean thought</th><th>median</th><th>p95</th><th>open thoughts</th><th class='picture'>answers by tokens"
        "</th></tr></thead><tbody>"
    ]
    for column in columns:
        answers = list(column.answers.values())
        chart = ""
        if edges:
            closed = [a.tokens for a in answers if a.tokens is not None and a.closed is not False]
            unclosed = [a.tokens for a in answers if a.tokens is not None and a.closed is False]
            chart = histogram(closed, unclosed, edges)
        lines.append(
            f"<tr><th>{text(column.label)}</th><td>{len(answers)}</td>{_measures(answers)}"
            f"<td class='picture'>{chart}</td></tr>"
        )
    body = f'<div class="wide"><table class="numbers">{"".join(lines)}</tbody></table></div>'
    return (
        "<h2>Length of the answers</h2><p class='legend'>In tokens, thoughts included; "
        "<span class='open'>■</span> thoughts that never closed (scored as empty).</p>" + body + _changes(columns)
    )


def _measures(answers: Sequence[Answer]) -> str:
    cells = []
    for measured in (lengths(a.tokens for a in answers), lengths(a.thought_tokens for a in answers)):
        values = (measured.mean, measured.median, measured.p95) if measured else (None,) * 3
        cells += [f"<td>{'—' if value is None else f'{value:.1f}'}</td>" for value in values]
    open_ = sum(answer.closed is False for answer in answers)
    return "".join(cells) + f"<td>{100 * open_ / len(answers):.1f}% <small>{open_} of {len(answers)}</small></td>"


def _changes(columns: Sequence[Column]) -> str:
    """Each run against the first, question by question: averages over different questions would say nothing."""
    lines = []
    first = columns[0].answers
    for column in columns[1:]:
        second = column.answers
        shared = sorted(first.keys() & second.keys())
        label = f"<th>{text(column.label)} − {text(columns[0].label)}</th>"
        if not shared:
            lines.append(f"<tr>{label}<td>0</td><td colspan='6'>no question in common</td></tr>")
            continue
        before, after = [first[key] for key in shared], [second[key] for key in shared]
        cells = []
        for part in ("tokens", "thought_tokens"):
            pairs = [
                (getattr(old, part), getattr(new, part))
                for old, new in zip(before, after, strict=True)
                if getattr(old, part) is not None and getattr(new, part) is not None
            ]
            old, new = lengths(pair[0] for pair in pairs), lengths(pair[1] for pair in pairs)
            changes = (new.mean - old.mean, new.median - old.median, new.p95 - old.p95) if old and new else (None,) * 3
            cells += [f"<td>{'—' if change is None else signed(change)}</td>" for change in changes]
        share = 100 * (sum(a.closed is False for a in after) - sum(a.closed is False for a in before)) / len(shared)
        lines.append(f"<tr>{label}<td>{len(shared)}</td>{''.join(cells)}<td>{signed(share)} points</td></tr>")
    if not lines:
        return ""
    head = (
        "<thead><tr><th>change</th><th>shared questions</th><th>mean tokens</th><th>median</th><th>p95</th>"
        "<th>mean thought</th><th>median</th><th>p95</th><th>open thoughts</th></tr></thead>"
    )
    unequal = _unequal_limits(columns)
    return f'<div class="wide"><table class="numbers">{head}<tbody>{"".join(lines)}</tbody></table></div>{unequal}'


def _unequal_limits(columns: Sequence[Column]) -> str:
    """Sampling and limits change lengths too: a change between unequal settings is not the training's."""
    seen: dict[str, set[str]] = {}
    for column in columns:
        for evaluation in column.evaluations:
            settings = evaluation.settings["settings"] if evaluation.settings else {}
            for key in ("min_pixels", "max_pixels", "max_new_tokens", "temperature", "top_p", "top_k", "thinking"):
                seen.setdefault(key, set()).add(str(settings.get(key, "unknown")))
    unequal = [f"{key} ({', '.join(sorted(values))})" for key, values in seen.items() if len(values) > 1]
    if not unequal:
        return ""
    return f'<p class="warning">The runs were asked under unequal settings: {text("; ".join(unequal))}.</p>'


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _samples(columns: Sequence[Column], samples: int, seed: int) -> str:
    answers = [column.answers for column in columns]
    chosen = choose(answers, samples, seed)
    if not chosen:
        said = "No question was answered by two runs." if len(columns) > 1 else "There is one run only."
        return f"<h2>Answers side by side</h2><p>{said}</p>"
    articles = [_question(key, columns, answers) for key in chosen]
    return (
        "<h2>Answers side by side</h2><p class='legend'>Questions whose answers differ come first, the data sets in "
        f"turn, chosen with seed {seed}.</p>" + "\n".join(articles)
    )


def _question(key: Key, columns: Sequence[Column], answers: Sequence[dict[Key, Answer]]) -> str:
    cards, question, pictures = [], None, ""
    for column, given in zip(columns, answers, strict=True):
        if key not in given:
            continue
        entry = full_text(given[key])
        if question is None:
            question = entry.get("question") or ""
        pictures = pictures or _pictures(entry, given[key].file.parent)
        thought = thought_of(entry)
        folded = f"<details><summary>thought</summary><pre>{_cut(thought)}</pre></details>" if thought else ""
        closed = given[key].closed
        open_ = '<small class="warning">thought never closed: scored as empty</small>' if closed is False else ""
        tokens = f" <small>{given[key].tokens} tokens</small>" if given[key].tokens is not None else ""
        answer = str(entry.get("answer") or "")
        said = f"<pre>{_cut(answer)}</pre>" if answer.strip() else "<p class='low'>(empty)</p>"
        cards.append(f"<div class='card'><h4>{text(column.label)}{tokens}</h4>{open_}{folded}{said}</div>")
    return (
        f"<article><h3>{text(key[0])} <small>{text(key[1][:12])}</small></h3><div class='asked'>{pictures}"
        f"<pre>{_cut(str(question))}</pre></div><div class='cards'>{''.join(cards)}</div></article>"
    )


def _cut(long: str) -> str:
    if len(long) <= SHOWN:
        return text(long)
    half = SHOWN // 2
    return text(f"{long[:half]}\n[… {len(long) - SHOWN} characters left out …]\n{long[-half:]}")


def _pictures(entry: dict, folder: Path) -> str:
    images = entry.get("images")
    if not isinstance(images, list):
        return ""
    parts = [_thumbnail(folder / path) for path in images[:PICTURES] if isinstance(path, str)]
    if len(images) > PICTURES:
        parts.append(f"<small>and {len(images) - PICTURES} more pictures</small>")
    return f"<div class='pictures'>{''.join(parts)}</div>" if parts else ""


def _thumbnail(path: Path) -> str:
    """Encoded anew and small: neither the file's size nor its metadata comes along."""
    try:
        from PIL import Image
    except ImportError:
        return "<small>pictures need Pillow</small>"
    if not os.path.isfile(path):
        return "<small>picture not found</small>"
    try:
        with Image.open(path) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = image.convert("RGBA")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        flat = Image.new("RGB", small.size, "white")
        flat.paste(small, mask=small.getchannel("A"))
        buffer = io.BytesIO()
        flat.save(buffer, "JPEG", quality=82)
    except Exception:  # a broken picture raises whatever its decoder stumbles over, and is no reason for no page
        return "<small>picture not readable</small>"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{flat.width}" height="{flat.height}" alt="the picture">'
