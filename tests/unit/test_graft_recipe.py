"""`graft.yaml` and `qwen-merge graft`: every mistake at once and before a byte is written; what --plan says is true."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import grafts
from qwen_merge import cli
from qwen_merge.architecture import kinds_qwen_merge_graft as kinds
from qwen_merge.graft import recipe


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    for kind in ("siglip", "qwen2_5_vl"):
        grafts.make_tower(folder / kind, kind)
    grafts.make_language_model(folder / "qwen3", "qwen3")
    return folder


def refused(capsys, file: Path, *texts: str) -> None:
    before = sorted(file.parent.rglob("*"))
    assert cli.main(["graft", str(file)]) == 2
    message = capsys.readouterr().err
    assert all(text in message for text in texts), message
    assert sorted(file.parent.rglob("*")) == before


def test_all_mistakes_of_a_file_are_told_together(tmp_path, capsys):
    content = {
        "vision": {"source": "a/b", "layr": 3, "frozen": "yes"},
        "projector": {"kind": "mlp", "queries": 9, "merge_size": 0},
        "llm": {},
        "positions": "2d",
        "seed": -1,
        "colour": "red",
    }
    (tmp_path / "graft.yaml").write_text(yaml.safe_dump(content))
    refused(
        capsys,
        tmp_path / "graft.yaml",
        "unknown key 'colour'",
        "unknown key vision.layr",
        "vision.frozen is 'yes'; expected true or false",
        "unknown key projector.queries for kind mlp",
        "projector.merge_size is 0; expected a whole number from 1 on",
        "llm.source is missing",
        "positions is '2d'; expected one of mrope, 1d, mrope-2d",
        "seed is -1",
        "output is missing; expected the path",
    )


def test_a_mistake_hides_no_other_of_its_part(tmp_path, capsys):
    (tmp_path / "graft.yaml").write_text(
        "vision: {source: a/b, layers: 3, resolution: big, max_pixels: -1}\n"
        "projector: {kind: mpl, mergesize: 2, merge_size: 0}\n"
        "llm: {source: 3}\n"
        "tokens: {imag: x, image: <|im_end|>}\n"
        "output: null\n"
    )
    refused(
        capsys,
        tmp_path / "graft.yaml",
        "unknown key vision.layers",
        "vision.resolution is 'big'",
        "max_pixels -1",
        "projector.kind is 'mpl'",
        "unknown key projector.mergesize; expected any of",
        "projector.merge_size is 0",
        "llm.source is 3; expected a text",
        "unknown key tokens.imag",
        "tokens.image is '<|im_end|>'",
        "output is None; expected the path",
    )


def test_both_sources_that_are_missing_are_told(tmp_path, capsys):
    parts = (tmp_path / "tower", "mlp", tmp_path / "model", tmp_path / "out")
    file = grafts.write_recipe(tmp_path / "graft.yaml", *parts)
    refused(capsys, file, f"the vision {parts[0]} does not exist", f"the llm {parts[2]} does not exist")


def test_the_reference_has_every_key_and_no_other():
    """docs/graft.md against what is read; of a projector's kinds and settings, too."""
    text = (Path(__file__).parents[2] / "docs/graft.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:3] == "| `"
    ]
    told = {row[0].strip("`"): row for row in rows}
    parts = {"vision": recipe.Vision, "llm": recipe.LLM, "tokens": recipe.Tokens}
    known = {field.name for field in fields(recipe.Recipe)} - {*parts, "projector"}
    known |= {f"{part}.{field.name}" for part, kind in parts.items() for field in fields(kind)}
    settings = {name for each in kinds.PROJECTORS.values() for name in each}
    assert set(told) == known | {f"projector.{name}" for name in ("kind", *settings)}
    for name in settings:
        of = re.findall(r"`(\w+)`", told[f"projector.{name}"][1])
        assert of == [kind for kind, each in kinds.PROJECTORS.items() if name in each]
    for row, values in (
        (told["projector.kind"][2], kinds.PROJECTORS),
        (told["positions"][1], recipe.POSITIONS),
        (told["architecture"][1], recipe.ARCHITECTURES),
    ):
        assert set(values) == set(re.findall(r"`([\w-]+)`", row))
    defaults = {
        "vision.layer": -1, "seed": 42, "max_shard_size": "`5GB`", "vision.frozen": "true", "positions": "`mrope`",
        "vision.min_pixels": recipe.PIXELS[0], "vision.max_pixels": recipe.PIXELS[1],
        "projector.queries": kinds.QUERIES,
    }  # fmt: skip
    assert {key: told[key][-1].split(",")[0].split(" ")[0] for key in defaults} == {
        k: str(v) for k, v in defaults.items()
    }


def test_the_help_names_every_key(capsys):
    with pytest.raises(SystemExit):
        cli.main(["graft", "--help"])
    said = capsys.readouterr().out
    names = {field.name for kind in (recipe.Recipe, recipe.Vision, recipe.LLM) for field in fields(kind)}
    names |= {name for each in kinds.PROJECTORS.values() for name in each}
    assert not {name for name in names if not re.search(rf"\b{name}\b", said)}
    assert "docs/graft.md" in said


def test_an_output_inside_a_source_is_refused(sources, tmp_path, capsys):
    output = sources / "qwen3/out"
    file = grafts.write_recipe(tmp_path / "graft.yaml", sources / "siglip", "mlp", sources / "qwen3", output)
    refused(capsys, file, "is inside the llm")
    assert not output.exists()


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_shard_size": "5 apples"}, "max_shard_size is '5 apples'; expected a number and a unit"),
        ({"output": "full"}, "is not empty. Remove it or choose another output."),
    ],
)
def test_where_and_how_it_is_written_is_told_by_the_files_keys(sources, tmp_path, capsys, plan, values, message):
    values = dict(values)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    output = tmp_path / values.pop("output", "out")
    file = grafts.write_recipe(tmp_path / "graft.yaml", sources / "siglip", "mlp", sources / "qwen3", output, **values)
    assert cli.main(["graft", str(file), *plan]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, but there are only"),
        ({"vocab_size": "384"}, "vocab_size '384'; expected a whole number"),
        ({"hidden_act": "none"}, "describe no model"),
    ],
)
def test_a_configuration_that_is_no_models(sources, tmp_path, capsys, change, message):
    shutil.copytree(sources / "qwen3", tmp_path / "llm")
    content = json.loads((tmp_path / "llm/config.json").read_text())
    (tmp_path / "llm/config.json").write_text(json.dumps({**content, **change}))
    file = grafts.write_recipe(tmp_path / "graft.yaml", sources / "siglip", "mlp", tmp_path / "llm", tmp_path / "out")
    refused(capsys, file, message)


