"""Converted sets in LLaMA-Factory: it loads what `data convert` wrote, and trains on it as `data check` said."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_sources import (
    broken_pictures,
    jpeg,
    odd_pictures,
    page,
    png,
    recap_features,
    recap_row,
    synthdog_features,
    turns,
    write_parquet,
)
from qwen_merge import cli
from qwen_merge.data import check_recipe
from qwen_merge.data.check import check
from qwen_merge.data.check_rows import CUT_PICTURE
from qwen_merge.data.schema import Record
from record_sets import THOUGHT, picture, settings, write_set
from record_sets import turns as messages
from training import recipe, train

pytestmark = pytest.mark.slow

CONVERTED = "LLaVA_ReCap_558K,synthdog_en,synthdog_zh,geo3k"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A dataset_dir made by the commands that a user types, which name the sets in its dataset_info.json."""
    folder = tmp_path_factory.mktemp("converted")
    output = folder / "data"
    output.mkdir()
    odd, broken = odd_pictures(), broken_pictures()
    pictures = [*odd.values(), *broken.values(), jpeg(700, 500, 1)]
    captions = [recap_row(number, data) for number, data in enumerate(pictures)]
    write_parquet(folder / "recap/train-00000-of-00001.parquet", captions, recap_features())
    for language, text in (("en", "Some words of a page."), ("zh", "一页上的字。")):
        pages = [{"image": jpeg(90, 120, seed), "ground_truth": page(f"{text} {seed}")} for seed in range(4)]
        write_parquet(folder / language / "train-00000-of-00001.parquet", pages, synthdog_features())
    questions = [
        recap_row(number, png(64, 64, number), turns("<image>\nHow wide?", "Two.", "How high?", f"{number}."))
        for number in range(5)
    ]
    write_parquet(folder / "geo3k/train-00000-of-00001.parquet", questions, recap_features())
    for name, source in (
        ("LLaVA_ReCap_558K", "recap"), ("synthdog_en", "en"), ("synthdog_zh", "zh"), ("geo3k", "geo3k"),
    ):  # fmt: skip
        assert cli.main(["data", "convert", name, "--input", str(folder / source), "--output", str(output)]) == 0
    return output


def loaded(config: dict) -> list[dict]:
    """Rows of the first set as LLaMA-Factory's own loader gives them to its tokenizer."""
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list

    arguments, problems = check_recipe.parse(config)
    assert arguments is not None, problems
    (attributes,) = get_dataset_list(arguments.data.dataset[:1], arguments.data.dataset_dir)
    return list(_load_single_dataset(attributes, arguments.model, arguments.data, arguments.training))


def test_picture_bytes_come_through_the_loader_unchanged(data, tied, tmp_path):
    config = settings(data, tied.merged, "LLaVA_ReCap_558K", cache_dir=str(tmp_path / "cache"))
    expected = [*odd_pictures().values(), jpeg(700, 500, 1)]
    assert [row["_images"][0]["bytes"] for row in loaded(config)] == expected

    # Control: the same rows with Hugging Face's feature metadata are decoded, and cannot come out as they went in.
    from datasets import Features, Image, Sequence, Value

    features = Features(
        {"messages": [{"role": Value("string"), "content": Value("string")}], "images": Sequence(Image())}
    )
    other = tmp_path / "data"
    shutil.copytree(data / "LLaVA_ReCap_558K", other / "LLaVA_ReCap_558K")
    shutil.copy(data / "dataset_info.json", other)
    for file in (other / "LLaVA_ReCap_558K").iterdir():
        table = pq.read_table(file)
        marked = {"info": {"features": features.to_dict()}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(marked)}), file)
    images = [row["_images"][0] for row in loaded({**config, "dataset_dir": str(other)})]
    stored = [image["bytes"] if isinstance(image, dict) else None for image in images]
    assert stored != expected


