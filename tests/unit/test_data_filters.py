"""The six response filters, the reading of final answers, and the form of a reasoning VLM's answer.

Each filter is shown what it must drop and, as the control, what it must let pass.
"""

import random
from fractions import Fraction

import pytest

from qwen_merge.data.image_thinking.answer import Answer, checked, judgement, read_answer
from qwen_merge.data.teacher import filters
from qwen_merge.data.teacher.texts import (
    Final,
    finals_agree,
    is_chinese,
    languages,
    mark_in,
    reference_final,
    seed_of,
    share_of,
    stated_final,
)

THOUGHT = "The picture shows three red balls and two green ones, so together there are five balls on the table."


# --- what rules read ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", Final("option", "B")),
        ("(b)", Final("option", "B")),
        ("B.", Final("option", "B")),
        ("B. a red ball", Final("option", "B")),
        ("The answer is B.", Final("option", "B")),
        ("Answer: (C)", Final("option", "C")),
        ("答案：D", Final("option", "D")),
        ("1,234.5", Final("number", Fraction("1234.5"))),
        ("-3/4", Final("number", Fraction(-3, 4))),
        ("$\\frac{1}{2}$", Final("number", Fraction(1, 2))),
        ("25%", Final("number", Fraction(1, 4), True)),
        ("Yes.", Final("yes/no", "yes")),
        ("否", Final("yes/no", "no")),
        ("1/0", None),
        ("A red ball", None),
        ("I see a cat", None),
        ("5 cm", None),
        ("", None),
    ],
)
def test_a_references_final_answer(text, expected):
    assert reference_final(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("First A looks right, but no.\n\nThe answer is **B**.", Final("option", "B")),
        (r"so $x = 3$ and $\boxed{7}$", Final("number", Fraction(7))),
        ("It is <|begin_of_box|>12<|end_of_box|>, not 13.", Final("number", Fraction(12))),
        ("The answer is 4, so to say in words, four.\n\nThe answer is 4.", Final("number", Fraction(4))),
        ("故选C", Final("option", "C")),
        ("综上所述，答案是 D。", Final("option", "D")),
        (r"$\boxed{7}$, that is, $\boxed{7}$", Final("number", Fraction(7))),
        ("(C) the red ball", Final("option", "C")),
        ("So the answer is B (the red ball).", Final("option", "B")),
        ("So the answer is **C** because it is red.", Final("option", "C")),
        ("42", Final("number", Fraction(42))),
        ("The answer is 5 cm", None),
        ("The answer is a dog", None),
        ("A dog sleeps on the mat", None),
        # What a pattern cannot be sure of is for the judge.
        ("The answer is 3. Wait. The answer is 4.", None),
        (r"First $\boxed{3}$, then $\boxed{4}$", None),
        ("不选A。", None),
        ("这里不能选A。", None),
        ("应选B，而不选A。", None),
        ("选A是错误的", None),
        ("The wrong answer is 7.", None),
        ("It is not the case that the answer is 7.", None),
        ("If only red balls count, the answer is 3.", None),
        ("One could think the answer is A.", None),
        ("The answer is A, but the figure shows another.", None),
        ("The answer is A. The figure shows B, though.", None),
        ("So the answer is 3?", None),
        ("The answer is 3. The other box holds 4.", None),
        ("A. is wrong, B. is right", None),
        ("A. false\nB. true", None),
        ("The answer is A dog", None),
        ("The answer is A-frame.", None),
        ("The answer is A, C.", None),
    ],
)
def test_the_final_answer_that_a_text_states(text, expected):
    assert stated_final(text) == expected


@pytest.mark.parametrize(
    ("expected", "given", "agree"),
    [
        ("B", "B", True),
        ("B", "C", False),
        ("0.5", "1/2", True),
        ("100", "130", False),
        ("3.14159", "3.14", None),  # rounded, perhaps
        ("50%", "0.5", True),
        ("50%", "50", None),
        ("yes", "no", False),
        ("2", "B", None),
        ("0", "0", True),
        ("0", "1", False),
    ],
)
def test_final_answers_are_compared_only_where_a_rule_can_tell(expected, given, agree):
    assert finals_agree(reference_final(expected), reference_final(given)) is agree


