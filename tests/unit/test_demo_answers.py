"""From a model's words to a table: thoughts are cut off, values are found, goals are checked."""

import pytest

from qwen_merge.demo.answers import Question, accuracies, missed_goals, right, split_thought, table, values_named
from qwen_merge.demo.language import CHANCE


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("red", "", "red"),
        ("<think>\nI see red.\n</think>\n\nred", "I see red.", "red"),
        ("<think>\n\n</think>\n\nred", "", "red"),
        ("<think>\nred, red, red", "red, red, red", ""),  # never closed: no answer
        ("I see red.\n</think>\n\nblue", "I see red.", "blue"),  # the tag was part of the prompt
    ],
)
def test_thoughts_are_cut_off(text, thought, answer):
    assert split_thought(text) == (thought, answer)


@pytest.mark.parametrize(
    ("topic", "text", "values"),
    [
        ("colour", "two red circles", {"red"}),
        ("shape", "two red circles", {"circle"}),
        ("shape", "three black crosses", {"cross"}),
        ("count", "two red circles", {"two"}),
        ("colour", "red or Blue", {"red", "blue"}),
        ("colour", "hatred", set()),
        ("number", "the number 472", {"472"}),
        ("number", "4721", {"4721"}),
        ("sum", "the sum 3+4", {"3", "4"}),
    ],
)
def test_values_in_an_answer(topic, text, values):
    assert values_named(topic, text) == values


def test_an_answer_is_right_when_it_names_the_truth_alone():
    question = Question("colour", "What colour is it?", "red", 0)
    assert right(question, "<think>\nI see one blue circle.\n</think>\n\nred")
    assert right(question, "one red circle")
    assert not right(question, "red or blue")
    assert not right(question, "<think>\nred")
    assert not right(question, "")


def test_accuracy_is_counted_for_each_topic():
    questions = [Question("colour", "", "red", 0), Question("colour", "", "blue", 1), Question("number", "", "472", 2)]
    assert accuracies(questions, ["red", "red", "472"]) == {"colour": 0.5, "number": 1.0}


def result(accuracy: float, control: float) -> dict:
    shares = dict.fromkeys(CHANCE, accuracy)
    return {"caption_loss": 0.5, "answer_loss": 0.25, "accuracy": shares, "control": dict.fromkeys(CHANCE, control)}


def test_goals_that_are_met():
    results = {"base": result(0.1, 0.1), "stage1": result(0.5, 0.1), "stage3": result(1.0, 0.1)}
    assert missed_goals(results) == []


def test_each_missed_goal_is_named():
    results = {"base": result(0.1, 0.1), "stage1": result(0.2, 0.1), "stage3": result(0.92, 0.5)}
    missed = missed_goals(results)
    assert [line.split(":")[0] for line in missed] == [
        "stage 3, colour",
        "control, colour",
        "control, shape",
        "stage 3, number",
        "control, number",
        "stage 1, colour and shape",
    ]
    assert missed[0] == "stage 3, colour: 92.0% right, the goal is 95%"


def test_the_table_has_a_row_for_each_checkpoint_chance_and_the_control():
    lines = table({"base": result(0.125, 0.1), "stage3": result(1.0, 0.2)}).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["after", "base", "stage3", "chance", "stage3, shuffled"]
    assert lines[0].split() == ["after", "caption", "loss", "answer", "loss", *CHANCE]
    assert lines[1].split()[1:] == ["0.500", "0.250", *["12.5"] * len(CHANCE)]
    assert lines[3].split()[1:] == ["16.7", "20.0", "25.0", "0.1", "8.3", "5.9"]
    assert lines[4].split()[2:] == ["20.0"] * len(CHANCE)
    assert len({len(line) for line in lines}) == 1
