"""What of a text can be drawn: characters taken apart, cleaned and classed before anything is laid out.

Why here: a font has a glyph for many characters that one glyph at a time draws wrongly (Arabic, Devanagari, emoji
sequences), and none for many that need no ink (zero-width and control characters). Both lists are decided in this
file and nowhere else. A text with a character that cannot be drawn rightly is refused with those characters named, and
its row stays text and is counted: half a question is worse than none.
"""

import functools
import unicodedata


class CannotDraw(Exception):
    """This text stays text. `reason` is one of a few short phrases, to count by; `characters` are the culprits."""

    def __init__(self, reason: str, characters: tuple[str, ...] = (), detail: str = ""):
        named = ", ".join(_named(character) for character in characters[:10])
        super().__init__(": ".join(part for part in (reason, named or detail) if part))
        self.reason, self.characters, self.detail = reason, characters, detail

    def __reduce__(self):  # it crosses processes
        return type(self), (self.reason, self.characters, self.detail)


def _named(character: str) -> str:
    name = unicodedata.name(character, "no name")
    return f"U+{ord(character):04X} {name}"


# Kinsoku: what must not begin a line, and what must not end one.
NO_START = frozenset(
    "!%),.:;?]}¢°·’†‡›℃∶、。〃々〉》」』】〕〗〙〛〜〞〟ぁぃぅぇぉっゃゅょゎゕゖ゛゜ゝゞ゠ァィゥェォッャュョヮヵヶ・ーヽヾ"
    "！＂％＇），．：；？］｜｝～￠｠｡｣､･ｰ”…—–‥‰′″\"'"
)
NO_END = frozenset("$([{£¥‘“〈《「『【〔〖〘〚〝＄（［｛｟￡￥｢\"'")

# Scripts whose letters join, stack or change order; drawing them needs a shaper. Right-to-left ones are found by
# their bidirectional class instead.
_SHAPED = (
    (0x0900, 0x0DFF),  # Devanagari to Sinhala
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1100, 0x11FF),  # Hangul jamo that NFC could not compose
    (0x1700, 0x18AF),  # Philippine scripts, Khmer, Mongolian
    (0x1900, 0x1CFF),  # Limbu to Vedic extensions
    (0xA800, 0xABFF),  # Syloti Nagri to Meetei Mayek, with more jamo
    (0xD7B0, 0xD7FF),  # jamo again
    (0x11000, 0x11FFF),  # Brahmi and its descendants
    (0x1F1E6, 0x1F1FF),  # letters that make flags in pairs
    (0x1F3FB, 0x1F3FF),  # skin tones
)
_REORDERING = frozenset("\u202a\u202b\u202d\u202e\u2066\u2067\u2068")  # they move what follows them
_FIXED_SPACES = frozenset("\u00a0\u2007\u202f")  # no line ends at them


@functools.lru_cache(maxsize=1 << 16)
def kind(character: str) -> str:
    """One of: `letter` (drawn), `mark` (drawn on the one before), `space`, `nothing` (leaves no trace), `never`."""
    category, code = unicodedata.category(character), ord(character)
    if category == "Zs":
        return "space"
    if category in ("Cn", "Co", "Cs", "Me", "Zl", "Zp") or character in _REORDERING or 0xE0000 < code < 0xE0080:
        return "never"
    # Variation selectors ask for another form of the glyph before them, which a face without a shaper does not give.
    if category in ("Cc", "Cf") or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF:
        return "nothing"
    if unicodedata.bidirectional(character) in ("R", "AL", "AN") or any(a <= code <= z for a, z in _SHAPED):
        return "never"
    return "mark" if category in ("Mn", "Mc") else "letter"


@functools.lru_cache(maxsize=1 << 16)
def is_wide(character: str) -> bool:
    """Whether East Asian typography gives it a whole em, whatever stands beside it."""
    return unicodedata.east_asian_width(character[0]) in ("W", "F")


