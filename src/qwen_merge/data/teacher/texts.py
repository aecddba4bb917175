"""What is read in questions and answers: marks that would break a training set, languages, final answers.

Used by the distilled sets (`qwen-merge data text2image`, `qwen-merge data image-thinking`). Pure text: no model, no
library; each function says what it cannot decide instead of guessing.
"""

import hashlib
import re
from dataclasses import dataclass
from fractions import Fraction

from qwen_merge.evaluation.thoughts import BOX, boxed

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
# Not the 选 of 不选B; 不能选, 不应该选 and the like are found by denied().
_SAYS = re.compile(
    r"(?:(?:final |correct )?(?:answer|option|choice)\s*(?:is|:|=)|答案\s*(?:是|为|：|:|选)"
    r"|(?<![不未没勿别])(?:故选|应选|选择|选))\s*[:：]?\s*",
    re.IGNORECASE,
)
# Sentences end in these; a full stop only before white space, for "3.5" has one too.
_STOP = re.compile(r"[。！？!?；;\n]|\.(?=\s|\Z)")
_CLAUSE = re.compile(r"[，,、：:]|[。！？!?；;\n]|\.(?=\s|\Z)")
_DENIED = re.compile(
    r"\b(?:not|never|nor|cannot|without|wrong|incorrect|false|mistaken|instead of|rather than|no need)\b|n['’]t\b"
    r"|[不未没勿别非错误]",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(
    r"\b(?:if|unless|whether|suppose|supposing|assum\w+|imagine|may|might|could|would|tempt\w+|say|claim\w*|think"
    r"|thought|seems?|looks?|appears?|first|initially|maybe|perhaps|possibly|common|typical|mistake|trap)\b"
    r"|如果|假如|假设|若|要是|可能|也许|或许|以为|误|乍看|看似|看起来|常见|陷阱",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:but|however|wait|actually|instead|rather|although|though|except|unless|wrong|incorrect|not|never|correction"
    r"|hmm|let me|let's|again|otherwise)\b|n['’]t\b|[?？不没错误]|但|然而|可是|等等|等一下|其实|而是|或者|重新|再看",
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
    r"""The final answer that a longer text states: in a box, or alone, or behind "the answer is".

    `\boxed{…}` and GLM's `<|begin_of_box|>…<|end_of_box|>` both count. None for an answer that is put otherwise, and
    for one of which a pattern cannot be sure: stated twice and differently, denied, supposed, or taken back afterwards.
    """
    if marks := _BOXED_BY_MARKS.findall(text):
        return _one({reference_final(mark) for mark in marks})
    if boxes := _boxes(text):
        return _one({reference_final(box) for box in boxes})
    if alone := final_of(text) or _option_with_its_text(text):
        return alone
    said = [(match, final) for match in _SAYS.finditer(text) if (final := _said(text, match))]
    final = _one({final for _, final in said})
    if final is None:
        return None
    sure = all(not supposed(text, match.start()) and not denied(text, match.start()) for match, _ in said)
    rest = text[said[-1][0].end() :]
    return final if sure and not taken_back(rest) and not _others(rest, final) else None


def _one(finals: set[Final | None]) -> Final | None:
    return finals.pop() if len(finals) == 1 else None


def _boxes(text: str) -> list[str]:
    """The contents of all boxes, the last first."""
    found = []
    while (inner := boxed(text)) != text:
        found.append(inner)
        text = text[: text.rfind(BOX)]
    return found


def _option_with_its_text(text: str) -> Final | None:
    """Of an answer that is "B. a red ball" and no more."""
    match = _OPTION_AND_TEXT.fullmatch(text.strip())
    if match is None or "\n" in text.strip():
        return None
    final = Final("option", match[1] or match[2])
    rest = text.strip()[2:]
    return None if taken_back(rest) or _others(rest, final) else final


def _said(text: str, match: re.Match[str]) -> Final | None:
    """The final answer behind "the answer is", if that sentence says nothing else that a rule would have to read."""
    rest = text[match.end() :].lstrip()
    end = _STOP.search(rest)
    sentence = rest[: end.start() if end else None].strip()
    if end and end[0] in "?？":
        return None
    if option := re.match(
        r"\**\s*[(\[]?([A-J])[)\]]?\**(?:\s*(?:\Z|[,:：，])|\s+(?:[(（—–-]|(?:because|since|as|for)\b))", sentence
    ):
        return Final("option", option[1])
    return final_of(sentence)


def _others(text: str, final: Final) -> bool:
    """Whether a text has something else that might be the answer: another letter, another number."""
    if final.kind == "option":
        return any(letter != final.value for letter in re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z'’])", text))
    if final.kind == "number":
        return any((other := final_of(match[0].strip())) != final for match in _NUMBER.finditer(text) if match[0])
    return any((other := final_of(word)) and other != final for word in re.findall(r"[A-Za-z]+|[是否对错]", text))


def denied(text: str, position: int) -> bool:
    """Whether the clause up to that position has a "not"."""
    ends = [match.end() for match in _CLAUSE.finditer(text, 0, position)]
    return _DENIED.search(text, ends[-1] if ends else 0, position) is not None


def supposed(text: str, position: int) -> bool:
    """Whether the sentence up to that position has an "if", "might", "one could think"."""
    return _SUPPOSED.search(text, sentence_start(text, position), position) is not None


def taken_back(rest: str) -> bool:
    """Whether what comes after a statement may unsay it."""
    return _TAKEN_BACK.search(rest) is not None


def sentence_start(text: str, position: int) -> int:
    """Where the sentence begins that holds a position."""
    return max((match.end() for match in _STOP.finditer(text, 0, position)), default=0)


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
