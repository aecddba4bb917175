"""Grafts of every tower, projector and LLM: copies compute what they did, what is new is seeded, all of it loads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import grafts
from grafts import PROMPT, pictures
from qwen_merge import cli
from qwen_merge.architecture import register
from qwen_merge.architecture.projectors_qwen_merge_graft import in_rows, in_units
from qwen_merge.architecture.towers_qwen_merge_graft import features_of

register()

# Every tower, projector, LLM and numbering at least once, and all projectors before one LLM.
PAIRS = (
    ("siglip", "linear", "qwen3", "mrope"),
    ("siglip", "mlp", "qwen3_moe", "1d"),
    ("siglip", "patch_merger", "qwen2", "mrope"),
    ("siglip", "resampler", "qwen3", "1d"),
    ("clip", "mlp", "qwen3", "mrope-2d"),
    ("clip", "linear", "qwen2", "1d"),
    ("dinov2", "linear", "qwen3_moe", "mrope"),
    ("dinov2", "resampler", "qwen2", "mrope"),
    ("dinov2_with_registers", "mlp", "qwen3", "mrope"),
    ("qwen2_vl", "extended", "qwen3", "mrope"),
    ("qwen2_vl", "linear", "qwen2", "1d"),
    ("qwen2_5_vl", "extended", "qwen3_moe", "mrope"),
    ("qwen2_5_vl", "patch_merger", "qwen3", "mrope"),
    ("qwen2_5_vl", "resampler", "qwen2", "1d"),
    ("qwen2_5_vl", "mlp", "qwen3", "mrope-2d"),
    ("siglip", "linear", "qwen3_vl", "mrope"),
    ("dinov2", "mlp", "qwen3_vl", "1d"),
    ("siglip2", "mlp", "qwen3", "mrope"),
) + grafts.HAS_QWEN3_VL * (
    ("qwen3_vl", "own", "qwen3_vl", "mrope"),
    ("qwen3_vl", "extended", "qwen3", "mrope"),
    ("qwen3_vl", "patch_merger", "qwen2", "mrope"),
    ("qwen3_vl", "resampler", "qwen3_moe", "1d"),
)


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.mark.parametrize(("tower", "projector", "llm", "positions"), PAIRS)
@torch.no_grad()
def test_texts_and_pictures(graft, sources, tower, projector, llm, positions):
    folder = graft(tower, projector, llm, positions)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    own = grafts.language_model(sources / llm)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = own(ids).logits
    assert (model.eval()(input_ids=ids).logits - expected).abs().max() < 1e-5
    own.model.layers[0].self_attn.v_proj.weight.mul_(1.5)  # the control
    assert (own(ids).logits - expected).abs().max() > 1e-3

    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=PROMPT + PROMPT, images=pictures((90, 60), (60, 120)), return_tensors="pt")
    tokens = [processor.image_processor.tokens(grid) for grid in inputs["image_grid_thw"]]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == sum(tokens)
    assert tokens == [model.config.tokens(grid) for grid in inputs["image_grid_thw"].tolist()]
    seen = model(**inputs).logits
    other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    assert (seen - other)[:, -1].abs().max() > 1e-6  # the pictures matter
    cut = {name: inputs[name][:, : -tokens[1] - 20] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=rf"tokens: \[\d+\], features \[{sum(tokens)}\]"):
        model(**{**inputs, **cut})

    # With a cache, token after token, as in one forward: positions go on where the prompt's end.
    answer = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    whole = dict(inputs, input_ids=answer, attention_mask=torch.ones_like(answer))
    assert torch.equal(model(**whole).logits[0, -6:-1].argmax(-1), answer[0, -5:])


@pytest.mark.parametrize("tower", grafts.TOWERS)
@torch.no_grad()
def test_features_are_the_towers_own(graft, sources, tower):
    import transformers

    folder = graft(tower, "linear", "qwen3", "mrope")
    model, processor = load(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=PROMPT * 3, images=pictures((56, 56), (120, 60), (56, 56)), return_tensors="pt")
    grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
    features = features_of(model.model.visual, inputs["pixel_values"], grids, model.config)
    if model.config.is_native:
        vlm = AutoModelForImageTextToText.from_pretrained(sources / tower).eval()
        own = transformers.AutoImageProcessor.from_pretrained(sources / tower, use_fast=False)
        pixels = own(images=pictures((56, 56), (120, 60), (56, 56)), return_tensors="pt")
        assert torch.equal(pixels["image_grid_thw"], inputs["image_grid_thw"])
        assert torch.allclose(in_units(inputs["pixel_values"], grids, 2), pixels["pixel_values"], atol=1e-6)
        expected = vlm.model.visual(pixels["pixel_values"], pixels["image_grid_thw"])
        expected = expected[0] if isinstance(expected, tuple) else expected  # Qwen3-VL's, beside DeepStack
        found = vlm.model.visual.merger(in_units(features, grids, 2))
        control = vlm.model.visual.merger(features)
    elif tower == "siglip2":
        whole = transformers.Siglip2Model.from_pretrained(sources / tower).eval()
        own = transformers.Siglip2ImageProcessor.from_pretrained(sources / tower, max_num_patches=40)
        pixels = own(images=pictures((56, 56), (112, 56)), return_tensors="pt", do_resize=False)
        shapes = [tuple(shape) for shape in pixels["spatial_shapes"].tolist()]
        states = whole.vision_model(
            pixels["pixel_values"], pixels["pixel_attention_mask"], pixels["spatial_shapes"]
        ).last_hidden_state
        expected = torch.cat([state[: rows * columns] for state, (rows, columns) in zip(states, shapes, strict=True)])
        inputs = processor(text=PROMPT * 2, images=pictures((56, 56), (112, 56)), return_tensors="pt")
        grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
        assert [grid[1:] for grid in grids] == shapes == [(4, 4), (4, 8)]
        found = features_of(model.model.visual, inputs["pixel_values"], grids, model.config)
        control = features_of(model.model.visual, inputs["pixel_values"], [grids[0], (1, 8, 4)], model.config)
    else:
        name = (
            "BitImageProcessor" if "dinov2" in tower else {"clip": "CLIP", "siglip": "Siglip"}[tower] + "ImageProcessor"
        )
        own = getattr(transformers, name).from_pretrained(sources / tower)
        pixels = own(images=pictures((56, 56), (120, 60), (56, 56)), return_tensors="pt")["pixel_values"]
        whole = transformers.AutoModel.from_pretrained(sources / tower).eval()
        states = getattr(whole, "vision_model", whole)(pixel_values=pixels).last_hidden_state
        expected = states[:, -16:].flatten(0, 1)
        found, control = features, features.roll(1, 0)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(control, expected, atol=1e-2)


def test_squares_and_rows_are_each_others_way_back():
    grids = [(1, 4, 6), (2, 2, 4), (1, 8, 2)]
    numbers = torch.arange(24 + 16 + 16)[:, None]
    squares = in_units(numbers, grids, 2)
    assert squares[:8, 0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]
    assert torch.equal(in_rows(squares, grids, 2), numbers)
    assert torch.equal(in_units(numbers, grids, 1), numbers)


@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
def test_a_tower_of_one_size_takes_others_when_it_interpolates(sources, tmp_path, tower):
    file = grafts.write_recipe(
        tmp_path / "graft.yaml", sources / tower, "mlp", sources / "qwen3", tmp_path / "out",
        vision={"resolution": "interpolated", "min_pixels": 28 * 28, "max_pixels": 112 * 112},
    )  # fmt: skip
    assert cli.main(["graft", str(file)]) == 0
    model, processor = load(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    for size in ((28, 28), (56, 56), (300, 100), (31, 95), (1, 40)):  # a side of 1 is made as long as a token's
        inputs = processor(text=PROMPT, images=pictures(size), return_tensors="pt")
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        assert rows % 2 == columns % 2 == 0
        assert 28 * 28 <= rows * columns * 196 <= 112 * 112
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == rows * columns // 4
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        processor(text=PROMPT, images=pictures((1, 6000)), return_tensors="pt")


def test_qwen_merge_itself_is_the_mergers_byte_for_byte(sources, tmp_path):
    file = grafts.write_recipe(
        tmp_path / "graft.yaml", sources / "qwen2_5_vl", "extended", sources / "qwen3", tmp_path / "graft", seed=5
    )
    assert cli.main(["graft", str(file)]) == 0
    merge = ["merge", "--vlm-path", str(sources / "qwen2_5_vl"), "--llm-path", str(sources / "qwen3")]
    assert cli.main([*merge, "--output-path", str(tmp_path / "merge"), "--seed", "5"]) == 0
    assert cli.main([*merge, "--output-path", str(tmp_path / "other"), "--seed", "6"]) == 0
    content = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("graft", "merge", "other")
    }
    assert content["graft"] == content["merge"]
    assert content["other"] != content["merge"]


def test_copied_tensors_keep_their_bytes_and_new_ones_follow_the_seed(sources, tmp_path):
    weights = {}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        output = tmp_path / name
        file = grafts.write_recipe(
            tmp_path / "graft.yaml", sources / "siglip", "mlp", sources / "qwen3_moe", output, seed=seed
        )
        assert cli.main(["graft", str(file)]) == 0
        weights[name] = load_file(output / "model.safetensors")
    sets = {tower: load_file(sources / tower / "model.safetensors") for tower in ("siglip", "qwen3_moe")}
    one = weights["one"]
    for name, tensor in one.items():
        if not name.startswith("projector."):
            origin, source = ("siglip", name.removeprefix("visual.")) if "visual." in name else ("qwen3_moe", name)
            assert torch.equal(tensor, sets[origin][source])
    assert {name for name in sets["siglip"] if f"visual.{name}" in one} == {
        name for name in sets["siglip"] if name.startswith("vision_model.") and ".head." not in name
    }
    assert all(torch.equal(one[name], weights["same"][name]) for name in one)
    drawn = ["projector.mlp.0.weight", "projector.mlp.2.weight"]
    assert not any(torch.equal(one[name], weights["other"][name]) for name in drawn)
    assert one[drawn[0]].std() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(one[drawn[0]].flatten()[:64], one[drawn[1]].flatten()[:64])  # a stream for each
    assert torch.equal(one["projector.norm.weight"], torch.ones(128))
    assert torch.equal(one["projector.norm.bias"], torch.zeros(128))
    manifest = json.loads((tmp_path / "one/merge_manifest.json").read_text())
    assert manifest["tensors"]["initialised"] == [name for name in one if name.startswith("projector.")] or set(
        manifest["tensors"]["initialised"]
    ) == {name for name in one if name.startswith("projector.")}


def test_a_save_keeps_names_and_bits(graft, tmp_path):
    folder = graft("qwen2_5_vl", "patch_merger", "qwen3", "mrope")
    load(folder).save_pretrained(tmp_path / "saved")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["model_type"] == "qwen_merge_graft"
    assert config["torch_dtype"] == "float32"  # 4.57 would call it dtype, which 4.52 does not read
    assert config["vision_config"]["model_type"] == "qwen2_5_vl"
    assert torch.equal(load(tmp_path / "saved").lm_head.weight, load(folder).lm_head.weight)


def test_the_code_travels_with_the_checkpoint(graft, tmp_path):
    folder = graft("dinov2", "linear", "qwen3_moe", "mrope")
    script = (
        "import sys; from PIL import Image; from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "inputs = processor(text=sys.argv[2], images=[Image.new('RGB', (80, 60), (9, 99, 200))], return_tensors='pt')\n"
        "assert not any(name.split('.')[0] == 'qwen_merge' for name in sys.modules)\n"
        "print(model(**inputs).logits.double().sum().item())"
    )
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(folder), PROMPT]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    inputs = AutoProcessor.from_pretrained(folder)(
        text=PROMPT, images=[Image.new("RGB", (80, 60), (9, 99, 200))], return_tensors="pt"
    )
    with torch.no_grad():
        expected = load(folder)(**inputs).logits.double().sum().item()
    assert float(run.stdout.split()[-1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("projector", ["mlp", "resampler"])
def test_packed_samples_see_nothing_of_each_other(graft, projector):
    folder = graft("siglip", projector, "qwen3", "mrope")
    model, processor = load(folder).train(), AutoProcessor.from_pretrained(folder)
    alone, packed, control = grafts.losses_alone_and_packed(model, processor)
    assert packed == pytest.approx(alone, abs=1e-5)
    assert abs(control - alone) > 1e-3


def test_experts_take_no_packed_rows(graft):
    """transformers' layers of Qwen3-MoE would drop the offsets, and samples see each other."""
    model = load(graft("siglip", "mlp", "qwen3_moe", "1d"))
    ids, ends = torch.arange(10)[None], torch.tensor([0, 5, 10]).int()
    offsets = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
    with pytest.raises(ValueError, match="Qwen3-MoE takes no packed samples"):
        model(input_ids=ids, position_ids=torch.arange(5).repeat(3, 1, 2), **offsets)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
