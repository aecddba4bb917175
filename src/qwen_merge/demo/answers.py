"""From what a model wrote to right or wrong, without a model: thoughts cut off, values found, accuracies counted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_merge.demo.language import CHANCE, VALUES


@dataclass(frozen=True)
class Question:
    """One held-out question; `picture` is an index into the held-out pictures."""

    topic: str
    text: str
    truth: str
    picture: int


def split_thought(text: str) -> tuple[str, str]:
    """(thought, answer). A thought that is opened and never closed leaves no answer."""
    if "</think>" in text:
        thought, _, answer = text.partition("</think>")
    elif "<think>" in text:
        thought, answer = text, ""
    else:
        thought, answer = "", text
    return thought.replace("<think>", "").strip(), answer.strip()


def values_named(topic: str, answer: str) -> set[str]:
    """The values of this topic that an answer names: `two red circles` names red, circle and two."""
    if topic in VALUES:
        pattern = rf"\b({'|'.join(VALUES[topic])})(?:e?s)?\b"
        return {match[1] for match in re.finditer(pattern, answer.lower())}
    return set(re.findall(r"\d+", answer))


def right(question: Question, text: str) -> bool:
    """Whether the answer, its thoughts cut off, names the true value and no other one of the same kind.

    A caption given instead of a short answer thus counts by what it says; `red or blue` is wrong.
    """
    return values_named(question.topic, split_thought(text)[1]) == {question.truth}


def accuracies(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """The share of right answers for each topic."""
    marks: dict[str, list[bool]] = {}
    for question, text in zip(questions, texts, strict=True):
        marks.setdefault(question.topic, []).append(right(question, text))
    return {topic: sum(row) / len(row) for topic, row in marks.items()}


GOALS = {"colour": 0.95, "shape": 0.90, "number": 0.95}
CONTROL_MARGIN = 0.10  # 3.5 standard errors of 200 answers by chance
STAGE1_GAIN = 0.15
EVALUATION_GAIN = 50.0  # points; guessing among four options gives half of that


def missed_goals(results: dict[str, dict]) -> list[str]:
    """What the demo promises and these results (stage name -> result) do not hold."""
    missed = []
    last = results["stage3"]
    for topic, goal in GOALS.items():
        if last["accuracy"][topic] < goal:
            missed.append(f"stage 3, {topic}: {last['accuracy'][topic]:.1%} right, the goal is {goal:.0%}")
        if last["control"][topic] > CHANCE[topic] + CONTROL_MARGIN:
            missed.append(
                f"control, {topic}: {last['control'][topic]:.1%} right with other questions' pictures, chance is "
                f"{CHANCE[topic]:.1%}: the answers do not come from the picture"
            )
    seen = {
        name: (results[name]["accuracy"]["colour"] + results[name]["accuracy"]["shape"]) / 2
        for name in ("base", "stage1")
    }
    if seen["stage1"] < seen["base"] + STAGE1_GAIN:
        missed.append(
            f"stage 1, colour and shape: {seen['stage1']:.1%} right against {seen['base']:.1%} before it; the goal is "
            f"{STAGE1_GAIN:.0%} more"
        )
    return missed


def missed_rises(scores: dict[str, dict[str, float]]) -> list[str]:
    """Tables of VLMEvalKit (checkpoint -> table -> percent) on which stage 3 is not far above the base."""
    return [
        f"VLMEvalKit, {name}: {scores['stage3'][name]:.1f} % after stage 3 against {before:.1f} % before; the goal is "
        f"{EVALUATION_GAIN:.0f} points more"
        for name, before in scores["base"].items()
        if scores["stage3"][name] < before + EVALUATION_GAIN
    ]


def table(results: dict[str, dict]) -> str:
    """The results as lines of text: a row for each checkpoint, chance and the control below."""
    topics = list(CHANCE)
    widths = [22, 13, 12] + [8] * len(topics)

    def line(*cells: str) -> str:
        return "".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))

    def shares(values: dict[str, float]) -> list[str]:
        return [f"{100 * values[topic]:.1f}" for topic in topics]

    lines = [line("after", "caption loss", "answer loss", *topics)]
    for name, result in results.items():
        losses = [f"{result[key]:.3f}" for key in ("caption_loss", "answer_loss")]
        lines.append(line(name, *losses, *shares(result["accuracy"])))
    last = list(results)[-1]
    lines.append(line("chance", "", "", *shares(CHANCE)))
    lines.append(line(f"{last}, shuffled", "", "", *shares(results[last]["control"])))
    return "\n".join(lines)
