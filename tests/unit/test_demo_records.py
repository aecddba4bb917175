"""The data sets of the demo: the names that the real recipes ask for, in the format that LLaMA-Factory reads."""

import io
import json

import pytest

from qwen_merge.demo import records
from qwen_merge.demo.stages import DATASET_INFO, STAGES, overrides, root
from qwen_merge.errors import UserError


@pytest.fixture(scope="module")
def names():
    return records.names_in([root() / stage.recipe for stage in STAGES])


def test_every_set_of_the_recipes_has_content(names):
    assert len(names) == 5 + 84 + 2
    assert len(set(names)) == len(names)
    for name in names:
        for row in records.rows_of(name, 12):
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            contents = [message["content"] for message in row["messages"]]
            assert all(contents)
            # LLaMA-Factory refuses a record whose placeholders and pictures differ in number.
            assert [content.count("<image>") for content in contents] == [1] + [0] * (len(contents) - 1)
            assert contents[0].startswith("<image>\n")
            assert len(row["images"]) == 1


def test_some_onevision_rows_have_several_turns_and_only_stage_3_thinks(names):
    def answers(name):
        return [row["messages"] for row in records.rows_of(name, 150)]

    assert any(len(messages) > 2 for messages in answers("geo3k"))
    assert not any("<think>" in message["content"] for messages in answers("geo3k") for message in messages)
    for name in ("text2image", "image_thinking"):
        rows = answers(name)
        told_not_to = [messages[0]["content"].endswith(" /no_think") for messages in rows]
        thinks = [messages[1]["content"].startswith("<think>\n") for messages in rows]
        assert any(told_not_to)
        assert any(thinks)
        assert all(a != b for a, b in zip(told_not_to, thinks, strict=True))


def test_written_files_load_with_the_schema_of_the_real_sets(tmp_path, monkeypatch):
    from datasets import load_dataset
    from PIL import Image

    monkeypatch.setitem(records.ROWS, "synthdog_zh", 5)
    monkeypatch.setattr(records, "ROWS_OF_EACH_ONEVISION_SET", 3)
    assert records.write(tmp_path / "data", root() / DATASET_INFO, ["synthdog_zh", "GeoQA+_MathV360K"]) == 8
    described = json.loads((tmp_path / "data/dataset_info.json").read_text())
    assert list(described) == ["synthdog_zh", "GeoQA+_MathV360K"]
    for name, rows in (("synthdog_zh", 5), ("GeoQA+_MathV360K", 3)):
        assert described[name]["formatting"] == "sharegpt"
        folder = tmp_path / "data" / described[name]["file_name"]
        files = [str(path) for path in folder.iterdir()]
        table = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(table) == rows
        assert list(table[0]["messages"][0]) == ["role", "content"]
        image = table[0]["images"][0]
        assert Image.open(io.BytesIO(image["bytes"])).size == (84, 84)


def test_the_same_seed_gives_the_same_rows():
    assert records.rows_of("geo3k", 5) == records.rows_of("geo3k", 5)
    assert records.rows_of("geo3k", 5) != records.rows_of("geo170k_qa", 5)


def test_a_set_without_a_description_is_named(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="geo3k: not in"):
        records.write(tmp_path / "data", tmp_path / "dataset_info.json", ["geo3k"])


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_changes_to_a_recipe_have_a_reason_and_leave_its_meaning(stage, tmp_path):
    import yaml

    recipe = yaml.safe_load((root() / stage.recipe).read_text())
    changes = overrides(stage, tmp_path, tmp_path, tmp_path, 0)
    keys = [key for key, _, _ in changes]
    assert len(set(keys)) == len(keys)
    assert all(reason for _, _, reason in changes)
    # What makes the stage the stage stays the recipe's.
    kept = {"dataset", "template", "freeze_vision_tower", "freeze_language_model", "freeze_multi_modal_projector"}
    assert not kept & set(keys)
    assert kept <= set(recipe)
    assert set(keys) - set(recipe) == {"use_cpu"}
    assert recipe["template"] == {"pt": "qwen_merge_vl_pt", "chat": "qwen_merge_vl"}[stage.form]
