"""The six response filters of the Qwen3 report (arXiv 2505.09388, section 4.2), each by its name.

    qwen-merge data image-thinking judge        applies them; the set's manifest counts each

A rule decides what rules can decide, before a judge is asked; the judge decides the rest (`judge`). Each rule returns
None for an answer that it lets pass, else what it saw: the example in the manifest. Rules are written to be sure of
what they drop: a doubtful answer goes to the judge.

| filter               | rule                                                   | judge                       |
|----------------------|--------------------------------------------------------|-----------------------------|
| wrong final answer   | letters, numbers, yes and no, stated once, that differ | "final_answer_correct"      |
| heavy repetition     | loops, and long texts made of copies                   |                             |
| guesswork            | hardly any thought, or one that ends in a guess        | "guesswork"                 |
| contradiction        | thought and summary that state different final answers | "contradiction"             |
| language mixing      | scripts that the question does not have                |                             |
| near-copy            | pictures and questions of evaluation sets              |                             |
"""

import re
from collections import Counter
from typing import Protocol

from qwen_merge.data.teacher.texts import (
    denied,
    finals_agree,
    languages,
    reference_final,
    sentence_start,
    stated_final,
    supposed,
    taken_back,
)

WRONG_FINAL_ANSWER = "wrong final answer"
HEAVY_REPETITION = "heavy repetition"
GUESSWORK = "guesswork without reasoning"
CONTRADICTION = "thought and summary contradict"
LANGUAGE_MIXING = "language mixing"
NEAR_COPY = "near-copy of an evaluation item"
FILTERS = (WRONG_FINAL_ANSWER, HEAVY_REPETITION, GUESSWORK, CONTRADICTION, LANGUAGE_MIXING, NEAR_COPY)

_WORDS = re.compile(r"[㐀-鿿\u3040-\u30ff\uac00-\ud7af]|[^\W_㐀-鿿\u3040-\u30ff\uac00-\ud7af]+")
LOOP_WORDS = 60  # of one phrase, said again and again
LOOP_TIMES = 5
LONGEST_PHRASE = 40  # words
COPY_GRAM = 13  # words
COPY_SHARE = 0.4  # of a text's runs of 13 words, that were there before
COPY_WORDS = 150  # a shorter text is not judged by its share
LEAST_THOUGHT = 8  # words
# A guess that decides. Not "I guess the question asks for the sum", and not "pick one ball at random": that is a task.
_GUESS = re.compile(
    r"\bi(?:['’]ll| will| have to| must| can only|['’]m going to| need to)? "
    r"(?:(?:just |simply |only )?(?:take a (?:wild |random )?guess\b"
    r"|(?:pick|choose|select) (?:one )?(?:at random|randomly)|randomly (?:pick|choose|select|guess))"
    r"|(?:just |simply |only )?guess(?:,? (?:that )?(?:the )?(?:correct |final |right )?(?:answer|option|choice)\b"
    r"|(?:,? (?:it(?:['’]s| is) )?\(?(?:[A-J]|-?\d[\d.,]*|yes|no)\)?)?[.!]?\s*\Z))"
    r"|\bi(?:['’]ll| will| have to| must| can only|['’]m going to) (?:just |simply |only )?guess\b"
    r"|(?:只能|只好|就)(?:随便|随机)(?:选|猜)|瞎猜|只能猜|蒙一个|猜一个(?=答案|选项|吧|[。！!]|\Z)",
    re.IGNORECASE,
)
_END = 400  # characters: where a thought says how it decides


def wrong_final_answer(reference: str, answer: str) -> str | None:
    """Both state a final answer that can be compared, and they differ."""
    expected, given = reference_final(reference), stated_final(answer)
    if expected is None or given is None or finals_agree(expected, given) is not False:
        return None
    return f"{_shown(given.value)} instead of {_shown(expected.value)}"


def heavy_repetition(text: str) -> str | None:
    """A phrase said over and over, or a long text of which a large share was said before."""
    words = [word.lower() for word in _WORDS.findall(text)]
    if loop := _loop(words):
        return loop
    words = [word for word in words if not word.isdigit()]  # tables and matrices repeat their numbers
    grams = len(words) - COPY_GRAM + 1
    if len(words) < COPY_WORDS:
        return None
    different = len({tuple(words[i : i + COPY_GRAM]) for i in range(grams)})
    share = 1 - different / grams
    return f"{share:.0%} of its {len(words)} words were said before" if share > COPY_SHARE else None