# --- the filters ---


def test_wrong_final_answer():
    assert filters.wrong_final_answer("B", "It is red, so the answer is C.") == "C instead of B"
    assert filters.wrong_final_answer("12", r"Thus \boxed{15}") == "15 instead of 12"
    for reference, answer in [
        ("B", "It is red, so the answer is B."),
        ("12", "There are twelve of them."),  # for the judge
        ("A red ball", "The answer is C."),  # for the judge
        ("12.0", r"\boxed{12}"),
        ("B", "应选B，而不选A。"),
        ("5", "The answer is 5.\n\nNote that a common wrong answer is 7"),
    ]:
        assert filters.wrong_final_answer(reference, answer) is None


def test_heavy_repetition():
    words = ["the", "shape", "is", "red", "and", "round", "and", "it", "stands", "left", "of", "the", "green", "one"]
    assert "again and again" in filters.heavy_repetition("So. " + "Wait, let me look again. " * 20)
    assert "again and again" in filters.heavy_repetition("好的我再看一遍图片" * 12)
    paragraph = " ".join(random.Random(1).choices([*words, *"abcdefghij"], k=60))
    assert "were said before" in filters.heavy_repetition(f"{paragraph}. First. {paragraph} second {paragraph} third")
    passes = [
        " ".join(random.Random(2).choices([*words, *"abcdefghijklmnopq"], k=2000)),
        "Wait, let me look again. " * 3,
        "| " + " | ".join("0" for _ in range(200)) + " |",  # a matrix
        "",
    ]
    for text in passes:
        assert filters.heavy_repetition(text) is None


def test_guesswork():
    assert filters.guesswork("It is B.") == "a thought of 3 word(s)"
    assert "guess" in filters.guesswork(f"{THOUGHT} The rest cannot be read. I'll just guess B.")
    assert filters.guesswork(f"{THOUGHT} 看不清，只能猜一个。")
    assert filters.guesswork(THOUGHT) is None
    for decided in (
        "I guess the answer is 4.",
        "So B, I guess.",
        "I will pick one at random.",
        "I guess it's B.",
        "瞎猜B",
    ):
        assert (filters.guesswork(f"{THOUGHT} {decided}") or "").startswith("its thought ends with"), decided
    for reasoned in (
        "I guess the question asks for the sum, so the sum is 3 + 4 = 7.",
        "One could just guess, but counting gives five.",
        "I don't have to guess the answer here, since all are in view.",
        "If we pick one at random, it is red in three of five cases.",
        "A random guess is right in one of four cases.",
        "从袋中随机选一个球，是红球的概率是五分之三。",
        "I guess the answer is 4. Let me count again: there are five.",
    ):
        assert filters.guesswork(f"{THOUGHT} {reasoned}") is None, reasoned
    assert filters.guesswork(f"A first guess would be four, but counting helps. {THOUGHT * 5}") is None


def test_contradiction():
    assert (
        filters.contradiction(f"{THOUGHT} So the answer is B.", "The answer is C.")
        == "the thought says B, the answer C"
    )
    assert filters.contradiction(f"{THOUGHT} So the answer is B.", "The answer is B.") is None
    assert filters.contradiction(THOUGHT, "The answer is B.") is None  # the thought states none: for the judge
    assert filters.contradiction(f"{THOUGHT}所以答案是C。", "答案是B") == "the thought says C, the answer B"
    for thought, answer in [
        ("图中有三个红球，两个绿球，所以答案是B，不选A。", "答案是B"),
        ("We could be tempted to say the answer is A, but the figure shows B, so B it is.", "The answer is B."),
        (f"One could say, {'very ' * 90} quickly that the answer is A.", "The answer is B."),
        ("The answer is A. No: looked at closely, the figure shows B.", "The answer is B."),
    ]:
        assert filters.contradiction(thought, answer) is None


