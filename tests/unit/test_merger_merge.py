"""Whole merges of tiny checkpoints: what comes out, byte for byte, and from which options."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from checkpoints import TOKEN_IDS, make_llm, make_vlm, write_json
from qwen_merge import cli
from qwen_merge.architecture import CODE_FILES
from qwen_merge.errors import UserError
from qwen_merge.merger.companions import MATERIALS
from qwen_merge.merger.merge import MANIFEST, MergeOptions, merge

NEW = {"visual.merger.mlp.4.weight", "visual.merger.mlp.4.bias"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """bfloat16 sources by (role, form): each spelling, single and sharded, tied and untied."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        "published": make_vlm(folder / "vlm"),
        "re-saved": make_vlm(folder / "vlm-resaved", resaved=True, shards=3),
        "sharded": make_vlm(folder / "vlm-sharded", shards=4),
        "tied": make_llm(folder / "llm"),
        "untied": make_llm(folder / "llm-untied", tied=False, shards=3),
    }


def run(sources, output, vlm="published", llm="tied", **options):
    return merge(MergeOptions(vlm=str(sources[vlm]), llm=str(sources[llm]), output=output, **options))


def raw_tensors(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes) of all tensors, read by the library."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == set(header) - {"__metadata__"}
            assert opened.metadata() == {"format": "pt"}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                tensors[name] = (entry["dtype"], entry["shape"], data[start:end])
    return tensors


def expected_copies(vlm: Path, llm: Path) -> dict[str, tuple[str, list[int], bytes]]:
    vision = {
        name.removeprefix("model."): tensor
        for name, tensor in raw_tensors(vlm).items()
        if name.startswith(("visual.", "model.visual."))
    }
    return {**vision, **raw_tensors(llm)}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("vlm", ["published", "re-saved", "sharded"])
