"""`qwen-merge verify` passes what is right, names what is wrong, and never passes what it did not look at.

Also what users do with a merged checkpoint right away: load it in a transformers that does not know the architecture,
and talk to it with pictures.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import TOKEN_IDS, make_llm, make_vlm, write_json
from qwen_merge.cli import build_parser
from qwen_merge.errors import UserError
from qwen_merge.merger.configuration import RopeOptions
from qwen_merge.merger.merge import MANIFEST, MergeOptions, merge
from qwen_merge.merger.safetensors_file import read_header
from qwen_merge.merger.verify import verify

CHECKS = [
    "tensors", "configuration", "companion files", "copied from VLM", "copied from LLM", "new layer", "text logits",
    "vision features",
]  # fmt: skip


@pytest.fixture
def run(capsys):
    """Verify a directory; (exit code, {check: (verdict, detail)}, last line)."""

    def verified(directory, **options):
        capsys.readouterr()
        code = verify(directory, **options)
        *lines, last = capsys.readouterr().out.splitlines()
        checks = [line for line in lines if not line.startswith("NOTE")]
        return code, {line[13:29].strip(): (line[:12].strip(), line[30:]) for line in checks}, last

    return verified


@pytest.fixture
def copy(tied, tmp_path):
    """A copy of a merged checkpoint that a test may break; its manifest still names the sources."""
    return shutil.copytree(tied.merged, tmp_path / "merged")


def verdicts(results) -> dict[str, str]:
    return {check: verdict for check, (verdict, _) in results.items()}


def flip(directory: Path, name: str, byte: int = 0) -> None:
    """Change one bit of a tensor."""
    path = directory / "model.safetensors"
    at = read_header(path)[name].start + byte
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 0x40]))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_merge_passes_every_check(request, run, kind):
    code, results, last = run(request.getfixturevalue(kind).merged)
    assert code == 0
    assert verdicts(results) == dict.fromkeys(CHECKS, "PASS")
    assert "equal byte for byte" in results["copied from LLM"][1]
    assert "equal bit for bit (float32)" in results["text logits"][1]
    assert "rounding allows" in results["vision features"][1]  # attention is computed in another order
    assert last.endswith("8 passed, 0 failed, 0 not checked")


def test_other_forms_pass_too(run, tmp_path):
    """Re-saved VLM, many shards, bfloat16 sources written as float32: the conversion is verified as well."""
    vlm, llm = make_vlm(tmp_path / "vlm", resaved=True, shards=3), make_llm(tmp_path / "llm", tied=False, shards=2)
    options = {"max_shard_size": "200KB", "dtype": "float32"}
    merge(MergeOptions(vlm=str(vlm), llm=str(llm), output=tmp_path / "out", **options))
    code, results, _ = run(tmp_path / "out")
    assert code == 0
    assert verdicts(results) == dict.fromkeys(CHECKS, "PASS")
    assert "equal converted as the merge does" in results["copied from VLM"][1]


def test_one_bit_of_the_text_model(run, copy):
    flip(copy, "model.layers.0.self_attn.q_norm.weight", byte=3)
    code, results, _ = run(copy)
    assert code == 1
    assert results["copied from LLM"] == ("FAIL", "model.layers.0.self_attn.q_norm.weight differs from its source")
    assert verdicts(results)["text logits"] == "FAIL"
    assert verdicts(results)["copied from VLM"] == verdicts(results)["vision features"] == "PASS"


def test_one_bit_of_the_vision_tower(run, copy):
    flip(copy, "visual.merger.mlp.2.bias", byte=3)
    code, results, _ = run(copy)
    assert code == 1
    assert results["copied from VLM"] == ("FAIL", "visual.merger.mlp.2.bias differs from its source")
    assert verdicts(results)["vision features"] == "FAIL"
    assert verdicts(results)["copied from LLM"] == verdicts(results)["text logits"] == "PASS"


def test_one_bit_of_the_new_layer(run, copy):
    flip(copy, "visual.merger.mlp.4.weight")
    code, results, _ = run(copy, forward=False)
    assert code == 1
    assert results["new layer"] == ("FAIL", "visual.merger.mlp.4.weight is not what seed 42 gives")


def test_a_configuration_that_was_changed(run, copy):
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", {**config, "rope_theta": 10000, "image_token_id": 7})
    code, results, _ = run(copy, forward=False)
    assert code == 1
    assert results["configuration"][0] == "FAIL"
    assert "rope_theta is 10000, the sources give 1000000" in results["configuration"][1]
    assert f"image_token_id is 7, the sources give {TOKEN_IDS['<|image_pad|>']}" in results["configuration"][1]


def test_sections_that_were_changed(run, copy):
    """They add up and the weights do not tell: only the manifest and the VLM know better."""
    config = json.loads((copy / "config.json").read_text())
    config["rope_scaling"]["mrope_section"] = [2, 7, 7]
    write_json(copy / "config.json", config)
    code, results, _ = run(copy, forward=False)
    assert code == 1
    assert results["configuration"][0] == "FAIL"
    assert "'mrope_section': [2, 7, 7]}, the sources give" in results["configuration"][1]


def test_sections_that_the_merge_was_told(run, tied, tmp_path):
    rope = RopeOptions((2, 7, 7))
    merge(MergeOptions(vlm=str(tied.vlm), llm=str(tied.llm), output=tmp_path / "out", rope=rope))
    code, results, _ = run(tmp_path / "out", forward=False)
    assert (code, results["configuration"][0]) == (0, "PASS")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", b""),
        ("tokenizer.json", b"{}"),
        ("modeling_qwen2_5_vl_merge.py", b"garbage"),
        ("chat_template.jinja", None),
    ],
)
def test_a_companion_file_that_was_changed(run, copy, file, content):
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    code, results, _ = run(copy, forward=False)
    assert code == 1
    expected = f"missing {file}" if content is None else f"{file} is not what the merge writes"
    assert results["companion files"] == ("FAIL", expected)
    assert verdicts(results)["configuration"] == "PASS"


def test_companion_files_of_materials(run, tied, tmp_path):
    """Their directory may be gone; the manifest's sha256 stays."""
    out, materials = tmp_path / "out", tmp_path / "materials"
    materials.mkdir()
    (materials / "chat_template.jinja").write_text("{{ messages }}")
    (materials / "generation_config.json").write_text('{"temperature": 0.1}')
    merge(MergeOptions(vlm=str(tied.vlm), llm=str(tied.llm), output=out, materials=materials))
    shutil.rmtree(materials)
    code, results, _ = run(out, forward=False)
    assert (code, results["companion files"][0]) == (0, "PASS")
    (out / "generation_config.json").write_text('{"temperature": 0.2}')
    code, results, _ = run(out, forward=False)
    assert code == 1
    assert results["companion files"] == ("FAIL", "generation_config.json is not what the merge writes")


