"""A question as a PNG picture: stage 3's "text to picture" set asks the model to read the question before it answers.

Why: the original draws one constant sentence on a fixed canvas that cuts what does not fit. Here the question itself is
drawn, the picture grows with it, and face, size, spacing, width and colours vary around its 600 pixels and 24-pixel
text, seeded by the question: the same text and seed give the same bytes in every process. `qwen-merge data text2image
convert` runs it.

A question is refused (CannotDraw, whose `reason` is counted) if a character of it cannot be drawn, or if training
would shrink its letters below MIN_TEXT pixels: pictures over `image_max_pixels` are downscaled, and a picture nobody
can read teaches guessing. Pictures are RGB, not the smaller palette form: LLaMA-Factory resizes before it converts,
and Pillow resizes palette pictures without smoothing.
"""

import functools
import hashlib
import io
import math
import random
import unicodedata
from dataclasses import dataclass

from PIL import Image, ImageDraw

from qwen_merge.data.render.colours import Colour, contrast, pick, web
from qwen_merge.data.render.fonts import STYLES, Style, load
from qwen_merge.data.render.layout import Line, Run, lay_out
from qwen_merge.data.render.text import CannotDraw, is_wide

__all__ = ["CannotDraw", "Rendered", "render"]

WIDTH, SIZES = 600, (18, 20, 22, 24, 24, 26, 28, 30)
TRAINING_PIXELS = 262_144  # image_max_pixels of the recipes
MIN_TEXT = 10.0  # pixels an em must keep in training; ideographs below that are blots
# A third smaller and faster than zlib's default level on all 256 steps of smoothing, and no eye tells them apart.
_COMPRESSION = 3
_STEPS = [round(cover / 17) * 17 for cover in range(256)]


@dataclass(frozen=True)
class Rendered:
    """A drawn question and how it was drawn.

    Colours are #rrggbb, sizes pixels; `text_size` is an em as drawn, `training_text_size` what is left of it once
    training has capped the picture.
    """

    png: bytes
    width: int
    height: int
    font: str
    foreground: str
    background: str
    contrast: float
    text_size: int
    training_text_size: float
    lines: int


@dataclass(frozen=True)
class _Look:
    """What is drawn by lot for one question."""

    style: Style
    size: int
    width: int
    margin: int
    pitch: int  # baseline to baseline
    gap: int  # more of it before each new line of the text
    ink: Colour
    paper: Colour


def render(
    text: str,
    seed: int = 0,
    fonts: str = "mplfonts",
    max_pixels: int = TRAINING_PIXELS,
    min_text: float = MIN_TEXT,
) -> Rendered:
    """Draw a question.

    Args:
        text: any Unicode; lines are kept, fenced code is set in a monospaced face.
        seed: another seed, another look.
        fonts: "mplfonts", or "debian" for the packages fonts-noto-cjk and fonts-dejavu-core.
        max_pixels: the size in pixels above which training downscales a picture.
        min_text: pixels that an em must keep after that; 0 draws texts of any length.

    Raises:
        CannotDraw: see the module.
        UserError: the fonts' packages are not installed.
    """
    look = _look(text, seed, frozenset(load(fonts)))
    # Of the picture's pixels so many may be there before an em shrinks below the least: (size / min_text)² × the cap.
    most = max_pixels * (look.size / min_text) ** 2 if min_text else math.inf
    if len(text) * 0.2 * look.size * look.pitch > most:  # no glyph with ink is narrower on average: spares the layout
        raise CannotDraw("too long to be read", detail=f"{len(text)} characters")
    inner = look.width - 2 * look.margin
    lines = lay_out(text, look.style, look.size, inner, most / look.width / look.pitch, fonts)
    mask = _draw(lines, look)
    factor = min(1.0, math.sqrt(max_pixels / (mask.width * mask.height)))
    if look.size * factor < min_text:
        raise CannotDraw("too long to be read", detail=f"{look.size * factor:.1f} pixels high in training")
    png = io.BytesIO()
    _coloured(mask, look.ink, look.paper).save(png, "PNG", compress_level=_COMPRESSION)
    return Rendered(
        png=png.getvalue(),
        width=mask.width,
        height=mask.height,
        font=look.style.name,
        foreground=web(look.ink),
        background=web(look.paper),
        contrast=contrast(look.ink, look.paper),
        text_size=look.size,
        training_text_size=look.size * factor,
        lines=len(lines),
    )