@pytest.mark.parametrize("llm", ["tied", "untied"])
@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_what_is_copied_is_equal_byte_for_byte(sources, tmp_path, vlm, llm, size):
    report = run(sources, tmp_path / "out", vlm, llm, max_shard_size=size)
    tensors = raw_tensors(tmp_path / "out")
    expected = expected_copies(sources[vlm], sources[llm])
    assert {name: tensor for name, tensor in tensors.items() if name not in NEW} == expected
    assert set(tensors) == set(expected) | NEW
    assert tensors["visual.merger.mlp.4.weight"][:2] == ("BF16", [64, 96])
    assert tensors["visual.merger.mlp.4.bias"] == ("BF16", [64], bytes(128))
    assert ("lm_head.weight" in tensors) == (llm == "untied")
    # Nobody is told of files that do not exist, and the control: one byte less is seen.
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(report.shards)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (size == "100KB")
    if index.exists():
        content = json.loads(index.read_text())
        assert set(content["weight_map"]) == set(tensors)
        assert content["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())


def test_the_same_seed_gives_the_same_files_and_another_only_another_layer(sources, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run(sources, tmp_path / name, seed=seed)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors", MANIFEST}
    tensors, others = raw_tensors(tmp_path / "a"), raw_tensors(tmp_path / "c")
    assert {name for name in tensors if tensors[name] != others[name]} == {"visual.merger.mlp.4.weight"}


def test_every_file_a_user_needs_is_there(sources, tmp_path):
    run(sources, tmp_path / "out", vlm="re-saved", llm="untied")
    out = contents(tmp_path / "out")
    assert set(out) == {
        "chat_template.jinja", "config.json", "generation_config.json", "merge_manifest.json", "merges.txt",
        "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
        "video_preprocessor_config.json", "vocab.json", *(path.name for path in CODE_FILES),
    }  # fmt: skip
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "generation_config.json"):
        assert out[name] == (sources["untied"] / name).read_bytes()
    template = (MATERIALS / "chat_template.jinja").read_bytes()
    assert out["chat_template.jinja"] == template
    mine, theirs = json.loads(out["tokenizer_config.json"]), contents(sources["untied"])["tokenizer_config.json"]
    assert mine == {**json.loads(theirs), "chat_template": template.decode()}
    source = json.loads((sources["re-saved"] / "preprocessor_config.json").read_text())
    assert json.loads(out["preprocessor_config.json"]) == {**source, "video_processor_type": "Qwen2VLVideoProcessor"}
    video = json.loads(out["video_preprocessor_config.json"])
    assert video == {
        **{name: value for name, value in source.items() if name != "image_processor_type"},
        "video_processor_type": "Qwen2VLVideoProcessor",
    }
    config = json.loads(out["config.json"])
    assert config["torch_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is False
    for path in CODE_FILES:
        assert out[path.name] == path.read_bytes()


def test_the_manifest_says_where_everything_came_from(sources, tmp_path):
    run(sources, tmp_path / "out", vlm="re-saved", llm="untied", seed=9)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    vlm, llm = manifest["sources"]["vlm"], manifest["sources"]["llm"]
    assert vlm["path"] == str(sources["re-saved"])
    for name, entry in llm["files"].items():
        data = (sources["untied"] / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {name for name in llm["files"] if name.endswith(".safetensors")} == {
        path.name for path in sources["untied"].glob("*.safetensors")
    }
    partly = [name for name, entry in vlm["files"].items() if "ranges" in entry]
    assert partly  # a file in which text model and vision tower meet
    for name in partly:
        data, entry = (sources["re-saved"] / name).read_bytes(), vlm["files"][name]
        assert "sha256" not in entry
        read = b"".join(data[start:end] for start, end in entry["ranges"])
        assert entry["sha256_of_ranges"] == hashlib.sha256(read).hexdigest()
    assert "model-00001-of-00003.safetensors" not in vlm["files"]  # text model only: never opened
    assert manifest["tensors"] == {
        "copied": {"vlm": 30, "llm": 25},
        "initialised": ["visual.merger.mlp.4.weight", "visual.merger.mlp.4.bias"],
        "dropped": {"vlm": {"the VLM's own text model": 27}, "llm": {}},
    }
    assert manifest["new_layer"]["seed"] == 9
    assert manifest["options"] == {"dtype": None, "mrope_section": [4, 6, 6]}


def test_files_without_vision_tensors_need_not_exist(sources, tmp_path):
    """As of a 72B of which only what is needed was downloaded."""
    shutil.copytree(sources["re-saved"], tmp_path / "vlm")
    (tmp_path / "vlm" / "model-00001-of-00003.safetensors").unlink()
    merge(MergeOptions(vlm=str(tmp_path / "vlm"), llm=str(sources["tied"]), output=tmp_path / "out"))
    run(sources, tmp_path / "whole", vlm="re-saved")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conversion_gives_torch_s_bits(sources, tmp_path, dtype):
    import torch
    from safetensors.torch import load_file

    run(sources, tmp_path / "out", dtype=dtype)
    converted = load_file(tmp_path / "out" / "model.safetensors")
    for source in ("published", "tied"):
        for name, tensor in load_file(sources[source] / "model.safetensors").items():
            if name in converted and (name.startswith("visual.") or source == "tied"):
                assert converted[name].dtype == getattr(torch, dtype)
                assert torch.equal(converted[name], tensor.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    assert {tensor.dtype for tensor in converted.values()} == {getattr(torch, dtype)}


def test_sources_of_two_dtypes_keep_them_and_stay_aligned(sources, tmp_path):
    make_vlm(tmp_path / "vlm", dtype="float32")
    report = merge(MergeOptions(vlm=str(tmp_path / "vlm"), llm=str(sources["tied"]), output=tmp_path / "out"))
    tensors = raw_tensors(tmp_path / "out")
    assert {dtype for name, (dtype, _, _) in tensors.items() if name.startswith("visual.")} == {"F32"}
    assert {dtype for name, (dtype, _, _) in tensors.items() if name.startswith("model.")} == {"BF16"}
    expected = expected_copies(tmp_path / "vlm", sources["tied"])
    assert {name: tensor for name, tensor in tensors.items() if name not in NEW} == expected
    assert any("dtypes differ" in note for note in report.plan.notes)


def test_materials_override_what_they_name(sources, tmp_path):
    materials = tmp_path / "materials"
    materials.mkdir()
    (materials / "chat_template.jinja").write_text("{{ messages }}")
    write_json(materials / "generation_config.json", {"temperature": 1.0})
    run(sources, tmp_path / "out", materials=materials)
    out = contents(tmp_path / "out")
    assert out["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(out["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
    assert json.loads(out["generation_config.json"]) == {"temperature": 1.0}
    manifest = json.loads(out[MANIFEST])
    assert manifest["overridden_by_materials"] == {
        name: hashlib.sha256(out[name]).hexdigest() for name in ("chat_template.jinja", "generation_config.json")
    }
    assert "generation_config.json" not in manifest["sources"]["llm"]["files"]


def test_a_material_nobody_would_use_is_an_error(sources, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds config\.json, which a merge has no use for"):
        run(sources, tmp_path / "out", materials=tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        run(sources, tmp_path / "out", materials=tmp_path / "nowhere")


def test_an_llm_without_generation_settings(sources, tmp_path):
    shutil.copytree(sources["tied"], tmp_path / "llm")
    (tmp_path / "llm" / "generation_config.json").unlink()
    report = merge(MergeOptions(vlm=str(sources["published"]), llm=str(tmp_path / "llm"), output=tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"bos_token_id": TOKEN_IDS["<|endoftext|>"], "eos_token_id": TOKEN_IDS["<|im_end|>"]}
    assert any("no generation_config.json" in note for note in report.plan.notes)


@pytest.mark.parametrize("missing", ["tokenizer.json", "vocab.json"])
def test_token_ids_are_found_in_any_form_of_tokenizer(sources, tmp_path, missing):
    shutil.copytree(sources["tied"], tmp_path / "llm")
    (tmp_path / "llm" / missing).unlink()
    merge(MergeOptions(vlm=str(sources["published"]), llm=str(tmp_path / "llm"), output=tmp_path / "out"))
    assert not (tmp_path / "out" / missing).exists()


def test_the_reproduction_s_own_command_line(sources, tmp_path):
    repository = Path(__file__).parents[2]
    command = [
        sys.executable, "src/model_merge/model_merger.py", "--vlm-path", str(sources["published"]),
        "--llm-path", str(sources["tied"]), "--materials-path", "src/model_merge/materials",
        "--output-path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "30 tensors copied, 27 left behind" in done.stdout
    assert "visual.merger.mlp.4.weight, visual.merger.mlp.4.bias (seed 42)" in done.stdout
    run(sources, tmp_path / "api")
    assert contents(tmp_path / "out") == contents(tmp_path / "api")  # the kit's own materials are no override


def test_a_bar_on_a_terminal_and_plain_lines_otherwise(sources, tmp_path, capsys, monkeypatch):
    run(sources, tmp_path / "plain")
    size = sum(path.stat().st_size for path in (tmp_path / "plain").glob("*.safetensors")) / 1e6
    found = re.fullmatch(r"writing weights: 100% of (\d\.\d\d) MB after 0 s\n", capsys.readouterr().err)
    assert float(found[1]) == pytest.approx(size, abs=0.03)  # the files have headers, too
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(sources, tmp_path / "bar")
    assert "\rwriting weights: 100%|" in capsys.readouterr().err


def test_help_lists_what_makes_a_checkpoint_before_what_is_done_with_one(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    steps = re.findall(r"^    ([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert steps[:5] == ["merge", "graft", "verify", "split-adapter", "overlay"]
