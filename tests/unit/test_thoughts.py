"""Where an answer begins, and what is in its box."""

import pytest

from qwen_merge.evaluation.thoughts import Split, boxed, split


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>A or B?</think>\n\nB", Split("A or B?", "B", True)),
        ("A or B?\n</think>\n\nB", Split("A or B?", "B", True)),  # the prompt had opened the thought
        ("<think>\nA, so the answer is A", Split("A, so the answer is A", "", False)),
        ("B", Split("", "B", None)),
        ("", Split("", "", None)),
        ("<think>\n\n</think>\n\nB", Split("", "B", True)),
        ("<think>a</think>b</think> C ", Split("a</think>b", "C", True)),  # the last one counts
        ("<think>a</think>B <think>or C", Split("a</think>B or C", "", False)),
        ("<think>a</think>", Split("a", "", True)),  # finished, and said nothing
    ],
)
def test_the_answer_follows_the_thought(text, expected):
    assert split(text) == expected


def test_a_thought_that_the_prompt_opened_is_unfinished_without_its_end():
    assert split("A or B?", opened=True) == Split("A or B?", "", False)
    assert split("A or B?", opened=False) == Split("", "A or B?", None)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"so \boxed{B}.", "B"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{2}", r"\boxed{\frac{1}{2}"),  # never closed: nothing is cut
        (r"\boxed{}", ""),
        ("B", "B"),
        ("{B}", "{B}"),
        ("", ""),
    ],
)
def test_the_last_box_counts_with_its_braces(answer, expected):
    assert boxed(answer) == expected