def test_language_mixing():
    question, reference = "How many balls are on the table?", "5"
    english = (
        "There are five balls on the table, three of them red and two of them green, which makes five balls in all."
    )
    chinese = "桌子上一共有五个球，其中三个是红色的，两个是绿色的，因此三加二等于五，所以桌子上总共有五个球。"
    mixed = english + "所以桌子上总共有五个球"
    mixes = filters.language_mixing
    assert "Chinese" in mixes(question, reference, mixed, english)
    assert "Chinese" in mixes(question, reference, chinese, "5")
    assert "another script" in mixes(question, reference, english + " поэтому ответ пять", english)
    assert "of the answer are Chinese" in mixes("桌子上有几个球？", "五个", chinese, english * 2)
    assert mixes(question, reference, english, english) is None
    assert mixes("桌子上有几个球？", "五个", chinese, "这道题用 Python 的 len(balls) 也能算，答案是五个") is None
    assert mixes("What does the sign say?", "停车", "The sign says 停车场, which is a place.", "停车") is None
    assert mixes("Solve for α", "π", "With Greek letters α, β, γ, δ, π, σ the sum is π here.", "π") is None
    assert mixes(question, reference, english, "Five: `print('五个球五个球五个球')`") is None  # code is no language


def test_near_copy():
    class Index:
        def picture_hit(self, data):
            return "MMStar 7" if data == b"seen" else None

        def question_hit(self, text):
            return "MMStar 9" if "balls" in text else None

    assert filters.near_copy(Index(), "x", b"seen") == "MMStar 7"
    assert filters.near_copy(Index(), "How many balls?", b"new") == "MMStar 9"
    assert filters.near_copy(Index(), "How many balls?") == "MMStar 9"
    assert filters.near_copy(Index(), "x", b"new") is None
    assert filters.near_copy(None, "How many balls?", b"seen") is None


def test_rules_name_the_filter_and_counts_hold_all_six():
    good = ("How many balls?", "5", THOUGHT, "The answer is 5.")
    assert filters.by_rules(*good) is None
    cases = {
        filters.HEAVY_REPETITION: (*good[:2], "Let me look again. " * 30, good[3]),
        filters.LANGUAGE_MIXING: (*good[:2], THOUGHT, "五个五个五个五个五个五个"),
        filters.GUESSWORK: (*good[:2], "Five.", good[3]),
        filters.CONTRADICTION: (*good[:2], f"{THOUGHT} The answer is 6.", good[3]),
        filters.WRONG_FINAL_ANSWER: (*good[:2], THOUGHT, "The answer is 9."),
    }
    assert {name: filters.by_rules(*case)[0] for name, case in cases.items()} == {name: name for name in cases}
    drops = {filters.GUESSWORK: 3, "judged poor": 2}
    assert filters.counted(drops, evaluated=True) == {
        "wrong final answer": 0,
        "heavy repetition": 0,
        "guesswork without reasoning": 3,
        "thought and summary contradict": 0,
        "language mixing": 0,
        "near-copy of an evaluation item": 0,
    }
    # Without evaluation sets nothing was compared with them, and "0" would say that none was found.
    without = filters.counted(drops, evaluated=False)
    assert without == {name: n for name, n in filters.counted(drops, evaluated=True).items() if name in without}
    assert "near-copy of an evaluation item" not in without
    assert len(without) == 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"final_answer_correct": False}, "wrong final answer"),
        ({"guesswork": True}, "guesswork without reasoning"),
        ({"contradiction": True}, "thought and summary contradict"),
        ({"rating": "fair"}, "judged fair"),
        ({"rating": "poor"}, "judged poor"),
    ],
)
def test_what_a_verdict_decides(change, reason):
    verdict = {
        "reason": "r",
        "final_answer_correct": True,
        "guesswork": False,
        "contradiction": False,
        "rating": "good",
    }
    assert judgement(verdict | change) == reason