@pytest.mark.parametrize("settings", [{"image_processor_type": "NoSuchImageProcessor"}, {}])
def test_an_image_processor_that_transformers_does_not_have(sources, tmp_path, capsys, settings):
    shutil.copytree(sources / "siglip", tmp_path / "siglip")
    (tmp_path / "siglip/preprocessor_config.json").write_text(json.dumps(settings))
    file = grafts.write_recipe(tmp_path / "graft.yaml", tmp_path / "siglip", "mlp", sources / "qwen3", tmp_path / "out")
    refused(capsys, file, "expected one of transformers' image processors")


@pytest.mark.parametrize(
    "text", ["seed: 2024-13-45\n", "- a\n", "vision: [\n", "", "vision: 3\nprojector: 4\nllm: 5\noutput: x\n"]
)
def test_files_that_are_no_recipe(tmp_path, capsys, text):
    (tmp_path / "graft.yaml").write_text(text)
    refused(capsys, tmp_path / "graft.yaml", "graft.yaml")


@pytest.mark.parametrize(
    ("tower", "projector", "values", "message"),
    [
        ("siglip", "extended", {}, "siglip_vision_model has none: take mlp"),
        ("siglip", "mlp", {"projector": {"merge_size": 3}}, "4 x 4 patches, which squares of 3 do not fill"),
        ("siglip", "resampler", {"projector": {"queries": 10}}, "projector.queries is 10; expected a square number"),
        ("siglip", "resampler", {"projector": {"heads": 3}}, "does not divide the LLM's hidden_size 64"),
        ("siglip", "mlp", {"vision": {"resolution": "native"}}, "say fixed or interpolated"),
        ("qwen2_5_vl", "mlp", {"vision": {"resolution": "fixed"}}, "qwen2_5_vl takes any size"),
        ("qwen2_5_vl", "mlp", {"vision": {"layer": -2}}, "only the result can be taken"),
        ("siglip", "mlp", {"mrope_section": [4, 4, 4]}, "must add up to head_dim / 2 = 16"),
        ("siglip", "mlp", {"positions": "1d", "mrope_section": [4, 6, 6]}, "with positions: mrope"),
        ("qwen3", "mlp", {}, "vision: model_type 'qwen3'; expected one of"),
        ("siglip", "mlp", {"vision": {"layer": 9}}, "vision.layer is 9; the tower has 2 layers"),
        ("siglip", "mlp", {"vision": {"max_pixels": 9999}}, "takes one size; say resolution: interpolated"),
        ("qwen2_5_vl", "mlp", {"vision": {"max_pixels": 500, "min_pixels": 1}}, "the smallest picture has 784"),
        ("siglip", "mlp", {"tokens": {"image": "<|video_pad|>"}}, "expected four different ones"),
        ("siglip", "mlp", {"tokens": {"image": ""}}, "tokens.image is ''; expected a token of its own such as"),
        ("siglip", "mlp", {"tokens": {"video": "it's"}}, 'tokens.video is "it\'s"; expected a token of its own'),
        ("siglip", "mlp", {"tokens": {"image": "<|im_end|>"}}, "not one that begins or ends a turn"),
        ("siglip", "mlp", {"projector": {"kind": ["mlp"]}}, "projector.kind is ['mlp']; expected one of"),
        ("siglip", "resampler", {"projector": {"queries": -4}}, "projector.queries is -4"),
        ("qwen2_5_vl", "extended", {"vision": {"frozen": False}}, "vision.frozen: this graft is Qwen-Merge itself"),
    ],
)
def test_pairs_that_cannot_work(sources, tmp_path, capsys, tower, projector, values, message):
    file = grafts.write_recipe(
        tmp_path / "graft.yaml", sources / tower, projector, sources / "qwen3", tmp_path / "out", **values
    )
    refused(capsys, file, message)


