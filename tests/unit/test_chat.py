"""`qwen-merge chat`: telling thoughts from answers as they come, and what it refuses."""

import pytest

from qwen_merge.chat.conversation import ThoughtSplitter
from qwen_merge.cli import main


def pieces(texts: list[str]) -> tuple[str, str]:
    """(thought, answer) of a text that comes in these pieces."""
    splitter = ThoughtSplitter()
    out = [piece for text in texts for piece in splitter.feed(text)] + splitter.flush()
    assert all(text for _, text in out)
    kinds = [kind for kind, _ in out]
    assert kinds == sorted(kinds, reverse=True), "the thought comes first"
    return tuple("".join(text for kind, text in out if kind == wanted) for wanted in ("thought", "answer"))


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nRound, red.\n</think>\n\nA circle.", "\nRound, red.\n", "\n\nA circle."),
        ("\n<think>Red.</think>A circle.", "Red.", "A circle."),
        ("A circle.", "", "A circle."),
        ("<th", "", "<th"),  # what could have become a tag and did not
        ("1 < 2", "", "1 < 2"),
        ("<think>a </thin b</think>c", "a </thin b", "c"),
        ("<think>never closed </th", "never closed </th", ""),
        ("Not first: <think>a</think>", "", "Not first: <think>a</think>"),
        ("", "", ""),
    ],
)
def test_a_tag_may_be_cut_anywhere(text, thought, answer):
    assert pieces([text]) == (thought, answer)
    assert pieces(list(text)) == (thought, answer)
    for cut in range(len(text)):
        assert pieces([text[:cut], text[cut:]]) == (thought, answer)


def test_a_thought_is_shown_before_it_ends():
    splitter = ThoughtSplitter()
    assert splitter.feed("<think>Round") == [("thought", "Round")]
    assert splitter.feed(" and red") == [("thought", " and red")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "neither MODEL_DIR nor --endpoint given"),
        (["DIR", "--endpoint", "http://localhost:1/v1"], "both MODEL_DIR and --endpoint given"),
        (["DIR", "--image", "gone.png", "-q", "What?"], "no such file: gone.png"),
        (["DIR", "-q", "What?"], "DIR is not a checkpoint: it has no config.json"),
        (["DIR", "--thinking-budget", "5", "-q", "What?"], "--thinking-budget is an option of the server"),
        (["--endpoint", "http://127.0.0.1:1/v1", "-q", "What?"], "no model found at http://127.0.0.1:1/v1"),
    ],
)
def test_what_cannot_work_is_said(arguments, said, capsys):
    assert main(["chat", *arguments]) == 2
    assert said in capsys.readouterr().err
