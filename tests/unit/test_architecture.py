"""Parity of the merged model with its two parents, on tiny checkpoints of the real architectures.

Every comparison has a control beside it: the same comparison with one thing broken must see a difference.
"""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForVision2Seq,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_multimodal_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from checkpoints import TOKEN_IDS
from qwen_merge.architecture import register

register()

SOURCES = pytest.mark.parametrize("source", ["tied", "untied"])


def load(path, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(path, **kwargs).eval()


@pytest.fixture
def sources(request, source):
    return request.getfixturevalue(source)


def text_batch(padding_side: str | None):
    """(2, 24) ids and mask; with a padding side, the second row has 9 tokens of padding there."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 300, (2, 24), generator=generator)
    mask = torch.ones_like(ids)
    if padding_side == "left":
        mask[1, :9] = 0
    elif padding_side == "right":
        mask[1, -9:] = 0
    return ids, mask


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(frames: int = 6, width: int = 56, height: int = 84) -> list[Image.Image]:
    return [picture(width, height, seed) for seed in range(frames)]


IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


# --- text: the merged model is Qwen3 ---


@SOURCES
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_text_only_logits_equal_those_of_qwen3(sources, padding, attention):
    merged, qwen3 = (
        load(sources.merged, attn_implementation=attention),
        Qwen3ForCausalLM.from_pretrained(sources.llm, attn_implementation=attention).eval(),
    )
    ids, mask = text_batch(padding)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    expected = qwen3(ids, attention_mask=mask, position_ids=positions).logits
    difference = ((merged(input_ids=ids, attention_mask=mask).logits - expected).abs() * mask[..., None]).max()
    assert difference <= 1e-5
    for layer in qwen3.model.layers:  # control: Qwen3 without its QK-norm
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    control = qwen3(ids, attention_mask=mask, position_ids=positions).logits
    assert ((control - expected).abs() * mask[..., None]).max() > 1e-2


@torch.no_grad()
def test_text_only_logits_in_bfloat16_are_within_rounding(untied):
    ids, mask = text_batch("left")
    merged = load(untied.merged, torch_dtype=torch.bfloat16)
    qwen3 = Qwen3ForCausalLM.from_pretrained(untied.llm, torch_dtype=torch.bfloat16).eval()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    expected = qwen3(ids, attention_mask=mask, position_ids=positions).logits.float()
    exact = Qwen3ForCausalLM.from_pretrained(untied.llm)(ids, attention_mask=mask, position_ids=positions).logits
    rounding = ((expected - exact).abs() * mask[..., None]).max()
    difference = ((merged(input_ids=ids, attention_mask=mask).logits.float() - expected).abs() * mask[..., None]).max()
    assert difference <= rounding


@SOURCES
@torch.no_grad()
def test_a_kv_cache_changes_nothing(sources):
    merged = load(sources.merged)
    ids, mask = text_batch("left")
    whole = merged(input_ids=ids, attention_mask=mask).logits[:, -4:]
    past = merged(input_ids=ids[:, :-4], attention_mask=mask[:, :-4], use_cache=True).past_key_values
    steps = []
    for i in range(20, 24):
        step = merged(
            input_ids=ids[:, i : i + 1],
            attention_mask=mask[:, : i + 1],
            past_key_values=past,
            use_cache=True,
            cache_position=torch.tensor([i]),
        )
        steps.append(step.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() <= 1e-5
    # Without `cache_position`, as a plain loop over a cache does it and as Qwen3 allows it.
    past = merged(input_ids=ids[:, :-4], attention_mask=mask[:, :-4], use_cache=True).past_key_values
    rest = merged(input_ids=ids[:, -4:], attention_mask=mask, past_key_values=past).logits
    assert (rest - whole).abs().max() <= 1e-5


@SOURCES
def test_greedy_text_equals_qwen3s(sources):
    ids, mask = text_batch("left")
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = Qwen3ForCausalLM.from_pretrained(sources.llm).generate(ids, **arguments)
    assert torch.equal(load(sources.merged).generate(input_ids=ids, **arguments), expected)


# --- vision: the tower is Qwen2.5-VL's ---


@SOURCES
@torch.no_grad()
def test_vision_features_before_the_new_layer_equal_qwen2_5_vls(sources):
    merged, vlm = load(sources.merged), Qwen2_5_VLForConditionalGeneration.from_pretrained(sources.vlm).eval()
    processor = AutoProcessor.from_pretrained(sources.merged)
    pictures = [picture(56, 56), picture(140, 84, 1), picture(252, 308, 2)]
    images = processor(text=[IMAGE * 3], images=pictures, return_tensors="pt")
    clip = processor(text=[VIDEO], videos=[video()], return_tensors="pt")
    assert clip["video_grid_thw"][0, 0] > 1, "the video must have several time steps"
    for pixels, grid in (
        (images["pixel_values"], images["image_grid_thw"]),
        (clip["pixel_values_videos"], clip["video_grid_thw"]),
    ):
        expected = vlm.visual(pixels, grid)
        features = merged.visual(pixels, grid)
        assert features.shape == (len(expected), merged.config.hidden_size)
        plain = copy.deepcopy(merged.visual)
        plain.merger.mlp = plain.merger.mlp[:3]
        torch.testing.assert_close(plain(pixels, grid), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged.visual.merger.mlp[3:](expected), features, atol=1e-5, rtol=1e-5)
        plain.blocks[0].attn.proj.bias += 0.1  # control
        assert not torch.allclose(plain(pixels, grid), expected, atol=1e-4)


def test_the_projector_ends_in_gelu_and_one_linear_with_bias(tied):
    merger = load(tied.merged).visual.merger
    assert [type(layer).__name__ for layer in merger.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    new = merger.mlp[4]
    assert (new.in_features, new.out_features) == (96, 64)
    assert not new.bias.any()
    assert abs(new.weight.std().item() - 0.02) < 0.002


# --- positions ---


def position_cases():
    text, one = "How many?", [picture(56, 84)]
    return {
        "text": (text, None, None, 1.0),
        "picture": (f"{IMAGE}{text}", one, None, 1.0),
        "pictures": (f"a {IMAGE} b {IMAGE}{text}", [picture(56, 84), picture(140, 56)], None, 1.0),
        "video": (f"{VIDEO}{text}", None, [video()], 1.0),
        "slow video": (f"{VIDEO}{text}", None, [video()], 4.0),
        "picture and video": (f"{IMAGE} {VIDEO}{text}", one, [video()], 2.0),
    }


@pytest.mark.parametrize("case", position_cases())
def test_positions_equal_qwen2_5_vls(tied, case):
    text, images, videos, seconds = position_cases()[case]
    merged, vlm = load(tied.merged).model, Qwen2_5_VLForConditionalGeneration.from_pretrained(tied.vlm).model
    inputs = AutoProcessor.from_pretrained(tied.merged)(
        text=[text, "short"] if case == "text" else [text],
        images=images,
        videos=videos,
        padding=True,
        return_tensors="pt",
    )
    arguments = {
        "input_ids": inputs["input_ids"],
        "image_grid_thw": inputs.get("image_grid_thw"),
        "video_grid_thw": inputs.get("video_grid_thw"),
        "second_per_grid_ts": torch.tensor([seconds]) if videos else None,
        "attention_mask": inputs["attention_mask"],
    }
    positions, deltas = merged.get_rope_index(**arguments)
    expected, expected_deltas = vlm.get_rope_index(**arguments)
    assert torch.equal(positions, expected)
    assert torch.equal(deltas, expected_deltas)
    if videos:  # control: time is absolute, so another frame rate gives other positions
        other, _ = vlm.get_rope_index(**{**arguments, "second_per_grid_ts": torch.tensor([seconds + 1])})
        assert not torch.equal(positions, other)


def test_one_cos_and_sin_rotate_as_qwen2_5_vls_per_layer_sections_do(tied):
    text_model = load(tied.merged).model.language_model
    rotary, sections = text_model.rotary_emb, text_model.config.rope_scaling["mrope_section"]
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 7, 32, generator=generator) for heads in (4, 2))
    positions_3bt = torch.randint(0, 5000, (3, 2, 7), generator=generator)
    inv_freq = rotary.inv_freq
    angles_3btd = (positions_3bt[..., None].float() * inv_freq).repeat(1, 1, 1, 2)
    expected = apply_multimodal_rotary_pos_emb(q, k, angles_3btd.cos(), angles_3btd.sin(), sections)
    rotated = apply_rotary_pos_emb(q, k, *rotary(q, positions_3bt))
    assert all(torch.equal(seen, wanted) for seen, wanted in zip(rotated, expected, strict=True))
    swapped = apply_rotary_pos_emb(q, k, *rotary(q, positions_3bt[[1, 0, 2]]))  # control
    assert not torch.allclose(swapped[0], expected[0], atol=1e-3)


def test_layers_get_no_3d_positions_and_the_ones_of_a_call_do_not_stay(tied):
    merged = load(tied.merged)
    seen = []
    merged.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    ids, mask = text_batch(None)
    merged(input_ids=ids, attention_mask=mask)
    assert seen[-1].ndim == 2
    text_model = merged.model.language_model
    plain = text_model(input_ids=ids).last_hidden_state
    with pytest.raises(IndexError):  # a forward that fails leaves nothing for the next one
        text_model(input_ids=ids + 10_000, position_ids=torch.zeros(3, *ids.shape, dtype=torch.long))
    assert torch.equal(text_model(input_ids=ids).last_hidden_state, plain)


def test_forwards_in_several_threads_keep_their_own_positions(tied):
    from concurrent.futures import ThreadPoolExecutor

    text_model = load(tied.merged).model.language_model
    ids, _ = text_batch(None)

    @torch.no_grad()
    def hidden(stride):
        positions_3bt = (torch.arange(24) * stride).expand(3, 2, -1)
        return text_model(input_ids=ids, position_ids=positions_3bt).last_hidden_state

    expected = [hidden(stride) for stride in range(1, 5)]
    assert not torch.allclose(expected[0], expected[1], atol=1e-4)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert all(map(torch.equal, pool.map(hidden, range(1, 5)), expected))


# --- pictures, videos, generation, training ---


@SOURCES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_left_padded_batch_answers_as_each_prompt_alone(sources, attention):
    merged = load(sources.merged, attn_implementation=attention)
    processor = AutoProcessor.from_pretrained(sources.merged, padding_side="left")
    prompts = [(f"{IMAGE}What colour?", [picture(84, 84)]), (f"{IMAGE}and{IMAGE}?", [picture(56, 56), picture(84, 56)])]
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch = processor(
        text=[text for text, _ in prompts],
        images=[p for _, pictures in prompts for p in pictures],
        padding=True,
        return_tensors="pt",
    )
    together = merged.generate(**batch, **arguments)[:, batch["input_ids"].shape[1] :]
    for row, (text, pictures) in zip(together, prompts, strict=True):
        alone = processor(text=[text], images=pictures, return_tensors="pt")
        answer = merged.generate(**alone, **arguments)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(row, answer)
        uncached = merged.generate(**alone, **arguments, use_cache=False)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(answer, uncached)


@torch.no_grad()
def test_pictures_and_videos_change_the_answer(tied):
    merged, processor = load(tied.merged), AutoProcessor.from_pretrained(tied.merged)
    for marker, name in ((IMAGE, "images"), (VIDEO, "videos")):
        logits = []
        for seed in (0, 1):
            media = [picture(84, 84, seed)] if name == "images" else [[picture(84, 84, seed + i) for i in range(4)]]
            inputs = processor(text=[f"{marker}What is it?"], return_tensors="pt", **{name: media})
            logits.append(merged(**inputs).logits[0, -1])
        assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_gradient_checkpointing_changes_no_gradient(untied):
    processor = AutoProcessor.from_pretrained(untied.merged)
    inputs = processor(text=[f"{IMAGE}What colour?"], images=[picture(84, 84)], return_tensors="pt")
    gradients = []
    for checkpointing in (False, True):
        model = load(untied.merged).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# --- names, files, configuration ---


@SOURCES
def test_a_save_gives_the_merged_files_tensors_and_names_back(sources, tmp_path):
    load(sources.merged).save_pretrained(tmp_path)
    merged, saved = load_file(sources.merged / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert merged.keys() == saved.keys()
    assert all(torch.equal(merged[name], saved[name]) for name in merged)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is ("lm_head.weight" not in merged)
    assert "text_config" not in config
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [4, 6, 6]}
    load(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


@SOURCES
def test_checkpoints_with_the_names_of_memory_load_too(sources, tmp_path):
    """transformers 4.52.3 saved the original's models as model.language_model.*, with a nested text_config."""
    from safetensors.torch import save_file

    model = load(sources.merged)
    model.save_pretrained(tmp_path)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] = {k: v for k, v in config.items() if k in model.config.text_config.to_dict()}
    config["text_config"]["rope_scaling"] = {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]}
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, headless = load(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, headless.state_dict()[name]) for name, tensor in model.model.state_dict().items())
    assert again.config.tie_word_embeddings is model.config.tie_word_embeddings