def test_a_tensor_that_is_missing_or_unknown_is_named(sources, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(sources / "siglip", tmp_path / "siglip")
    weights = load_file(tmp_path / "siglip/model.safetensors")
    weights["vision_model.encoder.extra"] = weights.pop("vision_model.post_layernorm.bias")
    save_file(weights, tmp_path / "siglip/model.safetensors", {"format": "pt"})
    file = grafts.write_recipe(tmp_path / "graft.yaml", tmp_path / "siglip", "mlp", sources / "qwen3", tmp_path / "out")
    refused(
        capsys,
        file,
        "missing tensor visual.vision_model.post_layernorm.bias, expected shape [32]",
        "unknown tensor vision_model.encoder.extra",
    )


@pytest.mark.parametrize(
    ("tower", "projector", "vision", "message"),
    [
        ("siglip", "mlp", {}, "all 56 x 56 pixels, the tower's own size"),
        ("siglip", "mlp", {"resolution": "interpolated"}, "3,136 to 262,144 pixels, as in the training recipes"),
        ("qwen2_5_vl", "mlp", {}, "3,136 to 262,144 pixels, as in the training recipes"),
        ("qwen2_5_vl", "mlp", {"max_pixels": 9999}, "3,136 to 9,999 pixels, as the file says"),
        ("qwen2_5_vl", "extended", {}, r"[\d,]+ to [\d,]+ pixels, as in the tower's VLM"),
    ],
)
def test_what_becomes_of_a_picture_s_size_is_said(sources, tmp_path, capsys, tower, projector, vision, message):
    parts = (sources / tower, projector, sources / "qwen3", tmp_path / "out")
    file = grafts.write_recipe(tmp_path / "graft.yaml", *parts, vision=vision)
    assert cli.main(["graft", "--plan", str(file)]) == 0
    assert re.search(f"pictures: {message}", capsys.readouterr().out)
    assert cli.main(["graft", str(file)]) == 0
    assert re.search(f"pictures +{message}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("tower", "projector"), [("siglip", "mlp"), ("qwen2_5_vl", "extended"), ("qwen2_5_vl", "linear")]
)
def test_the_plan_is_what_is_made(sources, tmp_path, capsys, tower, projector):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from qwen_merge.architecture import register

    register()
    output = tmp_path / "out"
    file = grafts.write_recipe(tmp_path / "graft.yaml", sources / tower, projector, sources / "qwen3", output)
    assert cli.main(["graft", "--plan", str(file), "--picture", "300x200"]) == 0
    plan = capsys.readouterr().out
    assert not output.exists()
    assert cli.main(["graft", str(file)]) == 0
    model = AutoModelForImageTextToText.from_pretrained(output)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert int(re.search(r"total +([\d,]+) parameters", plan)[1].replace(",", "")) == total
    tokens = int(re.search(r"a picture of 300 x 200 takes (\d+) tokens", plan)[1])
    processor = AutoProcessor.from_pretrained(output)
    from PIL import Image

    inputs = processor(text=["<|image_pad|>"], images=[Image.new("RGB", (300, 200))], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == tokens
