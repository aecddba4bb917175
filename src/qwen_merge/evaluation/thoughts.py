"""Where a thinking model's answer begins. Pure text: no model, no library.

A thinking model's output is a thought, `</think>`, and the answer. A scorer that reads the thought counts what the
model only considered, and an option letter in the middle of a thought as its choice; so both back ends and the served
model cut with these functions, which VLMEvalKit's runs use (`scripts/eval.sh`).
"""

from dataclasses import dataclass

OPEN, CLOSE, BOX = "<think>", "</think>", "\\boxed{"


@dataclass(frozen=True)
class Split:
    """An output in two. `closed`: True after a finished thought, False in an unfinished one, None without a thought."""

    thought: str
    answer: str
    closed: bool | None


def split(text: str, *, opened: bool = False) -> Split:
    """Cut the thought off.

    Args:
        text: what the model wrote.
        opened: the prompt itself ended in `<think>`, so the text begins inside a thought.

    Returns:
        The answer is what follows the last `</think>`. It is empty while a thought is open: the model was cut off
        before it answered, and guessing an answer from a thought would flatter it.
    """
    thought, closed, answer = text.rpartition(CLOSE)
    if closed:
        # A second thought, opened after the first and cut off: again no answer.
        unfinished = OPEN in answer
    else:
        thought, answer, unfinished = "", text, opened or OPEN in text
    if unfinished:
        return Split(text.replace(OPEN, "").strip(), "", False)
    return Split(thought.replace(OPEN, "").strip(), answer.strip(), True if closed else None)


def boxed(answer: str) -> str:
    r"""The content of the last `\boxed{...}`, braces balanced; the whole answer where none is, or none is closed."""
    start = answer.rfind(BOX)
    if start < 0:
        return answer
    start += len(BOX)
    depth = 1
    for position in range(start, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[position], 0)
        if depth == 0:
            return answer[start:position].strip()
    return answer