def test_no_verdict_is_no_good_one():
    assert judgement(None) == "verdict unreadable"


# --- the form of an answer ---


def entry(text: str, finish: str = "stop") -> dict:
    return {"id": "x", "text": text, "finish_reason": finish}


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<think>a</think><answer>b</answer>", "<think>\na\n</think>\n\nb"),
        ("<think>\na\n</think>\n\n<answer>\nb\n</answer>\n<|user|>", "<think>\na\n</think>\n\nb"),
        ("<think>a</think>See: <answer>b", "<think>\na\n</think>\n\nSee: b"),
        (
            "<think>a</think><answer>It is <|begin_of_box|>b<|end_of_box|>.</answer>",
            "<think>\na\n</think>\n\nIt is b.",
        ),
    ],
)
def test_tags_go_and_contents_stay(text, content):
    found = read_answer(entry(text))
    assert isinstance(found, Answer)
    assert found.content == content


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (entry("<answer>b</answer>"), "answer without <think>…</think>"),
        (entry("<think>a<answer>b</answer>"), "answer without <think>…</think>"),
        (entry("<think>a</think><think>a</think><answer>b</answer>"), "answer without <think>…</think>"),
        (entry("so <think>a</think><answer>b</answer>"), "answer without <think>…</think>"),
        (entry("<think>a</think>b"), "answer without <answer>"),
        (entry("<think>a</think><answer></answer>"), "empty answer"),
        (entry("<think>a</think><answer>an <image></answer>"), "media tag or control token in the answer"),
        (entry("<think>a <|im_end|></think><answer>b</answer>"), "media tag or control token in the answer"),
        (entry("<think>a</think><answer>b", "length"), "answer cut off by length"),
        (entry("<think>a</think><answer>b", "content_filter"), "answer ended by content_filter"),
        ({"id": "x", "refused": "400"}, "question refused by the teacher's server"),
    ],
)
def test_answers_of_no_use(line, reason):
    assert read_answer(line) == reason


def test_a_checked_answer_has_passed_form_and_rules():
    text = f"<think>{THOUGHT}</think><answer><|begin_of_box|>5<|end_of_box|></answer>"
    found, reason, _ = checked(entry(text), "How many balls?", "5")
    assert (found.text, reason) == ("5", "")
    assert checked(entry(text), "How many balls?", "7")[:2] == (None, "wrong final answer")
    unboxed = f"<think>{THOUGHT}</think><answer>The answer is 5.</answer>"
    assert checked(entry(unboxed), "How many balls?", "7")[1:] == ("wrong final answer", "5 instead of 7")
    assert checked(entry(unboxed), "How many balls?", "5")[1] == ""
    assert checked(entry(text, "length"), "How many balls?", "5")[:2] == (None, "answer cut off by length")


# --- the rest ---


@pytest.mark.parametrize(
    "text", ["an <image> here", "<video>", "<|im_end|>", "<|image_pad|>", "<think>", "</tool_call>"]
)
def test_marks_are_found(text):
    assert mark_in(text) in text


@pytest.mark.parametrize("text", ["a < b | c > d", "<img>", "image", "<|>", "a <| b |> c"])
def test_other_brackets_are_text(text):
    assert mark_in(text) is None


def test_languages():
    assert is_chinese("请问 Python 是什么？")
    assert not is_chinese("What does 你好 mean in English?")
    found = languages("$\\alpha + x$ `code 中文` hello 世界 https://a.bc/de")
    assert (found.chinese, found.latin, found.other) == (1, 1, 0)


def test_seeds_and_shares_depend_on_their_arguments_alone():
    assert seed_of(0, "a") == 1252016353
    assert len({seed_of(0, "a"), seed_of(1, "a"), seed_of(0, "b"), seed_of(0, "a", 1)}) == 4
    shares = [share_of(0, str(i)) for i in range(2000)]
    assert 0 <= min(shares) <= max(shares) < 1
    assert abs(sum(share < 0.5 for share in shares) / 2000 - 0.5) < 0.04