def _look(text: str, seed: int, faces: frozenset[str]) -> _Look:
    """By lot, from the text and the seed alone. Only rng.random() is used: Python promises its sequence."""
    digest = hashlib.sha256(f"{seed}\n".encode() + text.encode("utf-8", "surrogatepass")).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    has_cjk = any(is_wide(character) for character in text)
    usable = [style for style in STYLES if (style.cjk or not has_cjk) and {style.narrow, style.wide} <= faces]
    styles = [style for style in usable for _ in range(style.weight)]
    style = styles[int(rng.random() * len(styles))]
    size = SIZES[int(rng.random() * len(SIZES))]
    width = round(WIDTH * (0.8 + 0.4 * rng.random()))
    margin = round(size * (0.7 + 0.9 * rng.random()))
    pitch = round(size * (1.3 + 0.4 * rng.random()))
    gap = round(size * 0.5 * rng.random())
    return _Look(style, size, width, margin, pitch, gap, *pick(rng))


def _draw(lines: list[Line], look: _Look) -> Image.Image:
    """The text's coverage, 0 to 255, with the margin around it, and more where ink reaches out of its line."""
    baselines, y = [], 0
    for number, line in enumerate(lines):
        y += 0 if number == 0 else look.pitch + (look.gap if line.begins else 0)
        baselines.append(y)
    inner, above, below = look.width - 2 * look.margin, look.size, round(0.25 * look.size)
    slack = 2 * look.size
    while True:
        mask = Image.new("L", (inner + 2 * slack, above + y + below + 2 * slack))
        canvas = ImageDraw.Draw(mask)
        for baseline, line in zip(baselines, lines, strict=True):
            for run in line.runs:
                for at, up, text in _glyphs(run, look.size):
                    place = (slack + at, slack + above + baseline + up)
                    canvas.text(place, text, fill=255, font=run.face.at(look.size), anchor="ls")
        left, top, right, bottom = mask.getbbox() or (slack, slack, slack, slack)
        if min(left, top, mask.width - right, mask.height - bottom) > 0:
            break
        slack *= 2  # ink at the edge: there may be more beyond it (stacked accents, a glyph wider than the line)
    left, right = min(left, slack), max(right, slack + inner)
    top, bottom = min(top, slack), max(bottom, mask.height - slack)
    margin = look.margin
    return mask.crop((left - margin, top - margin, right + margin, bottom + margin))


def _glyphs(run: Run, size: int) -> list[tuple[int, int, str]]:
    """What to draw for a run: x and y of the origin from the line's start and baseline, and characters."""
    if not run.marked:
        return [(run.x, 0, run.text)]
    drawn = [(run.x, 0, run.text[0])]
    # A mark alone is placed as if it were on a small letter.
    base = run.face.ink(run.text[0], size) or (0, -size // 2, size // 2, 0)
    highest, lowest, space = base[1], base[3], max(1, round(0.06 * size))
    for mark in run.text[1:]:
        box = run.face.ink(mark, size)
        if box is None:
            continue  # a mark without ink: a joiner of marks
        # Over or under the base's middle, whatever place the font gives it, and clear of what is there already.
        x = run.x + (base[0] + base[2] - box[0] - box[2]) // 2
        y, position = 0, unicodedata.combining(mark)
        if position in (228, 230, 232, 234):
            y = min(0, highest - space - box[3])
            highest = y + box[1]
        elif position in (202, 218, 220, 222, 233):
            y = max(0, lowest + space - box[1])
            lowest = y + box[3]
        elif position == 1:  # a stroke through the base
            y = (base[1] + base[3] - box[1] - box[3]) // 2
        drawn.append((x, y, mark))
    return drawn


def _coloured(mask: Image.Image, ink: Colour, paper: Colour) -> Image.Image:
    """Ink where the mask is 255, paper where it is 0, and steps between them on the edges of the letters."""
    return Image.merge("RGB", [mask.point(_ramp(one, other)) for one, other in zip(paper, ink, strict=True)])


@functools.lru_cache(maxsize=1 << 12)
def _ramp(paper: int, ink: int) -> list[int]:
    return [(paper * (255 - step) + ink * step + 127) // 255 for step in _STEPS]