def clean_lines(text: str) -> list[str]:
    """The text's lines: NFC, every kind of line end, tabs to the next stop of four columns, no blank line at either
    end and at most two in a row elsewhere, nothing after the last ink of a line."""
    text = unicodedata.normalize("NFC", text)
    for end in ("\r\n", "\r", "\v", "\f", "\x85", "\u2028", "\u2029"):
        text = text.replace(end, "\n")
    lines: list[str] = []
    for raw in text.split("\n"):
        line = _untabbed(raw).rstrip()
        if line or (lines and not (len(lines) > 1 and not lines[-1] and not lines[-2])):
            lines.append(line)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def clusters(line: str) -> tuple[list[str], list[str]]:
    """What is placed as one: a character with the marks on it, or a space (a fixed one stays U+00A0).

    Returns:
        the clusters, and the characters that cannot be drawn rightly by anything.
    """
    parts: list[str] = []
    refused: list[str] = []
    for at, character in enumerate(line):
        what = kind(character)
        if what == "letter":
            parts.append(character)
        elif what == "space":
            parts.append("\u3000" if character == "\u3000" else "\u00a0" if character in _FIXED_SPACES else " ")
        elif what == "mark" and parts and parts[-1] not in (" ", "\u3000", "\u00a0"):
            parts[-1] += character
        elif what == "mark":
            parts.append("\u00a0" + character)  # on nothing: Unicode's own way to show a mark alone
        elif what == "never" or (character == "\u200d" and at and unicodedata.category(line[at - 1]) == "So"):
            refused.append(character)  # a zero-width joiner after a symbol makes one emoji of several
    return parts, refused


def quotes_and_dashes(parts: list[str]) -> list[bool]:
    """For each cluster whether it stands among CJK, which decides how wide a quotation mark or an ellipsis is drawn.

    A pair of quotation marks is decided together, by what is inside and right outside it; everything else by what
    stands beside it. An apostrophe between letters is never wide.
    """
    wide = [is_wide(part) and part != "\u3000" for part in parts]
    if not any(wide):
        return wide
    count = len(parts)
    among = list(wide)
    left: list[bool] = [False] * count  # whether the nearest cluster with a width of its own is wide
    near = False
    for at, part in enumerate(parts):
        left[at] = near
        near = near if part in _AMBIGUOUS else wide[at]
    near = False
    open_at: dict[str, list[int]] = {"“": [], "‘": []}
    right: list[bool] = [False] * count
    for at in range(count - 1, -1, -1):
        right[at] = near
        near = near if parts[at] in _AMBIGUOUS else wide[at]
    for at, part in enumerate(parts):
        if part in _AMBIGUOUS:
            among[at] = left[at] if part in "”’" else right[at] if part in "“‘" else left[at] or right[at]
        if part == "’" and 0 < at < count - 1 and _is_letter(parts[at - 1]) and _is_letter(parts[at + 1]):
            continue  # an apostrophe, which closes nothing
        if part in open_at:
            open_at[part].append(at)
        elif part in _CLOSING and open_at[_CLOSING[part]]:
            first = open_at[_CLOSING[part]].pop()
            among[first] = among[at] = any(wide[first + 1 : at]) or left[first] or right[at]
    return among


_AMBIGUOUS = frozenset("“”‘’…—–‥·")
_CLOSING = {"”": "“", "’": "‘"}


def _is_letter(part: str) -> bool:
    return part.isalpha() and not is_wide(part)


def _untabbed(line: str) -> str:
    """Tabs to the next multiple of four columns, a wide character being two."""
    if "\t" not in line:
        return line
    parts, column = [], 0
    for character in line:
        width = 4 - column % 4 if character == "\t" else 2 if is_wide(character) else int(kind(character) == "letter")
        width = 1 if character == " " else width
        parts.append(" " * width if character == "\t" else character)
        column += width
    return "".join(parts)
