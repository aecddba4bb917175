"""Whatever goes wrong: a clear message, and nothing at the output or beside it."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from checkpoints import make_llm, write_json
from qwen_merge.bench.merge import measure
from qwen_merge.cli import build_parser
from qwen_merge.errors import UserError
from qwen_merge.merger.merge import MergeOptions, merge

BIG_VOCABULARY = 1_200_000  # rows of 64 bfloat16: 154 MB, long enough to be interrupted


@pytest.fixture
def pair(tied, tmp_path):
    """Copies of the tiny sources that a test may break, and an output in a directory of its own."""
    shutil.copytree(tied.vlm, tmp_path / "vlm")
    shutil.copytree(tied.llm, tmp_path / "llm")
    (tmp_path / "place").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def big_llm(tmp_path_factory):
    folder = make_llm(tmp_path_factory.mktemp("big") / "llm", vocab_size=BIG_VOCABULARY)
    yield folder
    shutil.rmtree(folder)


def options(pair, **more) -> MergeOptions:
    return MergeOptions(
        **{"vlm": str(pair / "vlm"), "llm": str(pair / "llm"), "output": pair / "place" / "out", **more}
    )


def refused(pair, **more) -> str:
    """The message of a merge that must fail, after a look at what it left."""
    before = sorted((pair / "place").rglob("*"))
    with pytest.raises(UserError) as caught:
        merge(options(pair, **more))
    assert sorted((pair / "place").rglob("*")) == before
    return str(caught.value)


def edit_json(path: Path, **fields) -> None:
    write_json(path, {**json.loads(path.read_text()), **fields})


def edit_weights(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


# Broken sources


@pytest.mark.parametrize("role", ["vlm", "llm"])
@pytest.mark.parametrize("left", [0, 5, 1000, -1])
def test_a_truncated_file(pair, role, left):
    path = pair / role / "model.safetensors"
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    text = refused(pair)
    assert str(path) in text
    assert "again" in text


def test_a_missing_tensor(pair):
    edit_weights(pair / "vlm", lambda weights: weights.pop("visual.blocks.1.attn.qkv.bias"))
    edit_weights(pair / "llm", lambda weights: weights.pop("model.norm.weight"))
    text = refused(pair)
    assert "VLM: missing tensor visual.blocks.1.attn.qkv.bias, expected shape [96]" in text
    assert "LLM: missing tensor model.norm.weight, expected shape [64]" in text


def test_an_unknown_tensor(pair):
    edit_weights(pair / "llm", lambda weights: weights.update({"model.extra": weights["model.norm.weight"].clone()}))
    assert "LLM: unknown tensor model.extra" in refused(pair)


def test_a_wrong_shape(pair):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(pair / "llm", lambda weights: weights.update({name: weights[name][:-1].contiguous()}))
    assert f"LLM: tensor {name} has shape [111, 64], expected [112, 64]" in refused(pair)


def test_sections_that_do_not_fit(pair):
    edit_json(pair / "vlm" / "config.json", rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]})
    text = refused(pair)
    assert "adds up to 64" in text
    assert "must add up to 16" in text


def test_a_preprocessor_that_cuts_otherwise(pair):
    edit_json(pair / "vlm" / "preprocessor_config.json", patch_size=16)
    assert "preprocessor_config.json: patch_size is 16, the VLM's vision_config has patch_size 14" in refused(pair)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_broken_json(pair, file):
    (pair / "llm" / file).write_text('{"model_type": ')
    assert "not valid JSON" in refused(pair)


def test_missing_files(pair):
    (pair / "vlm" / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in refused(pair)
    (pair / "llm" / "model.safetensors").rename(pair / "llm" / "pytorch_model.bin")
    shutil.copy(pair / "llm" / "config.json", pair / "vlm" / "preprocessor_config.json")
    assert "converted to safetensors first" in refused(pair)
    (pair / "llm" / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in refused(pair)
    assert "does not exist" in refused(pair, llm=str(pair / "nowhere"))
    assert "is a file" in refused(pair, llm=str(pair / "vlm" / "config.json"))


def test_an_index_that_disagrees_with_its_files(pair):
    weights = load_file(pair / "llm" / "model.safetensors")
    index = {"weight_map": dict.fromkeys([*weights, "model.ghost.weight"], "model.safetensors")}
    del index["weight_map"]["model.norm.weight"]
    write_json(pair / "llm" / "model.safetensors.index.json", index)
    text = refused(pair)
    assert "the index names tensor model.ghost.weight, the file has none" in text
    assert "tensor model.norm.weight is not in the index" in text
    index["weight_map"]["model.norm.weight"] = "../vlm/model.safetensors"
    write_json(pair / "llm" / "model.safetensors.index.json", index)
    assert "without directories" in refused(pair)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seed": -1}, "--seed is -1"),
        ({"dtype": "int8"}, "--dtype is 'int8'"),
        ({"max_shard_size": "big"}, "--max-shard-size is 'big'"),
        ({"llm_revision": "v1"}, "--revision v1 was given"),
    ],
)
def test_options_that_cannot_be(pair, option, message):
    assert message in refused(pair, **option)


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("role", ["vlm", "llm"])
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rope_scaling": "x"}, "rope_scaling"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"text_config": [1]}, "text_config"),
        ({"text_config": {"rope_scaling": "x"}}, "text_config.rope_scaling"),
        ({"quantization_config": "int8"}, "quantization_config"),
    ],
)
def test_a_configuration_whose_parts_are_no_objects(pair, role, fields, name):
    edit_json(pair / role / "config.json", **fields)
    text = refused(pair)
    assert f"the {role.upper()}'s config.json has {name} " in text
    assert "expected a JSON object" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", "384"),
        ("vocab_size", None),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", True),
        ("head_dim", None),
        ("head_dim", "x"),
        ("hidden_size", 0),
        ("rope_theta", "1e6"),
        ("attention_bias", "false"),
    ],
)
def test_fields_of_the_llm_of_a_wrong_type(pair, field, value):
    edit_json(pair / "llm" / "config.json", **{field: value})
    assert f"the LLM's config.json has {field} {value!r}; expected " in refused(pair)


@pytest.mark.parametrize("value", ["2", None, [2]])
def test_fields_of_the_vision_tower_of_a_wrong_type(pair, value):
    vision = json.loads((pair / "vlm" / "config.json").read_text())["vision_config"]
    edit_json(pair / "vlm" / "config.json", vision_config={**vision, "depth": value})
    assert f"the VLM's vision_config has depth {value!r}; expected a whole number above 0" in refused(pair)


def test_more_layers_than_tensors(pair):
    """A plan that listed them all would not come back."""
    edit_json(pair / "llm" / "config.json", num_hidden_layers=10**9)
    assert "num_hidden_layers is 1000000000, but there are only " in refused(pair)


@pytest.mark.parametrize("number", ["151655", -1, 3.5])
def test_a_token_id_that_is_no_number(pair, number):
    edit_json(pair / "vlm" / "config.json", image_token_id=number)
    text = refused(pair)
    assert f"image_token_id {number!r}; expected a token's number" in text or "these two do not speak" in text


@pytest.mark.parametrize("sections", ["abc", 7, [4, 6, "6"], [4.0, 6.0, 6.0]])
def test_sections_that_are_no_whole_numbers(pair, sections):
    edit_json(pair / "vlm" / "config.json", rope_scaling={"type": "mrope", "mrope_section": sections})
    assert f"mrope_section is {sections!r}; expected three whole numbers" in refused(pair)


@pytest.mark.parametrize(
    ("role", "file"),
    [
        ("vlm", "config.json"),
        ("llm", "config.json"),
        ("vlm", "preprocessor_config.json"),
        ("llm", "tokenizer.json"),
        ("llm", "tokenizer_config.json"),
        ("llm", "added_tokens.json"),
        ("llm", "vocab.json"),
        ("llm", "generation_config.json"),
    ],
)
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b"\xff\x00", DEEP.encode()], ids=["empty", "[]", "7", "binary", "deep"]
)
def test_json_that_is_no_object(pair, role, file, content):
    (pair / role / file).write_bytes(content)
    text = refused(pair)
    assert file in text
    assert "is not valid JSON" in text or "expected a JSON object" in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"added_tokens": {"<|image_pad|>": 1}}),
        ("tokenizer.json", {"added_tokens": [{"content": "<|image_pad|>", "id": "1"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<|image_pad|>"}}}),
        ("added_tokens.json", {"<|image_pad|>": "1"}),
    ],
)
def test_added_tokens_of_another_form(pair, file, content):
    write_json(pair / "llm" / file, content)
    assert f"{file}: its added tokens are not as a tokenizer writes them" in refused(pair)


def test_swapped_sources(pair):
    text = refused(pair, vlm=str(pair / "llm"), llm=str(pair / "vlm"))
    assert "the VLM has model_type 'qwen3'; expected 'qwen2_5_vl'" in text
    assert "the LLM has model_type 'qwen2_5_vl'; expected 'qwen3'" in text


# Materials


@pytest.fixture
def materials(pair):
    (pair / "materials").mkdir()
    return pair / "materials"


def test_materials_that_cannot_be_read(pair, materials):
    (materials / "chat_template.jinja").mkdir()
    assert "chat_template.jinja cannot be read (Is a directory)" in refused(pair, materials=materials)
    (materials / "chat_template.jinja").rmdir()
    (materials / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "chat_template.jinja is not UTF-8 text" in refused(pair, materials=materials)


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json"]
)
def test_materials_that_are_no_objects(pair, materials, name):
    (materials / name).write_text("[]")
    assert f"{name} holds list; expected a JSON object" in refused(pair, materials=materials)


def test_materials_below_the_home_directory(pair, materials, monkeypatch):
    monkeypatch.setenv("HOME", str(pair))
    write_json(materials / "generation_config.json", {"temperature": 0.25})
    merge(options(pair, materials=Path("~/materials")))
    assert json.loads((pair / "place" / "out" / "generation_config.json").read_text()) == {"temperature": 0.25}


def test_the_home_directory_of_nobody(pair):
    """Path.expanduser raises RuntimeError there."""
    assert "does not exist" in refused(pair, llm="~no-such-user/llm")
    assert "is not a directory" in refused(pair, materials=Path("~no-such-user/materials"))
    arguments = build_parser().parse_args(["verify", "~no-such-user/merged"])
    with pytest.raises(UserError, match="is not a directory"):
        arguments.run(arguments)


# The output


def test_an_existing_output_is_refused_and_kept(pair):
    out = pair / "place" / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "exists and is not empty" in refused(pair)
    assert (out / "precious.txt").read_text() == "mine"
    shutil.rmtree(out)
    out.write_text("a file")
    assert "is a file" in refused(pair)
    out.unlink()
    out.symlink_to(pair / "nowhere")
    assert "symbolic link to nothing" in refused(pair)


def test_an_empty_output_directory_is_taken(pair):
    (pair / "place" / "out").mkdir()
    merge(options(pair))
    assert (pair / "place" / "out" / "config.json").exists()
    assert [path.name for path in (pair / "place").iterdir()] == ["out"]


def test_a_link_to_an_empty_directory_is_followed(pair):
    (pair / "elsewhere").mkdir()
    (pair / "place" / "out").symlink_to(pair / "elsewhere")
    merge(options(pair))
    assert (pair / "elsewhere" / "config.json").exists()
    assert (pair / "place" / "out").is_symlink()
    assert "is not empty" in refused(pair)


def test_a_mount_point_is_refused(pair, tiny_disk):
    tiny_disk("size=200m")
    text = refused(pair, output=pair / "place")
    assert text.endswith(f"{pair / 'place'} is a mount point, which must stay; name a new folder inside it.")
    merge(options(pair))


@pytest.mark.parametrize("role", ["vlm", "llm"])
def test_an_output_inside_a_source_is_refused(pair, role):
    files = sorted((pair / role).iterdir())
    (pair / "place" / "link").symlink_to(pair / role)
    for output in (pair / role / "out", pair / "place" / "link" / "a" / "out"):
        assert f"is inside the {role.upper()} {pair / role}" in refused(pair, output=output)
    assert sorted((pair / role).iterdir()) == files


def test_a_path_that_goes_back_leaves_nothing_on_its_way(pair):
    merge(options(pair, output=pair / "place" / "x2" / ".." / "x3"))
    assert [path.name for path in (pair / "place").iterdir()] == ["x3"]
    assert "is not empty" in refused(pair, output=pair / "place" / "x4" / ".." / "x3")


def test_parents_are_made_and_on_failure_removed(pair):
    deep = pair / "place" / "a" / "b" / "out"
    merge(options(pair, output=deep))
    assert (deep / "config.json").exists()
    shutil.rmtree(pair / "place" / "a")
    run = run_limited(pair, deep, limit=100_000)
    assert run.returncode == 2
    assert list((pair / "place").iterdir()) == []


# The disk


def cli(pair, output: Path, *more: str, llm: "Path | None" = None) -> list[str]:
    paths = ["--vlm-path", str(pair / "vlm"), "--llm-path", str(llm or pair / "llm"), "--output-path", str(output)]
    return [sys.executable, "-m", "qwen_merge.cli", "merge", *paths, *more]


def run_limited(pair, output: Path, limit: int) -> subprocess.CompletedProcess:
    """A merge that may write no file beyond `limit` bytes."""
    return subprocess.run(
        cli(pair, output),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_write_that_fails_in_the_middle(pair):
    done = run_limited(pair, pair / "place" / "out", limit=300_000)
    assert done.returncode == 2, done.stderr
    assert "full" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((pair / "place").iterdir()) == []


@pytest.fixture
def tiny_disk(pair):
    """Mounts a tmpfs on the output's place; only root may."""

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(pair / "place")], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("needs the right to mount a tmpfs")

    yield mount
    subprocess.run(["umount", str(pair / "place")], capture_output=True, check=False)


