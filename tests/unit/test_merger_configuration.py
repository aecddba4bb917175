"""Configuration surgery: every field from where it should come, and everything that does not fit refused."""

import copy
import inspect

import pytest

from checkpoints import LLM_CONFIG, TOKEN_IDS, VLM_CONFIG
from qwen_merge.bench.real_sizes import QWEN2_5_VL, QWEN3
from qwen_merge.errors import UserError
from qwen_merge.merger.configuration import (
    AUTO_MAP,
    TEXT_DEFAULTS,
    VISION_DEFAULTS,
    VISION_FROM_SHAPES,
    RopeOptions,
    merged_config,
)
from qwen_merge.merger.safetensors_file import StoredTensor


def merge(vlm=None, llm=None, tensors=None, tokens=None, **rope):
    vlm, llm = copy.deepcopy(VLM_CONFIG) if vlm is None else vlm, dict(LLM_CONFIG) if llm is None else llm
    return merged_config(vlm, llm, tensors or {}, TOKEN_IDS if tokens is None else tokens, RopeOptions(**rope))


def vlm_with(**fields):
    return {**copy.deepcopy(VLM_CONFIG), **fields}


def llm_with(**fields):
    return {**LLM_CONFIG, **fields}


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def tower():
    """Headers of the tiny vision tower that tell its sizes."""
    shapes = {
        "visual.patch_embed.proj.weight": (32, 3, 2, 14, 14),
        "visual.blocks.0.mlp.gate_proj.weight": (40, 32),
        "visual.blocks.1.norm1.weight": (32,),
        "visual.merger.mlp.2.weight": (96, 128),
    }
    return {name: StoredTensor("BF16", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()}


def test_every_field_comes_from_its_source():
    config = merge().config
    replaced = {"architectures", "model_type", "rope_scaling", "torch_dtype", "transformers_version"}
    assert {name: config[name] for name in LLM_CONFIG if name not in replaced} == without(LLM_CONFIG, *replaced)
    assert config["model_type"] == "qwen2_5_vl_merge"
    assert config["architectures"] == ["Qwen2_5_VL_MergeForConditionalGeneration"]
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [4, 6, 6]}
    assert config["image_token_id"] == TOKEN_IDS["<|image_pad|>"]
    assert config["video_token_id"] == TOKEN_IDS["<|video_pad|>"]
    assert config["vision_start_token_id"] == TOKEN_IDS["<|vision_start|>"]
    assert config["vision_end_token_id"] == TOKEN_IDS["<|vision_end|>"]
    vision = config["vision_config"]
    expected = {**VLM_CONFIG["vision_config"], "in_channels": 3, "initializer_range": 0.02, "out_hidden_size2": 64}
    assert vision == expected
    assert "text_config" not in config


def test_the_inputs_are_not_touched():
    vlm, llm = copy.deepcopy(VLM_CONFIG), copy.deepcopy(LLM_CONFIG)
    merge(vlm, llm)
    assert (vlm, llm) == (VLM_CONFIG, LLM_CONFIG)


def test_the_merged_configuration_is_what_the_class_reads_and_writes():
    from qwen_merge.architecture.configuration_qwen2_5_vl_merge import AUTO_MAP as CLASS_AUTO_MAP
    from qwen_merge.architecture.configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeConfig

    config = {**merge().config, "torch_dtype": "bfloat16"}
    saved = Qwen2_5_VL_MergeConfig(**copy.deepcopy(config)).to_dict()
    assert {name: saved[name] for name in config if name != "vision_config"} == without(config, "vision_config")
    assert {name: saved["vision_config"][name] for name in config["vision_config"]} == config["vision_config"]
    assert CLASS_AUTO_MAP == AUTO_MAP


def test_the_defaults_are_transformers_own():
    from transformers import Qwen3Config
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    text = {name: p.default for name, p in inspect.signature(Qwen3Config.__init__).parameters.items()}
    for name in ("self", "kwargs", "rope_scaling"):
        del text[name]
    text.pop("layer_types", None)  # from transformers 4.57 on; made of the other fields where it is missing
    assert set(text) == set(TEXT_DEFAULTS)
    assert {n: text[n] for n, d in TEXT_DEFAULTS.items() if d is not None} == {
        n: d for n, d in TEXT_DEFAULTS.items() if d is not None
    }
    vision = {name: p.default for name, p in inspect.signature(Qwen2_5_VLVisionConfig.__init__).parameters.items()}
    assert set(vision) - {"self", "kwargs"} == set(VISION_DEFAULTS) | set(VISION_FROM_SHAPES)
    assert {name: vision[name] for name in VISION_DEFAULTS} == VISION_DEFAULTS


def test_published_configurations_need_no_notes():
    tokens = {"<|image_pad|>": 151655, "<|video_pad|>": 151656, "<|vision_start|>": 151652, "<|vision_end|>": 151653}
    for vlm in QWEN2_5_VL.values():
        for llm in QWEN3.values():
            merged = merge(copy.deepcopy(vlm), dict(llm), tokens=tokens)
            assert merged.notes == []
            assert merged.config["rope_scaling"] == {"type": "mrope", "mrope_section": [16, 24, 24]}
            assert merged.config["vision_config"]["out_hidden_size"] == vlm["hidden_size"]
            assert merged.config["vision_config"]["out_hidden_size2"] == llm["hidden_size"]


