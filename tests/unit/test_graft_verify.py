"""`qwen-merge verify` of grafts: what is sound passes whole, and each thing that is changed is named."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from grafts import HAS_QWEN3_VL
from qwen_merge import cli


@pytest.mark.parametrize(
    "parts",
    [
        ("siglip", "mlp", "qwen3", "mrope"),
        ("qwen2_vl", "linear", "qwen2", "1d"),
        ("dinov2", "resampler", "qwen2", "mrope"),
        ("qwen2_5_vl", "extended", "qwen3_moe", "mrope"),
        ("siglip2", "linear", "qwen3", "mrope"),
        *HAS_QWEN3_VL * [("qwen3_vl", "extended", "qwen3", "mrope")],
    ],
    ids="-".join,
)
def test_a_graft_passes_every_check(graft, capsys, parts):
    assert cli.main(["verify", str(graft(*parts))]) == 0
    assert "7 passed, 0 failed, 0 not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("visual.vision_model.encoder.layers.0.mlp.fc1.weight", "copied from VLM"),
        ("model.layers.1.self_attn.q_proj.weight", "copied from LLM"),
        ("projector.mlp.0.weight", "new tensors"),
    ],
)
def test_control_one_changed_number_is_named(graft, capsys, tmp_path, name, check):
    folder = shutil.copytree(graft("siglip", "mlp", "qwen3", "mrope"), tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[3] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert cli.main(["verify", str(folder), "--no-forward"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert check in failed[0]
    assert name in failed[0]


def test_a_missing_tensor_and_other_sources_are_named(graft, capsys, tmp_path):
    folder = shutil.copytree(graft("siglip", "mlp", "qwen3", "mrope"), tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    del weights["projector.norm.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert cli.main(["verify", str(folder), "--no-forward"]) == 1
    assert "missing projector.norm.bias" in capsys.readouterr().out
    assert cli.main(["verify", str(folder), "--llm-path", str(graft.folder / "qwen2")]) == 1
    assert "these sources do not make this checkpoint" in capsys.readouterr().out


def test_what_there_is_nothing_to_compare_with(graft, capsys, tmp_path):
    folder = shutil.copytree(graft("siglip", "mlp", "qwen3", "mrope"), tmp_path / "trained")
    (folder / "merge_manifest.json").unlink()
    assert cli.main(["verify", str(folder)]) == 2
    out, error = capsys.readouterr()
    assert "NOT CHECKED" not in out
    assert f"nothing of {folder} could be checked: no merge_manifest.json says where the VLM is" in error
    assert "before training" in error
    sources = ["--vlm-path", str(graft.folder / "siglip"), "--llm-path", str(graft.folder / "qwen3")]
    assert cli.main(["verify", str(folder), "--no-forward", *sources]) == 0  # the control: named, they are compared
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert cli.main(["verify", str(folder), "--no-forward", *sources]) == 1
    assert "before training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"vision_config": "x"}, "its config.json is no graft's"),
        ("merge_manifest.json", {"tensors": {"new_rows": {"none": [1]}}}, "the manifest has new rows of none: [1]"),
        ("merge_manifest.json", {"tensors": {"new_rows": {"model.layers.0.mlp.up_proj.weight": [1]}}}, "new rows of"),
        ("merge_manifest.json", {"tensors": {"new_rows": [1]}}, "tensors.new_rows [1], which no merge writes"),
    ],
)
def test_what_is_no_graft_s_is_said(graft, capsys, tmp_path, file, change, message):
    folder = shutil.copytree(graft("siglip", "mlp", "qwen3", "mrope"), tmp_path / "changed")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **change}))
    assert cli.main(["verify", str(folder), "--no-forward"]) != 0
    assert message in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"positions": "1d"}),
        ("config.json", {"image_token_id": 3}),
        ("preprocessor_config.json", {"image_mean": [0, 0, 0]}),
        ("tokenizer.json", None),
        ("modeling_qwen_merge_graft.py", None),
    ],
)
def test_what_is_in_no_tensor_is_compared_with_what_was_written(graft, capsys, tmp_path, file, change):
    folder = shutil.copytree(graft("siglip", "mlp", "qwen3", "mrope"), tmp_path / "changed")
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    assert cli.main(["verify", str(folder), "--no-forward"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1
    assert f"{file} is not what was written" in failed[0]