def test_companion_files_of_another_version_of_this_kit(run, copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["versions"]["qwen_merge"] = "0.0.1"
    write_json(copy / MANIFEST, manifest)
    (copy / "modeling_qwen2_5_vl_merge.py").write_text("older")
    code, results, _ = run(copy, forward=False)
    assert (code, results["companion files"][0]) == (0, "NOT CHECKED")
    assert "0.0.1 wrote modeling_qwen2_5_vl_merge.py" in results["companion files"][1]
    (copy / "tokenizer.json").write_text("{}")
    assert verdicts(run(copy, forward=False)[1])["companion files"] == "FAIL"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "has dtype F32, config.json says bfloat16"),
        ({"torch_dtype": ["x"]}, "has dtype F32, config.json says ['x']"),
        ({"num_hidden_layers": "2"}, "config.json has fields of a wrong type"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but there are only"),
        ({"vision_config": [1]}, "config.json has fields of a wrong type"),
        ({"num_hidden_layers": 3}, "missing model.layers.2."),
        ({"num_hidden_layers": 1}, "unknown model.layers.1."),
        ({"intermediate_size": 100}, "mlp.down_proj.weight has shape [64, 112], expected [64, 100]"),
    ],
)
def test_tensors_that_are_not_as_the_configuration_says(run, copy, change, expected):
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", {**config, **change})
    code, results, _ = run(copy)
    assert code == 1
    assert results["tensors"][0] == "FAIL"
    assert expected in results["tensors"][1]
    # What rests on it is not run, and not passed.
    for check in ("copied from VLM", "copied from LLM", "new layer", "text logits", "vision features"):
        assert results[check] == ("NOT CHECKED", "an earlier check failed")