def test_a_vlm_re_saved_by_transformers_gives_the_same():
    """Nested text_config, ids in two places, mrope spelled as default: as transformers 4.52 and 5 write it."""
    text = {"model_type": "qwen2_5_vl_text", "image_token_id": None, "vision_start_token_id": 329}
    text["vision_end_token_id"] = 330
    for key in ("rope_scaling", "rope_parameters"):
        nested = vlm_with(text_config={**text, key: {"rope_type": "default", "mrope_section": [4, 6, 6]}})
        nested["vision_config"]["model_type"] = "qwen2_5_vl"
        nested = without(nested, "rope_scaling", "vision_start_token_id", "vision_end_token_id", "hidden_size")
        assert merge(nested).config == merge().config


def test_an_llm_re_saved_by_transformers_5_gives_the_same():
    llm = without(LLM_CONFIG, "rope_scaling", "rope_theta", "torch_dtype")
    llm |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "dtype": "bfloat16"}
    assert merge(llm=llm).config == merge().config


def test_missing_fields_are_filled_and_reported():
    vlm = vlm_with(vision_config={"hidden_act": "silu", "num_heads": 2, "window_size": 112, "tokens_per_second": 2})
    merged = merge(vlm, without(LLM_CONFIG, "attention_bias"), tower())
    assert merged.config["attention_bias"] is False
    vision = merged.config["vision_config"]
    sizes = {name: vision[name] for name in VISION_FROM_SHAPES}
    assert sizes == {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 96,
    }
    assert vision["fullatt_block_indexes"] == [7, 15, 23, 31]
    notes = "\n".join(merged.notes)
    assert "no attention_bias" in notes
    assert "no out_hidden_size: its tensors say 96" in notes
    assert "no fullatt_block_indexes: took transformers' default" in notes


def problem(**arguments) -> str:
    with pytest.raises(UserError) as caught:
        merge(**arguments)
    return str(caught.value)


def test_sources_of_the_wrong_kind():
    text = problem(vlm=llm_with(), llm=vlm_with())
    assert "the VLM has model_type 'qwen3'; expected 'qwen2_5_vl'" in text
    assert "the LLM has model_type 'qwen2_5_vl'; expected 'qwen3'" in text
    assert "itself a merged checkpoint" in problem(vlm=vlm_with(model_type="qwen2_5_vl_merge"))
    assert "expected 'qwen3', a dense Qwen3" in problem(llm=llm_with(model_type="qwen3_moe"))
    assert "quantised (awq)" in problem(llm=llm_with(quantization_config={"quant_method": "awq"}))


def test_sections_that_do_not_fit_the_heads():
    text = problem(llm=llm_with(head_dim=64))
    assert "[4, 6, 6], which adds up to 16" in text
    assert "head_dim is 64, so its three sections must add up to 32" in text
    assert "--mrope-section" in text
    assert "8,12,12" in text
    sections = merge(llm=llm_with(head_dim=64), mrope_section=(8, 12, 12)).config["rope_scaling"]["mrope_section"]
    assert sections == [8, 12, 12]
    assert "--mrope-section is [1, 2, 3]" in problem(mrope_section=(1, 2, 3))
    assert "no mrope_section" in problem(vlm=without(VLM_CONFIG, "rope_scaling"))


def test_an_llm_with_yarn_is_refused_unless_its_loss_is_wanted():
    yarn = llm_with(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})
    text = problem(llm=yarn)
    assert "'yarn'" in text
    assert "remove it from the LLM's config.json" in text
    assert "--drop-rope-scaling" in text
    merged = merge(llm=yarn, drop_rope_scaling=True)
    assert merged.config["rope_scaling"] == {"type": "mrope", "mrope_section": [4, 6, 6]}
    assert "yarn" in merged.notes[0]


def test_token_ids_that_the_tokenizer_knows_otherwise():
    text = problem(tokens={**TOKEN_IDS, "<|image_pad|>": 7})
    assert f"<|image_pad|> is {TOKEN_IDS['<|image_pad|>']} in the VLM's config.json (image_token_id) and 7" in text
    assert "no <|video_pad|>" in problem(tokens=without(TOKEN_IDS, "<|video_pad|>"))
    assert "only 332 rows" in problem(llm=llm_with(vocab_size=332))
    merged = merge(vlm=without(VLM_CONFIG, "video_token_id"))
    assert merged.config["video_token_id"] == TOKEN_IDS["<|video_pad|>"]
    assert "no video_token_id" in merged.notes[0]


def test_several_problems_are_told_at_once():
    text = problem(
        vlm=vlm_with(vision_config={}), llm=without(LLM_CONFIG, "hidden_size", "num_key_value_heads"), tensors={}
    )
    for part in ("no hidden_size", "no num_key_value_heads", "no depth", "no out_hidden_size"):
        assert part in text
    assert text.count("\n  - ") >= 4
