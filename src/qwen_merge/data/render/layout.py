"""From a text to lines of runs: which face draws which character, and where lines end.

Why: Pillow draws one string with one font and breaks no lines. Here every character gets a face that has it, runs of
one face share a baseline, and lines end where a typesetter would end them: Latin at spaces and hyphens, CJK anywhere
but before closing and after opening punctuation (kinsoku), a word longer than a line preferably after a sign. Fenced
code is set in a monospaced face and keeps its columns. No character but the spaces at a line's end is left out.
"""

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

from qwen_merge.data.render.fonts import STYLES, Face, Style, load
from qwen_merge.data.render.text import NO_END, NO_START, CannotDraw, clean_lines, clusters, is_wide, quotes_and_dashes

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_AFTER_SIGN = frozenset("/\\-_=+&?,;.)]}|:*^<>")  # where a word longer than a line is cut, if it has one of them


class _Item(NamedTuple):
    """One cluster and what line breaking needs to know of it."""

    text: str
    face: Face
    wide: bool
    space: bool
    no_start: bool
    no_end: bool


@dataclass(frozen=True)
class Run:
    """Characters drawn in one go with their origin `x` pixels from the line's start. `marked`: one character and the
    marks on it, which are placed one by one."""

    text: str
    face: Face
    x: int
    marked: bool = False


@dataclass(frozen=True)
class Line:
    """`begins`: it is the first of a line of the text; the following ones, up to the next such, were wrapped."""

    runs: tuple[Run, ...]
    width: int
    code: bool
    begins: bool

    @property
    def text(self) -> str:
        """What is drawn."""
        return "".join(run.text for run in self.runs)


def lay_out(
    text: str, style: Style, size: int, width: int, max_lines: float = float("inf"), fonts: str = "mplfonts"
) -> list[Line]:
    """The text as lines at most `width` pixels wide, drawn with an em of `size` pixels.

    Returns:
        the lines; a blank one has no runs. A single glyph wider than `width` stays alone on its line.

    Raises:
        CannotDraw: characters no face has or that need shaping (all of them, in their order); no ink at all; more
            than `max_lines` lines.
    """
    prepared = []
    refused: dict[str, None] = {}
    for line, code in _fenced(clean_lines(text)):
        parts, bad = clusters(line)
        refused.update(dict.fromkeys(bad))
        items = []
        for part, among in zip(parts, quotes_and_dashes(parts), strict=True):
            item = _item(part, among, style.name, code, fonts)
            if item is None:
                refused.update(dict.fromkeys(part))
            else:
                items.append(item)
        prepared.append((items, code))
    if refused:
        raise CannotDraw("a character that cannot be drawn", tuple(refused))
    if all(item.space for items, _ in prepared for item in items):
        raise CannotDraw("no text")
    lines: list[Line] = []
    for items, code in prepared:
        for number, (start, end) in enumerate(_broken(items, size, width) or [(0, 0)]):
            lines.append(_placed(items[start:end], size, code, number == 0))
        if len(lines) > max_lines:
            raise CannotDraw("too long to be read", detail=f"more than {max_lines:.0f} lines")
    return lines


def _fenced(lines: list[str]) -> list[tuple[str, bool]]:
    """Each line with whether it is code: inside ``` or ~~~ fences, the fences included. A fence that is never closed
    runs to the end, as in CommonMark."""
    marked, fence = [], ""
    for line in lines:
        match = _FENCE.fullmatch(line)
        if fence:
            marked.append((line, True))
            if match and match[1].startswith(fence) and not match[2].strip():
                fence = ""
        elif match and not (match[1][0] == "`" and "`" in match[2]):
            marked.append((line, True))
            fence = match[1]
        else:
            marked.append((line, False))
    return marked


@functools.lru_cache(maxsize=1 << 16)
def _item(part: str, among: bool, style_name: str, code: bool, fonts: str) -> _Item | None:
    """The cluster with the face that draws it; None if none can."""
    faces = load(fonts)
    style = next(style for style in STYLES if style.name == style_name)
    narrow, wide = style.code if code else (style.narrow, style.wide)
    names = [narrow, *(("dejavu-mono",) if code else ()), *style.others]
    order = [faces[name] for name in dict.fromkeys(names) if name in faces]
    broad = faces[wide]
    space = part in (" ", "\u3000")
    if is_wide(part) or among:
        order = [broad, *order]
    elif len(part) > 1:  # CJK faces lack most marks, and have bases that do not fit the others'
        order = [face for face in order if not face.cjk] + [broad]
    else:
        order = [*order, broad]  # first those that do not spread it over an em, as in "don’ t"
        order = [face for face in order if not face.cjk or (_covers(face, part) and not face.spreads(part))] + order
    for face in order:
        if _covers(face, part):
            spread = (is_wide(part) or among) and face.cjk
            return _Item(part, face, spread and not space, space, part[0] in NO_START, part[0] in NO_END)
    return None


def _covers(face: Face, part: str) -> bool:
    return all(face.covered[ord(character)] for character in part)


def _advance(item: _Item, size: int) -> int:
    return item.face.advance(item.text[0], size)


def _can_break(before: _Item, after: _Item) -> bool:
    """Whether a line may end between them; spaces belong to the line they end."""
    if after.space:
        return False
    if before.space:
        return True
    if before.no_end or after.no_start:
        return False
    if before.wide or after.wide:
        return before.text[0] != "\u00a0" and after.text[0] != "\u00a0"
    return before.text in "-—" and after.text.isalpha()


def _broken(items: list[_Item], size: int, width: int) -> list[tuple[int, int]]:
    """First and last + 1 of the items of each line, without the spaces between lines."""
    lines = []
    start, count = 0, len(items)
    advances = [_advance(item, size) for item in items]
    while start < count:
        x, at, cut = 0, start, 0
        while at < count:
            item = items[at]
            if at > start:
                if _can_break(items[at - 1], item):
                    cut = at
                if x + advances[at] > width and not item.space:
                    break
            x += advances[at]
            at += 1
        if at == count:
            cut = count
        elif all(item.space for item in items[start:cut]):  # nothing to end at, or only an indent before it
            cut = _forced(items, start, at)
        end = cut
        while end > start and items[end - 1].space:
            end -= 1
        lines.append((start, end))
        start = cut
        while start < count and items[start].space:
            start += 1
    return lines


def _forced(items: list[_Item], start: int, limit: int) -> int:
    """Where to cut what has no place to end: after a sign in the last third, else at the limit, if need be a little
    earlier so that no punctuation begins a line."""
    for cut in range(limit, start + (limit - start) * 2 // 3, -1):
        if items[cut - 1].text in _AFTER_SIGN and not items[cut].no_start and items[cut].text not in _AFTER_SIGN:
            return cut
    for cut in range(limit, max(start, limit - 4), -1):
        if not items[cut].no_start and not items[cut - 1].no_end:
            return cut
    return limit


def _placed(items: list[_Item], size: int, code: bool, begins: bool) -> Line:
    """Neighbours with one face joined to runs, each beginning where the last ended."""
    runs: list[Run] = []
    x = at = 0
    while at < len(items):
        face, end = items[at].face, at + 1
        if len(items[at].text) == 1:
            while end < len(items) and items[end].face is face and len(items[end].text) == 1:
                end += 1
            text = "".join(item.text for item in items[at:end])
            # Measured together: DejaVu kerns, so a run is not the sum of its letters.
            runs.append(Run(text, face, x))
            x += face.length(text, size)
        else:
            runs.append(Run(items[at].text, face, x, marked=True))
            x += _advance(items[at], size)
        at = end
    return Line(tuple(runs), x, code, begins)
