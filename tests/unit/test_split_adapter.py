"""`qwen-merge split-adapter` and folders that do not belong together: nothing is written, and it is said why.

.venv/bin/python -m pytest tests/unit/test_split_adapter.py
"""

import shutil

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

import grafts
from qwen_merge import cli
from qwen_merge.architecture import register

register()


@pytest.fixture(scope="module")
def folders(graft, tmp_path_factory):
    """base, its adapter (LoRA of the LLM, projector whole), the same without the projector; another, narrower graft."""
    folder, base = tmp_path_factory.mktemp("split"), graft("siglip", "mlp", "qwen3", "mrope")
    for name, whole in (("adapter", ["projector"]), ("low-rank", None)):
        model = AutoModelForImageTextToText.from_pretrained(base)
        targets = r"model\.language_model\..*\.(q_proj|down_proj)"
        get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=whole)).save_pretrained(
            folder / name
        )
    llm = grafts.make_llm(folder / "llm", tied=False, dtype="float32", intermediate_size=48)
    parts = (graft.folder / "siglip", "mlp", llm, folder / "other")
    assert cli.main(["graft", str(grafts.write_recipe(folder / "other.yaml", *parts))]) == 0
    return base, folder


def split(adapter, base, output) -> int:
    return cli.main(["split-adapter", str(adapter), "--base", str(base), "--output", str(output)])


@pytest.mark.parametrize("adapter", ["adapter", "low-rank"])
def test_a_base_of_other_shapes_is_refused(folders, tmp_path, capsys, adapter):
    base, folder = folders
    assert split(folder / adapter, folder / "other", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "was not trained on" in said
    assert "layers.0.mlp.down_proj.lora_A.weight is [2, " in said
    assert not list(tmp_path.iterdir())
    assert split(folder / adapter, base, tmp_path / "out") == 0  # the control
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out/base").iterdir()} == names - {"merge_manifest.json"} != names


def test_broken_folders_are_refused(folders, tmp_path, capsys):
    base, folder = folders
    shutil.copytree(folder / "adapter", tmp_path / "torn")
    weights = tmp_path / "torn/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert split(tmp_path / "torn", base, tmp_path / "out") == 2
    assert "is cut short" in capsys.readouterr().err
    (tmp_path / "torn/adapter_config.json").write_text("[1]")
    assert split(tmp_path / "torn", base, tmp_path / "out") == 2
    assert "is no adapter" in capsys.readouterr().err
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    for index, message in (("{", "is not valid JSON"), ("{}", "weight_map"), (None, "neither")):
        file = tmp_path / "base/model.safetensors.index.json"
        file.unlink() if index is None else file.write_text(index)
        assert split(folder / "adapter", tmp_path / "base", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