def test_too_little_space_is_seen_beforehand(pair, tiny_disk):
    tiny_disk("size=1m")
    text = refused(pair)
    assert "needs 0.07 GB, the file system has 0.00 GB free" in text


def test_a_disk_that_fills_up_meanwhile(pair, tiny_disk):
    """ENOSPC while files are made: the disk has bytes, but inodes for only a few of them."""
    tiny_disk("size=200m,nr_inodes=6")
    text = refused(pair)
    assert "full (No space left on device); nothing was left there" in text


# Kills


def leftovers(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if path.name.startswith(".out.merging-")]


def started(pair, big_llm, *more: str) -> subprocess.Popen:
    """A merge of the big LLM, once it has begun to write."""
    process = subprocess.Popen(
        cli(pair, pair / "place" / "out", *more, llm=big_llm), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not leftovers(pair / "place"):
        time.sleep(0.001)
    return process


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_sigkill_at_any_point_leaves_no_half_checkpoint(pair, big_llm):
    chance = random.Random(0)
    place, killed = pair / "place", 0
    assert started(pair, big_llm, "--max-shard-size", "20MB").wait() == 0
    whole = sizes(place / "out")
    shutil.rmtree(place / "out")
    for _ in range(8):
        process = started(pair, big_llm, "--max-shard-size", "20MB")
        time.sleep(chance.random() * 0.3)
        process.kill()
        process.wait()
        if (place / "out").exists():  # it was quicker, be it by the moment before its exit
            assert sizes(place / "out") == whole
            shutil.rmtree(place / "out")
        else:
            killed += process.returncode == -signal.SIGKILL
        assert all(path.name.startswith(".out.merging-") for path in place.iterdir())
    assert killed >= 4
    (place / ".other.merging-1-00").mkdir()  # another output's is none of our business
    done = subprocess.run(cli(pair, place / "out"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in place.iterdir()) == [".other.merging-1-00", "out"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_cleans_up(pair, big_llm, number, code):
    process = started(pair, big_llm)
    process.send_signal(number)
    assert process.wait() == code
    assert list((pair / "place").iterdir()) == []


def test_two_merges_to_one_output(pair, big_llm):
    process = started(pair, big_llm)
    folder = pair / "place" / leftovers(pair / "place")[0]
    while process.poll() is None and not any(folder.iterdir()):
        time.sleep(0.001)  # its lock is there before its first file, and a moment after its folder
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="another process is merging to"):
            merge(options(pair))
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert [path.name for path in (pair / "place").iterdir()] == ["out"]


# Memory


def test_memory_does_not_grow_with_the_models(pair, big_llm, tmp_path):
    small = measure(cli(pair, pair / "place" / "small"), tmp_path / "log")
    large = measure(cli(pair, pair / "place" / "large", llm=big_llm), tmp_path / "log")
    assert large.written_bytes > 150e6
    assert large.peak_bytes < 150e6
    assert large.peak_bytes - small.peak_bytes < 20e6