def test_load_state_dict_takes_the_names_of_the_disk(untied):
    """What a trainer does when it resumes. Qwen2.5-VL in transformers 4.52.3 loads nothing here (the control)."""
    weights = load_file(untied.merged / "model.safetensors")
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(untied.merged))
    result = model.load_state_dict(weights, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(model.model.visual.merger.mlp[4].weight, weights["visual.merger.mlp.4.weight"])
    assert torch.equal(model.model.language_model.norm.weight, weights["model.norm.weight"])
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(untied.vlm)
    assert stock.load_state_dict(load_file(untied.vlm / "model.safetensors"), strict=False).unexpected_keys


@SOURCES
def test_the_auto_classes_find_it(sources):
    assert AutoConfig.from_pretrained(sources.merged).model_type == "qwen2_5_vl_merge"
    assert type(AutoModelForVision2Seq.from_pretrained(sources.merged)) is type(load(sources.merged))
    assert type(AutoModel.from_pretrained(sources.merged)).__name__ == "Qwen2_5_VL_MergeModel"
    processor = AutoProcessor.from_pretrained(sources.merged)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert processor.image_token_id == TOKEN_IDS["<|image_pad|>"]


def test_text_fields_are_one_value_at_both_levels(tied):
    config = AutoConfig.from_pretrained(tied.merged)
    config.use_cache = False
    assert config.text_config.use_cache is False
    assert config.hidden_size == config.text_config.hidden_size == 64
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    with pytest.raises(AttributeError):
        _ = config.no_such_field


def test_rope_scaling_set_again_keeps_the_sections(tied, tmp_path):
    """LLaMA-Factory's `rope_scaling: yarn` sets a dict without sections; an override has the form of the disk."""
    on_disk = {"type": "mrope", "mrope_section": [4, 6, 6]}
    config = AutoConfig.from_pretrained(tied.merged, rope_scaling=on_disk)
    assert config.to_dict()["rope_scaling"] == on_disk
    config.rope_scaling = {"rope_type": "yarn", "factor": 4.0}
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_scaling["mrope_section"] == [4, 6, 6]
    assert again.rope_scaling["rope_type"] == "yarn"
    model = AutoModelForImageTextToText.from_config(again)
    assert model(input_ids=text_batch(None)[0]).logits.isfinite().all()
    config.rope_scaling = None
    assert config.to_dict()["rope_scaling"] == on_disk
    with pytest.raises(ValueError, match="must add up"):
        config.rope_scaling = {"mrope_section": [4, 6, 8]}


def test_a_model_without_a_head_saves_the_names_of_the_disk(tied, tmp_path):
    AutoModel.from_pretrained(tied.merged).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(tied.merged / "model.safetensors").keys()


@pytest.mark.parametrize("sections", [[4, 6, 5], [16, 24, 24], [8, 8], [4.0, 6.0, 6.0], "466"])
def test_sections_that_do_not_fit_the_head_are_refused(tied, sections):
    config = json.loads((tied.merged / "config.json").read_text())
    config["rope_scaling"]["mrope_section"] = sections
    with pytest.raises(ValueError, match=r"must add up to head_dim / 2 = 16"):
        AutoConfig.for_model(**config)