def _loop(words: list[str]) -> str | None:
    """A phrase of at most LONGEST_PHRASE words, at least LOOP_TIMES in a row and LOOP_WORDS long in all."""
    for length in range(1, min(LONGEST_PHRASE, len(words) // LOOP_TIMES) + 1):
        run = 0  # words in a row that equal the word one phrase before
        needed = max(LOOP_WORDS, length * LOOP_TIMES) - length
        for position in range(length, len(words)):
            run = run + 1 if words[position] == words[position - length] else 0
            if run >= needed:
                phrase = words[position - length + 1 : position + 1]
                if all(word.isdigit() for word in phrase):  # a table's or a matrix's numbers
                    continue
                return f"again and again: {' '.join(phrase)[:80]!r}"
    return None


def guesswork(thought: str) -> str | None:
    """No thought to speak of, or one that decides by guessing."""
    words = len(_WORDS.findall(thought))
    if words < LEAST_THOUGHT:
        return f"a thought of {words} word(s)"
    for match in _GUESS.finditer(thought, _end_of(thought)):
        if not (
            denied(thought, match.start()) or supposed(thought, match.start()) or taken_back(thought[match.end() :])
        ):
            return f"its thought ends with {match[0]!r}"
    return None


def _end_of(thought: str) -> int:
    """Where the last sentences of a thought begin; whole ones, for their first words may be "one could say"."""
    return sentence_start(thought, max(0, len(thought) - _END))


def contradiction(thought: str, answer: str) -> str | None:
    """The thought's conclusion and the answer state different final answers."""
    concluded, given = stated_final(thought[_end_of(thought) :]), stated_final(answer)
    if concluded is None or given is None or finals_agree(concluded, given) is not False:
        return None
    return f"the thought says {_shown(concluded.value)}, the answer {_shown(given.value)}"


def language_mixing(question: str, reference: str, thought: str, answer: str) -> str | None:
    """A language in the thought or answer that neither question nor reference has, or one in each of the two.

    Chinese texts hold Latin words (names, terms, units), so Latin in Chinese is never enough by itself; a Chinese
    question whose thought and answer are in English throughout is no mixing either.
    """
    asked = languages(f"{question}\n{reference}")
    for name, text in (("thought", thought), ("answer", answer)):
        found = languages(text)
        if found.other >= 3 and asked.other == 0 and found.share(found.other) > 0.1:
            return f"{found.share(found.other):.0%} of the {name} is in another script"
        if found.chinese >= 3 and asked.words and asked.chinese == 0 and found.share(found.chinese) > 0.05:
            return f"{found.share(found.chinese):.0%} of the {name} to a question without Chinese is Chinese"
    first, second = languages(thought), languages(answer)
    if min(first.words, second.words) < 20:
        return None
    shares = first.share(first.chinese), second.share(second.chinese)
    if max(shares) > 0.7 and min(shares) < 0.1:
        return f"{shares[0]:.0%} of the thought and {shares[1]:.0%} of the answer are Chinese"
    return None


class EvaluationIndex(Protocol):
    """What `data.decontaminate` makes of evaluation sets."""

    def picture_hit(self, data: bytes) -> str | None: ...

    def question_hit(self, text: str) -> str | None: ...


def near_copy(index: EvaluationIndex | None, question: str, picture: bytes | None = None) -> str | None:
    """The evaluation item that the picture or the question is a near-copy of; no index, no copies."""
    if index is None:
        return None
    return (picture is not None and index.picture_hit(picture)) or index.question_hit(question) or None


def by_rules(question: str, reference: str, thought: str, answer: str) -> tuple[str, str] | None:
    """(filter, what it saw) of the first rule that drops an answer; None when all let it pass.

    `answer` still has the marks of its box. near_copy is not among them: it needs no answer, so it is asked before one
    is paid for.
    """
    checks = (
        (HEAVY_REPETITION, heavy_repetition(thought) or heavy_repetition(answer)),
        (LANGUAGE_MIXING, language_mixing(question, reference, thought, answer)),
        (GUESSWORK, guesswork(thought)),
        (CONTRADICTION, contradiction(thought, answer)),
        (WRONG_FINAL_ANSWER, wrong_final_answer(reference, answer)),
    )
    return next(((name, seen) for name, seen in checks if seen), None)


def counted(drops: dict[str, int], evaluated: bool) -> dict[str, int]:
    """The six filters' counts, the zeros too, for the manifest.

    Args:
        evaluated: whether evaluation sets were given. Without them nothing was looked for, which is no count of 0.
    """
    found = Counter(drops)
    return {name: found[name] for name in FILTERS if name != NEAR_COPY or evaluated}


def _shown(value: object) -> str:
    return str(value)