def test_tokens_of_converted_sets_are_llama_factorys(data, tied, tmp_path):
    from llamafactory.data import get_dataset

    config = settings(data, tied.merged, CONVERTED, template="qwen_merge_vl_pt", mask_history=False)
    config["cache_dir"] = str(tmp_path / "cache")
    result = check(config)
    assert result.problems == []
    assert result.notes == []
    arguments, _ = check_recipe.parse(config)
    tokenizer, processor, template = check_recipe.load(arguments)
    module = get_dataset(
        template, arguments.model, arguments.data, arguments.training, "sft", tokenizer=tokenizer, processor=processor
    )
    lengths = [len(ids) for ids in module["train_dataset"]["input_ids"]]
    counted = [(each.samples, each.tokens) for each in result.sets]
    starts = [0, *(sum(samples for samples, _ in counted[: index + 1]) for index in range(len(counted)))]
    assert [sum(lengths[a:b]) for a, b in pairwise(starts)] == [tokens for _, tokens in counted]
    assert [samples for samples, _ in counted] == [len(odd_pictures()) + 1, 4, 4, 5]


def trained(stage: str, model: Path, data: Path, output: Path, **overrides):
    """One launch of a recipe; its log, and the check of what it was launched with."""
    wanted = {"max_steps": -1, "num_train_epochs": 0.1, "gradient_accumulation_steps": 2, **overrides}
    loud = {"LLAMAFACTORY_VERBOSITY": "INFO", "TRANSFORMERS_VERBOSITY": "info"}  # the check made this process silent
    run = train(recipe("4B", stage), model=model, output=output, data=data, check=False, variables=loud, **wanted)
    changed = {"per_device_train_batch_size": 2, "dataset_dir": str(data), **wanted}
    config = check_recipe.read(recipe("4B", stage), [f"{key}={value}" for key, value in changed.items()], str(model))
    return run, check(config, world_size=1)


def said(log: str, what: str) -> int:
    found = re.search(rf"{what} = ([\d,]+)", log)
    assert found, log[-3000:]
    return int(found[1].replace(",", ""))


def test_converted_sets_train_and_the_log_says_what_the_check_said(data, tied, tmp_path):
    run, result = trained("2.1", tied.merged, data, tmp_path / "out", dataset=CONVERTED)
    assert run.returncode == 0, run.stdout[-6000:]
    assert result.problems == []
    assert result.steps is not None
    assert said(run.stdout, "Num examples") == result.steps.samples
    assert said(run.stdout, "Total optimization steps") == result.steps.total
    assert said(run.stdout, r"Total train batch size \(w. parallel, distributed & accumulation\)") == 4
    assert result.steps.global_batch == 4


def distilled(folder: Path) -> Path:
    """Stage 3's sets: reasoned answers about pictures, and one question left as text."""
    rows = [Record(messages(f"<image>Question {i}?", f"{THOUGHT}{i}."), [picture(56 + 28 * i, 56)]) for i in range(5)]
    write_set(folder, "text2image", [*rows, Record(messages("What is 1 + 1? /no_think", "2."), [])])
    write_set(folder, "image_thinking", rows[:3])
    return folder


def test_distilled_sets_train(tied, tmp_path):
    run, result = trained("3", tied.merged, distilled(tmp_path / "data"), tmp_path / "out")
    assert run.returncode == 0, run.stdout[-6000:]
    assert result.problems == []
    assert result.steps is not None
    assert (result.steps.samples, result.steps.total) == (9, 1)
    assert said(run.stdout, "Num examples") == 9
    assert said(run.stdout, "Total optimization steps") == 1


def test_control_a_picture_that_is_cut_away_does_stop_the_training(tied, tmp_path):
    """What LLaMA-Factory prepares without a word, and the check calls a problem."""
    folder = distilled(tmp_path / "data")
    shutil.rmtree(folder / "image_thinking")
    long = messages("<image>What is it?", "A circle.", "Why? " * 40, "So. " * 40)
    write_set(folder, "image_thinking", [Record(long, [picture(112, 112)])] * 12)
    run, result = trained("3", tied.merged, folder, tmp_path / "out", cutoff_len=120, num_train_epochs=1)
    assert [CUT_PICTURE in problem for problem in result.problems] == [True]
    assert run.returncode != 0
    assert "image" in run.stdout[-3000:].lower()
