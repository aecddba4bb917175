"""The page of `qwen-merge data show SET`: markup, charts and small pictures. Everything else goes through `text`."""

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_merge.data.check_rows import Picture
from qwen_merge.data.check_summary import STEPS, Histogram
from qwen_merge.report.page import text

if TYPE_CHECKING:
    from qwen_merge.data.show import Look, Shown

PAGE = Path(__file__).with_name("show.html")
THUMBNAIL = 300  # pixels, the longer side
PICTURES = 4  # shown of a row
SHOWN = 6000  # characters of a message; the set has the rest


def render(look: "Look") -> str:
    """The whole page."""
    sections = {"HEAD": _head(look), "CHARTS": _charts(look), "COUNTS": _counts(look), "ROWS": _rows(look)}
    # One pass: a text that holds a marker must not be replaced in turn.
    return re.sub(r"<!-- ([A-Z]+) -->", lambda found: sections[found[1]], PAGE.read_text(encoding="utf-8"))


def _head(look: "Look") -> str:
    files, summary = look.files, look.summary
    facts = {"place": files.place, "rows": f"{files.rows:,}", "shards": f"{len(files.shards)}, {_size(files.bytes)}"}
    if look.recipe and look.arguments:
        data, model = look.arguments.data, look.arguments.model
        facts["counted with"] = (
            f"{look.recipe}: template {data.template}, cutoff_len {data.cutoff_len}, image_max_pixels "
            f"{model.image_max_pixels}, tokenizer {model.model_name_or_path}"
        )
    if look.uncounted:
        facts["token counts"] = f"none: {look.uncounted}"
    whole = "all of them" if summary.rows.rows_in == files.rows else f"drawn with seed {look.seed}"
    facts["measured"] = f"{summary.rows.rows_in:,} rows, {whole}"
    warnings = [*files.problems, *files.notes]
    for counts in (summary.rows, summary.stops):
        for reason, entry in sorted(counts.drops.items()):
            effect = "left out by LLaMA-Factory" if counts is summary.rows else "would stop a training"
            rows = "1 measured row" if entry["rows"] == 1 else f"{entry['rows']:,} measured rows"
            warnings.append(f"{rows} {effect}: {reason} ({'; '.join(entry['examples'])})")
    lines = "".join(f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in facts.items())
    said = "".join(f'<p class="warning">{text(warning)}</p>' for warning in warnings)
    return f'<h1>{text(files.name)}</h1><table class="facts">{lines}</table>{said}'


def _charts(look: "Look") -> str:
    summary = look.summary
    cutoff = look.arguments.data.cutoff_len if look.arguments else None
    cap = look.arguments.model.image_max_pixels if look.arguments else None
    over = f", {summary.over:,} over cutoff_len" if summary.full.count else ""
    charts = [
        (f"tokens a row{over}", summary.full, cutoff),
        ("characters a row", summary.characters, None),
        ("pixels a picture", summary.pixels, cap),
        ("width of a picture", summary.widths, None),
        ("height of a picture", summary.heights, None),
    ]
    figures = [_chart(title, values, mark) for title, values, mark in charts if values.count]
    formats = sorted(summary.formats.items(), key=lambda entry: -entry[1])
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in formats)
    pictures = f"<p class='legend'>Pictures by format and mode: {text(kinds)}.</p>" if kinds else ""
    return (
        "<h2>Lengths and sizes</h2><p class='legend'>Of the measured rows; the axes are logarithmic. Dashed: "
        "cutoff_len, image_max_pixels. Tokens are counted before the cut.</p>"
        f"<div class='charts'>{''.join(figures)}</div>{pictures}"
    )


def _chart(title: str, values: Histogram, mark: int | None) -> str:
    facts = f"median {values.quantile(0.5):,}, mean {values.mean:,.0f}, 95 % below {values.quantile(0.95):,}"
    facts += f", {values.least:,} to {values.most:,}"
    caption = f"<figcaption><b>{text(title)}</b><small>{facts}</small></figcaption>"
    return f"<figure>{caption}{bars(values, title, mark)}</figure>"


def bars(values: Histogram, title: str, mark: int | None = None) -> str:
    """A histogram over half octaves as SVG; `mark` is a dashed line where it lies within the range."""
    width, height, bottom = 320, 96, 16
    half = STEPS // 2
    stacks: dict[int, int] = {}
    for place, count in values.bins.items():
        index = place // half if place >= 0 else -1
        stacks[index] = stacks.get(index, 0) + count
    first, last = min(stacks), max(stacks)
    step = width / (last - first + 1)
    most = max(stacks.values())
    parts = []
    for index, count in stacks.items():
        tall = max(count / most * (height - bottom - 4), 0.8)  # a single row among millions is seen too
        parts.append(
            f'<rect class="bar" x="{(index - first) * step + 0.5:.1f}" y="{height - bottom - tall:.1f}" '
            f'width="{max(step - 1, 1):.1f}" height="{tall:.1f}"><title>{_range(index)}: {count:,}</title></rect>'
        )
    labels = [index for index in range(first, last + 1) if index % 2 == 0] or [first]
    for index in labels[:: -(-len(labels) // 7)]:
        x = (index - first) * step
        anchor = "start" if x < 12 else "end" if x > width - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - 4}" text-anchor="{anchor}">{_short(2 ** (index / 2))}</text>')
    if mark:
        x = (2 * math.log2(mark) - first) * step
        if 0 <= x <= width:
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - bottom}"/>')
    label = f'role="img" aria-label="number by {text(title)}"'
    return f'<svg viewBox="0 0 {width} {height}" {label}>{"".join(parts)}</svg>'


