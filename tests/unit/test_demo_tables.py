"""The demo's tables for VLMEvalKit: held-out content, VLMEvalKit's own forms, and questions that were lessons too."""

import base64
import csv
import io
import os
import random

import pytest
from PIL import Image

from qwen_merge.demo import answers, lessons, records, tables
from qwen_merge.demo.language import CHOICE_REQUEST, SHORT_REQUEST, choices, exchange, with_choices
from qwen_merge.demo.world import HELD_OUT_NUMBERS, Scene, Stream


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    tables.write(folder)
    return folder


def read(file) -> list[dict]:
    csv.field_size_limit(1 << 24)
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_the_tables_hold_right_answers_and_readable_held_out_pictures(written):
    choice, short = (read(written / f"{name}.tsv") for name in tables.TABLES)
    assert len(choice) == len(short) == 100
    assert set(short[0]) == {"index", "question", "answer", "category", "image"}
    for row in choice:
        options = [row[letter] for letter in "ABCD"]
        assert len(set(options)) == 4
        assert row["answer"] in "ABCD"
    spread = [sum(row["answer"] == letter for row in choice) for letter in "ABCD"]
    assert min(spread) > 10, "always the same letter would be right by guessing"
    numbers = [int(row["answer"]) for row in short if row["category"] == "number"]
    assert len(numbers) == 25
    assert set(numbers) <= HELD_OUT_NUMBERS
    for row in choice + short:
        assert Image.open(io.BytesIO(base64.b64decode(row["image"]))).size == (84, 84)
    assert tables.rows_of(tables.CHOICE, 1) != tables.rows_of(tables.CHOICE, 0)


def test_the_forms_are_those_of_vlmevalkit(written, monkeypatch, tmp_path):
    """What the lessons and the stages show is what its run.py asks; the control is the other table's form."""
    monkeypatch.setenv("LMUData", str(written))
    monkeypatch.chdir(tmp_path)
    from vlmeval.dataset import DATASET_TYPE, build_dataset
    from vlmeval.vlm.qwen2_vl.prompt import Qwen2VLPromptMixin

    scene = Scene("shape", "red", "circle")
    spoken = exchange(scene, "colour", random.Random(0))
    row = {"index": 0, "question": spoken.question, "answer": "B", "image": tables.rows_of(tables.CHOICE)[0]["image"]}
    options = choices("colour", "red", random.Random(0))
    dataset = build_dataset(tables.CHOICE)
    asked = dataset.build_prompt({**row, **options})[-1]["value"]
    assert asked == with_choices(spoken, options).question
    assert asked.endswith(CHOICE_REQUEST)
    assert DATASET_TYPE(tables.CHOICE, default=None) is None, "run.py would take another prompt"

    prompts = Qwen2VLPromptMixin()
    prompts.set_dump_image(dataset.dump_image)
    assert DATASET_TYPE(tables.SHORT, default=None) == "VQA"
    assert prompts.use_custom_prompt(tables.SHORT)
    asked = prompts.build_prompt(row, dataset=tables.SHORT)[-1]["value"]
    assert asked == f"{spoken.question}\n{SHORT_REQUEST}"
    assert os.path.isdir(written)


@pytest.mark.parametrize("name", ["geo3k", "image_thinking"])
def test_stages_2_2_and_3_show_both_forms(name):
    questions = [row["messages"][0]["content"] for row in records.rows_of(name, 300)]
    assert 30 < sum(CHOICE_REQUEST in question for question in questions) < 100
    assert 20 < sum(SHORT_REQUEST in question for question in questions) < 80


def test_the_text_lesson_shows_both_forms():
    class Words:  # the texts themselves, in place of their token ids
        @staticmethod
        def encode(text):
            return [text]

    stream = Stream("text", 0)
    prompts = [lessons.text_sample(stream, Words())[0][0] for _ in range(300)]
    assert sum(CHOICE_REQUEST in prompt for prompt in prompts) > 20
    assert sum(SHORT_REQUEST in prompt for prompt in prompts) > 10


def test_options_hold_the_truth_once_and_three_others_of_its_kind():
    for topic, truth in (("colour", "red"), ("count", "two"), ("number", "407"), ("word", "sun")):
        for seed in range(50):
            options = choices(topic, truth, random.Random(seed))
            assert list(options) == list("ABCD")
            assert list(options.values()).count(truth) == 1
            assert len(set(options.values())) == 4


def test_a_score_that_does_not_rise_is_a_missed_goal():
    scores = {"base": {"a": 2.0, "b": 30.0}, "stage3": {"a": 96.0, "b": 60.0}}
    missed = answers.missed_rises(scores)
    assert len(missed) == 1
    assert "VLMEvalKit, b: 60.0 % after stage 3 against 30.0 % before" in missed[0]
