"""What is read in questions and answers: marks that would break a training set, languages, final answers.

Used by the distilled sets (`qwen-merge data text2image`, `qwen-merge data image-thinking`). Pure text: no model, no
library; each function says what it cannot decide instead of guessing.
"""

import hashlib
import re
from dataclasses import dataclass
from fractions import Fraction

from qwen_merge.evaluation.thoughts import boxed

_MEDIA = re.compile(r"<(?:image|video|audio)>")
_CONTROL = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>|</?(?:think|tool_call|tool_response)>")


def seed_of(seed: int, key: str, turn: int = 0) -> int:
    """A request's own seed, 31 bits: the same after a restart, on any server, in any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}\0{turn}".encode()).digest()[:4], "big") >> 1


def share_of(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: what random() is not."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "big") / 2**64


def mark_in(text: str) -> str | None:
    """The first mark in a text that training would not read as text: a picture's tag, or a control token; None if none.

    LLaMA-Factory counts `<image>` anywhere in a conversation, and tokenizers turn `<|im_end|>` into the real thing.
    """
    match = _MEDIA.search(text) or _CONTROL.search(text)
    return match[0] if match else None


# --- languages ---

_CJK = re.compile(r"[㐀-䶿一-鿿豈-﫿]")
_LATIN = re.compile(r"[A-Za-zÀ-ɏ]{2,}")
_OTHER = re.compile(  # kana, hangul, Cyrillic, Hebrew, Arabic, Indic, Thai; Greek is mathematics
    r"[\u3040-\u30ff\uac00-\ud7af\u0400-\u052f\u0590-\u06ff\u0900-\u0dff\u0e00-\u0e7f]"
)
# What is in no language: code, formulas, addresses. Inline code only on one line: a lone ` must not eat a page.
_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|https?://\S+", re.DOTALL
)


@dataclass(frozen=True)
class Languages:
    """How much of a text is in which script. A Chinese character counts as half a word, as it carries about that."""

    chinese: float
    latin: int
    other: float

    @property
    def words(self) -> float:
        return self.chinese + self.latin + self.other

    def share(self, words: float) -> float:
        return words / self.words if self.words else 0.0


def languages(text: str) -> Languages:
    prose = _NO_LANGUAGE.sub(" ", text)
    return Languages(len(_CJK.findall(prose)) / 2, len(_LATIN.findall(prose)), len(_OTHER.findall(prose)) / 2)


def is_chinese(text: str) -> bool:
    """Mostly Chinese, code and formulas aside."""
    found = languages(text)
    return found.chinese > found.latin


# --- final answers ---

_BOX_MARKS = re.compile(r"<\|(?:begin|end)_of_box\|>")
_BOXED_BY_MARKS = re.compile(r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.DOTALL)
_OPTION = re.compile(r"[(\[]?([A-Ja-j])[)\].:]?")
# A letter and the text of that option: "B. a red ball", "(B) a red ball"
_OPTION_AND_TEXT = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)])\s+\S.*", re.DOTALL)
_NUMBER = re.compile(r"([-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[-+]?\d+(?:\.\d+)?|[-+]?\.\d+)(?:\s*/\s*(\d+))?\s*(%?)")
_YES = re.compile(r"(yes|true|no|false|是|否|对|错|正确|错误)", re.IGNORECASE)
_TRUE = ("yes", "true", "是", "对", "正确")
_SAYS = re.compile(
    r"(?:(?:final |correct )?(?:answer|option|choice)\s*(?:is|:|=)|答案\s*(?:是|为|：|:|选)|故选|应选|选择|选)"
    r"\s*[:：]?\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Final:
    """A final answer that a rule can compare. `kind`: "option", "number" or "yes/no". `percent`: written with %."""

    kind: str
    value: str | Fraction
    percent: bool = False


def final_of(text: str) -> Final | None:
    """The final answer that a whole short text is: "B", "(B)", "3.5", "1/2", "Yes."; None for anything else."""
    text = _BOX_MARKS.sub("", text).strip().strip("*").strip()
    text = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", text).strip("$ \n").rstrip(".。").strip()
    text = re.sub(r"\\d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    if match := _OPTION.fullmatch(text):
        return Final("option", match[1].upper())
    if match := _YES.fullmatch(text):
        return Final("yes/no", "yes" if match[1].lower() in _TRUE else "no")
    if (match := _NUMBER.fullmatch(text)) and not (match[2] and int(match[2]) == 0):
        value = Fraction(match[1].replace(",", "")) / int(match[2] or 1)
        return Final("number", value / 100 if match[3] else value, bool(match[3]))
    return None


def reference_final(text: str) -> Final | None:
    """The final answer of a reference: the whole text is one, or says "The answer is B", or "B. the option's text"."""
    text = text.strip()
    said = _SAYS.match(re.sub(r"^(?:the|so,? the)\s+", "", text, flags=re.IGNORECASE))
    if said:
        text = re.sub(r"^(?:the|so,? the)\s+", "", text, flags=re.IGNORECASE)[said.end() :]
    if match := _OPTION_AND_TEXT.fullmatch(text):
        return Final("option", match[1] or match[2])
    return final_of(text)


def stated_final(text: str) -> Final | None:
    r"""The final answer that a longer text states: in a box, or alone, or behind its last "the answer is".

    `\boxed{…}` and GLM's `<|begin_of_box|>…<|end_of_box|>` both count; an answer that is put otherwise gives None.
    """
    if marks := _BOXED_BY_MARKS.findall(text):
        return reference_final(marks[-1])
    inner = boxed(text)
    if inner != text:
        return reference_final(inner)
    if alone := reference_final(text.strip()):
        return alone
    said = list(_SAYS.finditer(text))
    if not said:
        return None
    rest = text[said[-1].end() :].strip()
    line = rest.split("\n", 1)[0].strip()
    if match := re.fullmatch(r"\**\s*[(\[]?([A-J])[)\]]?\**(?:[.,:：。，;]?(?:\s.*)?)", line):
        return Final("option", match[1])
    return final_of(line)


def finals_agree(expected: Final, given: Final) -> bool | None:
    """True or False where a rule can tell, None where it takes judgement: other kinds, rounding, per cent or not."""
    if expected.kind != given.kind:
        return None
    if isinstance(expected.value, str) or isinstance(given.value, str):
        return expected.value == given.value
    if expected.value == given.value:
        return True
    if expected.percent != given.percent:
        return None
    difference = abs(expected.value - given.value)
    size = max(abs(expected.value), abs(given.value))
    return False if difference * 20 > size else None  # nearer than 5 %: it may be rounded
