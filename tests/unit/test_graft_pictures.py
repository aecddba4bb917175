"""A graft's processor and pictures that few have: thin, long, none at all, in lists; and settings that are no settings.

.venv/bin/python -m pytest tests/unit/test_graft_pictures.py
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from grafts import PROMPT, pictures
from qwen_merge import cli
from qwen_merge.architecture import register

register()


@pytest.fixture(scope="module")
def fixed(graft):
    return AutoProcessor.from_pretrained(graft("siglip", "mlp", "qwen3", "mrope"))


@pytest.fixture(scope="module")
def native(graft):
    return AutoProcessor.from_pretrained(graft("siglip2", "linear", "qwen3", "mrope"))


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (200, 3), (3, 200)])
def test_thin_pictures_are_the_tower_s_own_with_channels_last(fixed, size):
    """Of a picture 3 pixels high transformers would take the rows for its channels."""
    from transformers import SiglipImageProcessor

    picture = pictures(size)[0]
    found = fixed.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    settings = {**fixed.image_processor.tower_processor}
    own = SiglipImageProcessor(**{name: value for name, value in settings.items() if name != "image_processor_type"})
    pixels = own(images=np.asarray(picture), input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    rows, columns = fixed.image_processor.grid(*size[::-1])[1:]
    again = found.view(rows, columns, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, rows * 14, columns * 14)
    assert torch.equal(again, torch.from_numpy(pixels[:, : rows * 14, : columns * 14]))
    if size == (200, 3):  # the control
        wrong = own(images=np.asarray(picture), input_data_format="channels_first", return_tensors="np")
        assert not torch.equal(again, torch.from_numpy(wrong["pixel_values"][0][:, : rows * 14, : columns * 14]))


def test_a_long_picture_keeps_a_row_of_patches_and_the_bound(native):
    side, most = 14, 14 * 14 * 12
    for size in ((1400, 14), (14, 1400), (700, 20)):
        made = native.image_processor(images=pictures(size)[0], min_pixels=1, max_pixels=most, return_tensors="pt")
        _, rows, columns = made["image_grid_thw"][0].tolist()
        assert 1 <= rows * columns <= most // side**2
        assert len(made["pixel_values"]) == rows * columns
    assert native.image_processor.grid(14, 1400)[1:] != (0, 0)


def test_a_small_picture_is_made_as_large_as_a_token(graft):
    """As LLaMA-Factory's plug-in does in training: what is trained on can be asked."""
    processor = AutoProcessor.from_pretrained(graft("siglip2", "mlp", "qwen3", "mrope")).image_processor
    for size, grid in (((1, 1), (4, 4)), ((20, 200), (14, 2)), ((200, 3), (2, 14))):
        at_least = tuple(max(side, processor.patch_size * processor.factor) for side in size)
        assert processor(images=pictures(size))["image_grid_thw"].tolist() == [[1, *grid]]
        assert processor(images=pictures(at_least))["image_grid_thw"].tolist() == [[1, *grid]]
    with pytest.raises(ValueError, match="aspect ratio"):  # the control
        processor(images=pictures((1, 6000)))


def test_chat_says_what_it_cannot_show(graft, tmp_path, capsys):
    checkpoint = graft("siglip2", "mlp", "qwen3", "mrope")
    pictures((1, 6000))[0].save(tmp_path / "long.png")
    assert cli.main(["chat", str(checkpoint), "--image", str(tmp_path / "long.png"), "-q", "What?"]) == 2
    assert "aspect ratio must be smaller than 200" in capsys.readouterr().err
    (tmp_path / "own").mkdir()
    config = {"model_type": "qwen_merge_graft", "vision_config": {"model_type": "custom"}}
    (tmp_path / "own/config.json").write_text(json.dumps(config))
    assert cli.main(["chat", str(tmp_path / "own"), "-q", "What?"]) == 2
    assert "is code of its user's own, which is not run here" in capsys.readouterr().err


def test_no_pictures_are_none(native):
    for empty in ([], [[]], [[], []]):
        assert set(native(text=["Hello."] * max(1, len(empty)), images=empty)) == {"input_ids", "attention_mask"}
    assert set(native(text="Hello.", videos=[])) == {"input_ids", "attention_mask"}


def test_a_list_of_pictures_belongs_to_its_text(native):
    first, second = pictures((56, 56), (84, 56))
    with pytest.raises(ValueError, match=r"text 0 has 2 <\|image_pad\|>, and its list 1 pictures"):
        native(text=[PROMPT + PROMPT, "Hello."], images=[[first], [second]])
    together = native(text=[PROMPT, "Hello.", PROMPT], images=[[first], [], [second]])
    assert together["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6]]
    flat = native(text=[PROMPT + PROMPT, "Hello."], images=[first, second])  # in one list they go in order
    assert [row.count(native.image_token_id) for row in flat["input_ids"]] == [16 + 24, 0]


@pytest.mark.parametrize("name", ["pipeline", "AutoImageProcessor", "ProcessorMixin", None, ["a"]])
def test_settings_call_image_processors_and_nothing_else(graft, sources, tmp_path, capsys, name):
    """`transformers.pipeline` would fetch and run what the file says."""
    checkpoint = shutil.copytree(graft("siglip", "mlp", "qwen3", "mrope"), tmp_path / "changed")
    file = checkpoint / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    settings["tower_processor"] = {"image_processor_type": name, "task": "none-such"}
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="expected one of transformers' image processors"):
        AutoProcessor.from_pretrained(checkpoint).image_processor(images=Image.new("RGB", (56, 56)))
    if isinstance(name, str):
        tower = shutil.copytree(sources / "siglip", tmp_path / "siglip")
        (tower / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": name}))
        from grafts import write_recipe

        recipe = write_recipe(tmp_path / "graft.yaml", tower, "mlp", sources / "qwen3", tmp_path / "out")
        assert cli.main(["graft", str(recipe)]) == 2
        assert "expected one of transformers' image processors" in capsys.readouterr().err
