"""A user's own encoder, plain PyTorch, in a graft: `vision: {source: DIR, code: FILE}`.

.venv/bin/python -m pytest tests/unit/test_graft_own_encoder.py
"""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import grafts
import own_encoder
from qwen_merge import cli

SIDE = grafts.SIZE // 14


@pytest.fixture(scope="module")
def made(tmp_path_factory, sources):
    """(the graft, the file of its encoder)."""
    folder = tmp_path_factory.mktemp("own")
    weights, code = own_encoder.make(folder / "mine")
    file = grafts.write_recipe(
        folder / "graft.yaml", weights, "linear", sources / "qwen3_vl", folder / "graft", vision={"code": str(code)}
    )
    assert cli.main(["graft", "--plan", str(file)]) == 0
    assert cli.main(["graft", str(file)]) == 0
    return folder / "graft", code


def loaded(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def pictures() -> list[Image.Image]:
    return [Image.radial_gradient("L").convert("RGB"), Image.new("RGB", (90, 60), (200, 40, 9))]


@torch.no_grad()
def test_its_tokens_are_the_encoder_s_own(made):
    graft, code = made
    model, processor = loaded(graft), AutoProcessor.from_pretrained(graft, trust_remote_code=True)
    text = "<|vision_start|><|image_pad|><|vision_end|>And <|vision_start|><|image_pad|><|vision_end|>?"
    inputs = processor(text=text, images=pictures(), return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 2 * SIDE**2
    encoder = own_encoder.load(code)
    encoder.load_state_dict(load_file(code.parent / "weights/model.safetensors"))
    from transformers import BitImageProcessor

    pixels = BitImageProcessor(
        **{name: value for name, value in grafts.PREPROCESSORS["dinov2"].items() if name != "image_processor_type"}
    )(images=pictures(), return_tensors="pt")["pixel_values"]
    tensors = load_file(graft / "model.safetensors")

    def expected():
        features = encoder(pixels)[:, 1:]  # without the class token
        return features @ tensors["projector.proj.weight"].T + tensors["projector.proj.bias"]

    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert torch.allclose(found, expected().flatten(0, 1), atol=1e-5)
    assert model(**inputs).logits.isfinite().all()
    encoder.layer.linear1.bias[0] += 0.1  # the control
    assert not torch.allclose(found, expected().flatten(0, 1), atol=1e-5)


@torch.no_grad()
def test_text_is_the_llm_s_own(made, sources):
    ids = torch.arange(40, 80)[None]
    expected = grafts.language_model(sources / "qwen3_vl")(ids).logits
    model = loaded(made[0])
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    model.model.language_model.layers[0].mlp.up_proj.weight[0] += 0.1  # the control
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)


@torch.no_grad()
def test_its_code_travels_with_every_save(made, tmp_path):
    graft, code = made
    file = "encoder_qwen_merge_graft.py"
    assert (graft / file).read_bytes() == code.read_bytes()
    model = loaded(graft)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / file).read_bytes() == code.read_bytes()
    processor = AutoProcessor.from_pretrained(graft, trust_remote_code=True)
    processor.save_pretrained(tmp_path / "saved")
    inputs = processor(text="<|image_pad|>", images=pictures()[:1], return_tensors="pt")
    assert torch.equal(loaded(tmp_path / "saved")(**inputs).logits, model(**inputs).logits)
    assert AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True).vision_config.scale == 3
    tensors = load_file(tmp_path / "saved/model.safetensors")
    assert "visual.encoder.patches.weight" in tensors
    tensors["visual.encoder.first"] += 1  # the control
    save_file(tensors, tmp_path / "saved/model.safetensors", metadata={"format": "pt"})
    assert not torch.equal(loaded(tmp_path / "saved")(**inputs).logits, model(**inputs).logits)


def test_the_installed_package_s_classes_say_what_they_lack(made):
    from qwen_merge.architecture.modeling_qwen_merge_graft import QwenMergeGraftForConditionalGeneration

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        QwenMergeGraftForConditionalGeneration.from_pretrained(made[0])


@pytest.mark.parametrize(
    ("code", "config", "vision", "message"),
    [
        ("import none_such", {}, {}, "gives no Encoder: ModuleNotFoundError"),
        ("Other = None", {}, {}, "gives no Encoder: AttributeError"),
        (own_encoder.CODE.replace("dim=1))", "dim=1))[:, :5]"), {}, {}, r"gives (1, 5, 24) for a picture of 4 x 4"),
        (own_encoder.CODE.replace("dim=1))", "dim=1))[:, 0]"), {}, {}, "gives (1, 24) for a picture"),
        (own_encoder.CODE, {"hidden_size": 32, "scale": None}, {}, "gives nothing for a picture: TypeError"),
        (own_encoder.CODE, {"image_size": "56"}, {}, "image_size '56'; expected a number"),
        (own_encoder.CODE, {}, {"layer": -2}, "vision.layer -2: of custom only the result can be taken"),
        (own_encoder.CODE, {}, {"code": "none.py"}, "gives no Encoder: FileNotFoundError"),
        (own_encoder.CODE.replace("layer = nn", "other = nn").replace("self.layer(", "self.other("), {}, {}, "other"),
    ],
)
def test_what_cannot_be_joined_is_said(tmp_path, sources, capsys, code, config, vision, message):
    weights, file = own_encoder.make(tmp_path / "mine", own_encoder.CODE)
    file.write_text(code)
    own_encoder.write_json(weights / "config.json", own_encoder.CONFIG | config)
    vision = {"code": str(file), **vision}
    recipe = grafts.write_recipe(
        tmp_path / "graft.yaml", weights, "linear", sources / "qwen3", tmp_path / "out", vision=vision
    )
    assert cli.main(["graft", str(recipe)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_its_file_is_named_from_the_recipes_folder_on(tmp_path, sources, monkeypatch):
    weights, code = own_encoder.make(tmp_path / "mine")
    parts = (weights, "linear", sources / "qwen3", tmp_path / "graft")
    recipe = grafts.write_recipe(tmp_path / "graft.yaml", *parts, vision={"code": f"mine/{code.name}"})
    (tmp_path / "elsewhere/mine").mkdir(parents=True)
    (tmp_path / "elsewhere/mine" / code.name).write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["graft", str(recipe)]) == 0
    assert (tmp_path / "graft/encoder_qwen_merge_graft.py").read_bytes() == code.read_bytes()


def test_verify_compares_its_tensors_and_does_not_run_its_code(made, tmp_path, capsys):
    folder = shutil.copytree(made[0], tmp_path / "graft")
    assert cli.main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "NOT CHECKED  vision features  the encoder is code of its user's own" in out
    (folder / "encoder_qwen_merge_graft.py").write_text("raise RuntimeError('it was run')")
    assert cli.main(["verify", str(folder)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed == ["FAIL         other files      encoder_qwen_merge_graft.py is not what was written"]
    tensors = load_file(folder / "model.safetensors")
    tensors["visual.encoder.first"] += 1  # the control
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["verify", str(folder)]) == 1
    assert "visual.encoder.first differs from its source" in capsys.readouterr().out


def test_its_loss_is_measured(tmp_path, sources, capsys):
    weights, code = own_encoder.make(tmp_path / "mine")
    parts = (weights, "linear", sources / "qwen2", tmp_path / "graft")
    recipe = grafts.write_recipe(tmp_path / "graft.yaml", *parts, vision={"code": str(code)})
    assert cli.main(["graft", str(recipe), "--measure"]) == 0
    assert "(+0.0000); KL divergence from the LLM 0.0000" in capsys.readouterr().out
