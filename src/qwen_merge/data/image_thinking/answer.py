"""What a reasoning VLM sends back: `<think>…</think>` and `<answer>…</answer>`, read and put in the set's form.

`<answer>` tags and GLM's `<|begin_of_box|>` and `<|end_of_box|>` go, their contents stay.
"""

import re
from dataclasses import dataclass
from typing import Any

from qwen_merge.data.teacher import filters
from qwen_merge.data.teacher.answers import not_ended
from qwen_merge.data.teacher.texts import mark_in
from qwen_merge.evaluation.thoughts import CLOSE, OPEN

_ANSWER_TAGS = re.compile(r"</?answer>")
_BOX_MARKS = re.compile(r"<\|(?:begin|end)_of_box\|>")
_TRAILING = re.compile(r"<\|(?:user|endoftext|im_end)\|>\s*\Z")  # an end token that a server did not take off


@dataclass(frozen=True)
class Answer:
    """`marked` is the answer with the marks of its box, for rules that look for it; `text` is without them."""

    thought: str
    marked: str

    @property
    def text(self) -> str:
        return _BOX_MARKS.sub("", self.marked).strip()

    @property
    def content(self) -> str:
        """The assistant's turn in the set."""
        return f"{OPEN}\n{self.thought}\n{CLOSE}\n\n{self.text}"


def read_answer(entry: dict[str, Any]) -> Answer | str:
    """The answer in a line of the journal, or the reason why it is of no use."""
    if problem := not_ended(entry):
        return problem
    text = _TRAILING.sub("", entry["text"]).strip()
    if not text.startswith(OPEN) or text.count(OPEN) != 1 or text.count(CLOSE) != 1:
        return "answer without <think>…</think>"
    thought, _, rest = text.removeprefix(OPEN).partition(CLOSE)
    if rest.count("<answer>") != 1:
        return "answer without <answer>"
    found = Answer(_BOX_MARKS.sub("", _ANSWER_TAGS.sub("", thought)).strip(), _ANSWER_TAGS.sub("", rest).strip())
    if not found.text:
        return "empty answer"
    if mark_in(found.text) or mark_in(found.thought):
        return "media tag or control token in the answer"
    return found


def checked(entry: dict[str, Any], question: str, reference: str) -> tuple[Answer | None, str, str]:
    """(answer, "", "") if it may go to the judge, else (None, reason, what was seen)."""
    found = read_answer(entry)
    if isinstance(found, str):
        return None, found, entry.get("refused") or entry["text"][-120:]
    if dropped := filters.by_rules(question, reference, found.thought, found.marked):
        return None, *dropped
    return found, "", ""


def judgement(verdict: dict[str, Any] | None) -> str | None:
    """Why a verdict drops an answer; None keeps it. Only "good" is good enough."""
    if verdict is None:
        return "verdict unreadable"
    if not verdict["final_answer_correct"]:
        return filters.WRONG_FINAL_ANSWER
    if verdict["guesswork"]:
        return filters.GUESSWORK
    if verdict["contradiction"]:
        return filters.CONTRADICTION
    return None if verdict["rating"] == "good" else f"judged {verdict['rating']}"
