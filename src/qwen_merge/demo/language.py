"""How the tiny world is spoken of: captions, questions, answers and thoughts, and notes that tell a scene in words.

One grammar serves all: the text model is taught with notes in a picture's place, the vision tower with captions, the
four stages with pictures. So a picture can take a note's place, which is what the graft is about.
"""

import random
from dataclasses import dataclass

from qwen_merge.demo.world import COLOURS, COUNTS, SHAPES, WORDS, Scene

CAPTION_REQUESTS = ("Describe the picture.", "What is in this picture?", "Give a caption.")
OCR_REQUEST = {"en": "Read the text in the picture.", "zh": "请识别图中的文字。"}
READING_REQUEST = "Please answer the question in the picture."
NO_THINKING = " /no_think"
# What VLMEvalKit puts under a question of a local table, with options and without (a test compares them with its own).
CHOICE_REQUEST = "Please select the correct answer from the options above. \n"
SHORT_REQUEST = "Please try to answer the question with short words or phrases if possible."
LETTERS = "ABCD"
PLACES = 9  # as many as a picture has tokens
QUESTIONS = {
    "colour": ("What colour is it?", "Name the colour."),
    "shape": ("What shape is it?", "Name the shape."),
    "count": ("How many are there?", "Count them."),
    "number": ("What number is written?", "Read the number."),
    "word": ("What word is written?", "Read the word."),
    "sum": (READING_REQUEST,),
}
TOPICS = {
    "shape": ("colour", "shape"),
    "count": ("count", "colour", "shape"),
    "number": ("number",),
    "word": ("word",),
    "sum": ("sum",),
}
CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "count": 1 / len(COUNTS),
    "number": 1 / 900,
    "word": 1 / len(WORDS),
    "sum": 1 / 17,
}
VALUES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "count": tuple(COUNTS.values()),
    "word": WORDS,
}


@dataclass(frozen=True)
class Exchange:
    """One question about a scene, with the thought that leads to its answer."""

    topic: str
    question: str
    thought: str
    answer: str

    @property
    def thinking_answer(self) -> str:
        """As Qwen3 writes it; LLaMA-Factory's template looks for these tags."""
        return f"<think>\n{self.thought}\n</think>\n\n{self.answer}"


def plural(shape: str) -> str:
    return {"cross": "crosses"}.get(shape, f"{shape}s")


def caption(scene: Scene) -> str:
    if scene.kind == "number":
        return f"the number {scene.text}"
    if scene.kind == "word":
        return f"the word {scene.text}"
    if scene.kind == "sum":
        return f"the sum {scene.text}"
    return f"{COUNTS[scene.count]} {scene.colour} {scene.shape if scene.count == 1 else plural(scene.shape)}"


def answer(scene: Scene, topic: str) -> str:
    if topic == "colour":
        return scene.colour
    if topic == "shape":
        return scene.shape
    if topic == "count":
        return COUNTS[scene.count]
    if topic == "sum":
        return str(sum(int(term) for term in scene.text.split("+")))
    return scene.text


def exchange(scene: Scene, topic: str, pick: random.Random) -> Exchange:
    """A question about `topic` in one of its wordings, the answer, and the thought that leads from one to the other."""
    reply = answer(scene, topic)
    if topic == "sum":
        thought = f"The picture asks {scene.text}. {scene.text}={reply}."
    else:
        thought = f"I see {caption(scene)}. The {topic} is {reply}."
    return Exchange(topic, pick.choice(QUESTIONS[topic]), thought, reply)


def choices(topic: str, truth: str, pick: random.Random) -> dict[str, str]:
    """Four options by their letters, in free order, the true one among them. Sums have none: they are told, not chosen.

    The wrong ones are of the same kind; for a number they differ from it in one digit or more.
    """
    if topic == "number":
        others = [str(number) for number in pick.sample(range(100, 1000), 4) if str(number) != truth]
    else:
        others = pick.sample([value for value in VALUES[topic] if value != truth], 3)
    options = [truth, *others[:3]]
    pick.shuffle(options)
    return dict(zip(LETTERS, options, strict=True))


def with_choices(spoken: Exchange, options: dict[str, str]) -> Exchange:
    """The same question as VLMEvalKit puts one of multiple choice.

    The answer stays the option's own words, which VLMEvalKit takes for its letter: to find the letter beside the
    word is a lesson longer than all others together for a model of this size (tried: chance after 500 steps).
    """
    lines = [f"Question: {spoken.question}", "Options:"]
    lines += [f"{letter}. {option}" for letter, option in options.items()]
    return Exchange(spoken.topic, "\n".join([*lines, CHOICE_REQUEST]), spoken.thought, spoken.answer)


def for_short_words(spoken: Exchange) -> Exchange:
    """The same question as VLMEvalKit puts one that has no options."""
    return Exchange(spoken.topic, f"{spoken.question}\n{SHORT_REQUEST}", spoken.thought, spoken.answer)


def as_examined(spoken: Exchange, pick: random.Random, choice: float, short: float) -> Exchange:
    """The exchange as it is, or in one of VLMEvalKit's two forms, with these probabilities."""
    form = pick.random()
    if form < choice and spoken.topic != "sum":
        return with_choices(spoken, choices(spoken.topic, spoken.answer, pick))
    if choice <= form < choice + short:
        return for_short_words(spoken)
    return spoken


def note(scene: Scene, pick: random.Random) -> str:
    """The scene's facts in loose words on nine places: what the text model gets where later a picture stands.

    The order of a shape's facts is free, because the nine places of a picture tell them in no fixed order either;
    characters keep theirs.
    """
    facts = list(scene.text) or [COUNTS[scene.count], scene.colour, scene.shape]
    if not scene.text:
        pick.shuffle(facts)
    places = ["-"] * PLACES
    for place, fact in zip(sorted(pick.sample(range(PLACES), len(facts))), facts, strict=True):
        places[place] = fact
    return " ".join(places)


def corpus(seed: int = 0) -> list[str]:
    """Sentences that hold every word of the world: what the tokenizer learns its merges from."""
    from qwen_merge.demo.world import KINDS, Stream

    stream, lines = Stream("tokenizer", seed), []
    for index in range(600):
        scene = stream.scene(KINDS[index % len(KINDS)])
        lines += [caption(scene), *CAPTION_REQUESTS, *OCR_REQUEST.values(), note(scene, stream.random)]
        for topic in TOPICS[scene.kind]:
            spoken = exchange(scene, topic, stream.random)
            lines += [spoken.question + NO_THINKING, spoken.thinking_answer, for_short_words(spoken).question]
            if topic != "sum":
                chosen = with_choices(spoken, choices(topic, spoken.answer, stream.random))
                lines += [chosen.question, chosen.thinking_answer]
    return lines