def test_a_truncated_file(run, copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, results, _ = run(copy)
    assert code == 1
    assert "cut short" in results["tensors"][1]


def test_without_sources_it_says_what_it_did_not_check(run, copy, tied, capsys):
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["sources"]["vlm"]["path"] = "/nowhere/vlm"
    write_json(copy / MANIFEST, manifest)
    code, results, last = run(copy, forward=False)
    assert code == 0
    assert verdicts(results) == {**dict.fromkeys(CHECKS, "NOT CHECKED"), "tensors": "PASS", "new layer": "PASS"}
    assert results["copied from VLM"][1] == "the VLM is no longer at /nowhere/vlm (say where with --vlm-path)"
    assert last.endswith("2 passed, 0 failed, 6 not checked")
    code, results, _ = run(copy, forward=False, vlm=str(tied.vlm))
    assert verdicts(results)["copied from VLM"] == "PASS"
    (copy / MANIFEST).unlink()
    code, results, _ = run(copy, forward=False)
    assert verdicts(results) == {**dict.fromkeys(CHECKS, "NOT CHECKED"), "tensors": "PASS"}
    assert f"no {MANIFEST} says where the VLM is" in results["configuration"][1]
    assert verify(copy, forward=False) == 0
    assert "it is for what qwen-merge merge and graft wrote, before training" in capsys.readouterr().out


def test_other_sources_than_it_was_made_of(run, tied, untied, tmp_path):
    other = make_vlm(tmp_path / "other", dtype="float32", seed=77)
    code, results, _ = run(tied.merged, forward=False, vlm=str(other))
    assert code == 1
    assert "; and 25 more" in results["copied from VLM"][1]
    code, results, _ = run(tied.merged, forward=False, llm=str(untied.llm))
    assert code == 1
    assert "tie_word_embeddings is True, the sources give False" in results["configuration"][1]


@pytest.mark.parametrize(
    "manifest",
    [
        {"sources": []},
        {"sources": {"vlm": 7}},
        {"sources": {"vlm": {"path": 7}}},
        {"options": {"mrope_section": "abc"}},
        {"new_layer": {"seed": "x"}},
        {"overridden_by_materials": ["tokenizer.json"]},
    ],
)
def test_a_manifest_that_no_merge_writes(copy, manifest):
    write_json(copy / MANIFEST, manifest)
    with pytest.raises(UserError, match=r"which no merge writes\. Take the merge's own"):
        verify(copy, forward=False)


def test_sources_below_the_home_directory(run, copy, tied, monkeypatch):
    monkeypatch.setenv("HOME", str(tied.vlm.parent))
    (copy / MANIFEST).unlink()
    _, results, _ = run(copy, forward=False, vlm="~/vlm", llm="~/llm", revision="main")
    assert verdicts(results)["copied from VLM"] == verdicts(results)["copied from LLM"] == "PASS"
    monkeypatch.setenv("HOME", str(copy.parent))
    arguments = build_parser().parse_args(["verify", "~/merged", "--no-forward"])
    assert arguments.run(arguments) == 0


def test_what_is_no_merge_at_all(tied, tmp_path):
    with pytest.raises(UserError, match="has model_type 'qwen3'; expected 'qwen2_5_vl_merge'"):
        verify(tied.llm)
    with pytest.raises(UserError, match=r"has no config\.json"):
        verify(tmp_path)


def test_the_command(tied, copy):
    def command(*arguments):
        line = [sys.executable, "-m", "qwen_merge.cli", "verify", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    done = command(tied.merged, "--no-forward")
    assert done.returncode == 0, done.stderr
    assert "NOT CHECKED  text logits      --no-forward" in done.stdout
    flip(copy, "model.norm.weight", byte=3)
    assert command(copy, "--no-forward").returncode == 1
    missing = command(copy / "nowhere")
    assert missing.returncode == 2
    assert "is not a directory" in missing.stderr


USE = """
import sys
import numpy, torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

directory = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
assert not [name for name in sys.modules if name.startswith("qwen_merge")]
picture = Image.fromarray(numpy.arange(56 * 84 * 3, dtype=numpy.uint8).reshape(56, 84, 3))
video = [picture] * 4
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
inputs = processor(text=[text], images=[picture], videos=[video], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(type(model).__name__, type(processor).__name__, type(processor.video_processor).__name__)
print(processor.tokenizer.decode(inputs["input_ids"][0]))
print(out.shape[1] - inputs["input_ids"].shape[1])
"""


def test_a_merge_loads_and_sees_without_this_package(tied, tmp_path):
    """The code travels with the checkpoint (`auto_map`): nothing of the kit is imported."""
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tied.merged)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    classes, _, said = done.stdout.partition("\n")
    assert classes == "Qwen2_5_VL_MergeForConditionalGeneration Qwen2_5_VLProcessor Qwen2VLVideoProcessor"
    picture = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    video = "<|vision_start|>" + "<|video_pad|>" * 12 + "<|vision_end|>"
    assert said == (
        f"<|im_start|>user\n{picture}{video}What?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n\n4\n"
    )