@pytest.mark.parametrize("tower", ["siglip", "qwen2_5_vl"])
def test_pictures_of_any_mode(graft, tower, mode):
    processor = AutoProcessor.from_pretrained(graft(tower, "linear", "qwen3", "mrope"))
    picture = pictures((70, 56))[0].convert(mode)
    found = processor(text=PROMPT, images=[picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(found, processor(images=[picture.convert("RGB")], return_tensors="pt")["pixel_values"])


def test_a_conversation_with_a_picture(graft):
    processor = AutoProcessor.from_pretrained(graft("siglip", "mlp", "qwen3", "mrope"))
    picture = pictures((70, 56))[0]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    conversation = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(conversation, **options)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert torch.equal(processor(text=text, images=[picture], return_tensors="pt")["input_ids"], inputs["input_ids"])
    with pytest.raises(ValueError, match="takes pictures and no videos"):
        processor(text="", videos=[[picture]])


def test_rope_as_transformers_5_saves_it(sources, tmp_path):
    shutil.copytree(sources / "qwen3", tmp_path / "llm")
    config = json.loads((tmp_path / "llm/config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    (tmp_path / "llm/config.json").write_text(json.dumps(config))
    file = grafts.write_recipe(tmp_path / "graft.yaml", sources / "clip", "mlp", tmp_path / "llm", tmp_path / "out")
    assert cli.main(["graft", str(file)]) == 0
    assert load(tmp_path / "out").config.text_config.rope_theta == 1000000


@pytest.mark.parametrize("frozen", [True, False])
def test_one_step_changes_what_trains_and_nothing_else(sources, tmp_path, frozen):
    file = grafts.write_recipe(
        tmp_path / "graft.yaml", sources / "clip", "mlp", sources / "qwen2", tmp_path / "out", vision={"frozen": frozen}
    )
    assert cli.main(["graft", str(file)]) == 0
    model, processor = load(tmp_path / "out").train(), AutoProcessor.from_pretrained(tmp_path / "out")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    inputs = processor(text=PROMPT, images=pictures((56, 56)), return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    parts = {name.split(".")[1] if name.startswith("model.") else name.split(".")[0] for name in changed}
    assert parts == {"projector", "language_model", "lm_head"} | (set() if frozen else {"visual"})