def _range(index: int) -> str:
    return "0" if index < 0 else f"{2 ** (index / 2):,.0f} to {2 ** ((index + 1) / 2):,.0f}"


def _short(value: float) -> str:
    for unit, name in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if value >= unit:
            return f"{value / unit:.0f}{name}"
    return f"{value:.0f}"


def _size(count: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def _counts(look: "Look") -> str:
    manifest = look.files.manifest
    if manifest is None:
        return "<h2>Where the rows came from</h2><p class='legend'>There is no manifest beside this set.</p>"
    counts = manifest.counts
    facts: dict[str, Any] = {"source": manifest.source, "revision": manifest.revision, "seed": manifest.seed}
    facts |= {"options": manifest.options, "versions": manifest.versions}
    facts |= {key: value for key, value in manifest.extra.items() if value not in (None, {}, [], "")}
    lines = "".join(f"<tr><th>{text(key)}</th><td>{_value(value)}</td></tr>" for key, value in facts.items())
    drops = [
        f"<tr><td>rows in</td><td class='number'>{counts.rows_in:,}</td><td></td></tr>",
        f"<tr><td>rows out</td><td class='number'>{counts.rows_out:,}</td><td></td></tr>",
    ]
    for reason, entry in sorted(counts.drops.items(), key=lambda item: -item[1]["rows"]):
        examples = "".join(f"<li>{text(example)}</li>" for example in entry["examples"])
        drops.append(
            f"<tr><td>dropped: {text(reason)}</td><td class='number'>{entry['rows']:,}</td>"
            f"<td><ul>{examples}</ul></td></tr>"
        )
    return (
        "<h2>Where the rows came from</h2><p class='legend'>What the manifest recorded when the set was made.</p>"
        f"<div class='wide'><table class='drops'><thead><tr><th></th><th class='number'>rows</th><th>examples</th></tr>"
        f"</thead><tbody>{''.join(drops)}</tbody></table></div><table class='facts'>{lines}</table>"
    )


def _value(value: Any) -> str:
    return _cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 2000)


def _rows(look: "Look") -> str:
    articles = "\n".join(_row(shown, look) for shown in look.shown)
    return (
        f"<h2>{len(look.shown)} rows, drawn with seed {look.seed}</h2><p class='legend'>Texts as they are stored, "
        "<code>&lt;image&gt;</code> where a picture goes. Pictures small, but as training sees them: the first frame, "
        "not turned by EXIF, transparency dropped.</p>" + articles
    )


def _row(shown: "Shown", look: "Look") -> str:
    row, names = shown.row, look.files.attributes
    facts = ""
    if row.tokens is not None and row.full is not None:
        cut = f", cut from {row.full:,}" if row.full != row.tokens else ""
        facts = f"{row.tokens:,} tokens{cut}, {row.trained:,} with loss, {row.picture_tokens:,} of pictures"
    problems = "".join(f'<p class="warning">{text(reason)}: {text(seen)}</p>' for reason, seen in row.problems)
    given = shown.example.get(names.images) if names.images else None
    pictures = _pictures(given if isinstance(given, list) else [], row.pictures)
    return (
        f"<article><h3>{text(shown.place)} <small>{facts}</small></h3>{problems}{pictures}"
        f"{''.join(_turns(shown.example, names))}</article>"
    )


def _turns(example: dict, names: Any) -> list[str]:
    if names.formatting == "sharegpt":
        turns = [(turn[names.role_tag], turn[names.content_tag]) for turn in example[names.messages] or []]
    else:
        turns = [(name, example[name]) for name in (names.prompt, names.query, names.response) if name]
    parts = []
    for role, content in turns:
        kind = "turn answer" if role in (names.assistant_tag, names.response) else "turn"
        parts.append(f'<div class="{kind}"><small>{text(role)}</small><pre>{_cut(str(content))}</pre></div>')
    return parts


def _cut(long: str, limit: int = SHOWN) -> str:
    if len(long) <= limit:
        return text(long)
    half = limit // 2
    return text(f"{long[:half]}\n[… {len(long) - limit} characters left out …]\n{long[-half:]}")


def _pictures(given: list, measured: list[Picture]) -> str:
    # Sizes are only there for those that decoded; with a broken one among them they cannot be told apart.
    sizes: list[Picture | None] = list(measured) if len(measured) == len(given) else [None] * len(given)
    parts = []
    for value, size in list(zip(given, sizes, strict=True))[:PICTURES]:
        said = f"{size.width} × {size.height} {size.format} {size.mode}, {_size(size.bytes)}" if size else ""
        parts.append(f"<figure>{thumbnail(value)}<figcaption><small>{text(said)}</small></figcaption></figure>")
    if len(given) > PICTURES:
        parts.append(f"<small>and {len(given) - PICTURES} more pictures</small>")
    return f"<div class='pictures'>{''.join(parts)}</div>" if parts else ""


def thumbnail(value: Any) -> str:
    """A stored picture, encoded anew and small: neither the file's size nor its metadata comes along."""
    from PIL import Image

    data = value.get("bytes") if isinstance(value, dict) else None
    path = value.get("path") if isinstance(value, dict) else value
    try:
        with Image.open(io.BytesIO(data) if data is not None else str(path)) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
    except Exception:  # a broken picture raises whatever its decoder stumbles over, and is no reason for no page
        return "<small class='warning'>picture not readable</small>"
    encoded = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="data:image/jpeg;base64,{encoded}" {size} alt="the picture">'
