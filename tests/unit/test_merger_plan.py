"""The plan of a merge, from headers alone: every published pair of sizes, and every way to be wrong."""

import copy
import functools
import math

import pytest

from checkpoints import LLM_CONFIG, VLM_CONFIG
from qwen_merge.bench.real_sizes import QWEN2_5_VL, QWEN3, VISION_TOKEN_IDS, llm_shapes, vlm_shapes
from qwen_merge.errors import UserError
from qwen_merge.merger.key_map import is_vision, layout, parameter_count
from qwen_merge.merger.plan import merge_plan
from qwen_merge.merger.safetensors_file import ITEM_BYTES, StoredTensor
from qwen_merge.merger.shards import split_shards

PARAMETERS = {  # billions, as published
    "0.6B": 0.60, "1.7B": 1.72, "4B": 4.02, "8B": 8.19, "14B": 14.77, "32B": 32.76,
    "VL-3B": 3.75, "VL-7B": 8.29, "VL-32B": 33.45, "VL-72B": 73.41,
}  # fmt: skip


@functools.cache
def real_llm(size):
    return llm_shapes(QWEN3[size])


@functools.cache
def real_vlm(size):
    return vlm_shapes(QWEN2_5_VL[size])


def stored(shapes, dtype="BF16", file="model-00001-of-00002.safetensors"):
    """Headers of a checkpoint without weights: one tensor behind the other."""
    tensors, position = {}, 1000
    for name, shape in shapes.items():
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        tensors[name] = StoredTensor(dtype, shape, file, position, end)
        position = end
    return tensors


@pytest.mark.parametrize("llm", QWEN3)
@pytest.mark.parametrize("vlm", QWEN2_5_VL)
def test_every_published_pair(vlm, llm):
    """Shapes come from transformers' classes, the plan from the key map: two opinions that must agree."""
    vlm_tensors, llm_tensors = stored(real_vlm(vlm)), stored(real_llm(llm))
    plan = merge_plan(QWEN2_5_VL[vlm], vlm_tensors, QWEN3[llm], llm_tensors, token_ids=VISION_TOKEN_IDS)

    vision = {name: shape for name, shape in real_vlm(vlm).items() if name.startswith("visual.")}
    new = {
        "visual.merger.mlp.4.weight": (QWEN3[llm]["hidden_size"], QWEN2_5_VL[vlm]["hidden_size"]),
        "visual.merger.mlp.4.bias": (QWEN3[llm]["hidden_size"],),
    }
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == {**vision, **new, **real_llm(llm)}
    assert {tensor.name for tensor in plan.of("new")} == set(new)
    assert all(tensor.stored in (vlm_tensors | llm_tensors).values() for tensor in plan.tensors if tensor.stored)
    assert plan.dropped == {"vlm": {"the VLM's own text model": len(vlm_tensors) - len(vision)}, "llm": {}}
    assert plan.config["torch_dtype"] == "bfloat16"
    assert ("lm_head.weight" in {t.name for t in plan.tensors}) == (not QWEN3[llm]["tie_word_embeddings"])

    expected = sum(math.prod(s) for s in real_llm(llm).values()) + sum(math.prod(s) for s in vision.values())
    expected += sum(math.prod(shape) for shape in new.values())
    assert parameter_count(plan.config) == expected
    assert plan.nbytes == 2 * expected
    shards = split_shards(plan.tensors, 5_000_000_000)
    assert sum(len(shard.tensors) for shard in shards) == len(plan.tensors)
    assert all(shard.nbytes < 5_001_000_000 for shard in shards)


def test_the_shapes_are_those_of_the_published_models():
    for size, config in QWEN3.items():
        count = sum(math.prod(shape) for shape in llm_shapes(config).values())
        assert count / 1e9 == pytest.approx(PARAMETERS[size], abs=0.006)
    for size in QWEN2_5_VL:
        count = sum(math.prod(shape) for shape in real_vlm(size).values())
        assert count / 1e9 == pytest.approx(PARAMETERS[f"VL-{size}"], abs=0.006)


# The tiny pair, made wrong in one way at a time


@pytest.fixture
def pair():
    """(VLM configuration, its headers, LLM configuration, its headers) of the tiny checkpoints; tied."""
    vlm, llm = copy.deepcopy(VLM_CONFIG), copy.deepcopy(LLM_CONFIG)
    return [vlm, stored(_tiny_vlm()), llm, stored(_tiny_llm())]


@functools.cache
def _tiny_vlm():
    return vlm_shapes(VLM_CONFIG)


@functools.cache
def _tiny_llm():
    return llm_shapes(LLM_CONFIG)


def problem(pair, **options) -> str:
    with pytest.raises(UserError) as caught:
        merge_plan(*pair, **options)
    return str(caught.value)


def replace(tensors, name, **fields):
    tensors[name] = StoredTensor(**{**tensors[name].__dict__, **fields})


def test_both_spellings_give_the_same_plan(pair):
    plan = merge_plan(*pair)
    pair[1] = {
        ("model." if name.startswith("visual.") else "") + name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in pair[1].items()
    }
    respelled = merge_plan(*pair)
    assert [(t.name, t.shape, t.stored) for t in respelled.tensors] == [
        (t.name, t.shape, t.stored) for t in plan.tensors
    ]
    assert respelled.dropped == plan.dropped
    assert respelled.of("vlm")[0].source_name == "model." + respelled.of("vlm")[0].name


def test_one_tensor_under_two_spellings(pair):
    pair[1]["model.visual.merger.ln_q.weight"] = pair[1]["visual.merger.ln_q.weight"]
    text = problem(pair)
    assert "visual.merger.ln_q.weight and model.visual.merger.ln_q.weight are the same tensor" in text


def test_files_of_the_vlm_that_were_not_opened_are_enough_as_names(pair):
    unopened = {name: tensor if is_vision(name) else None for name, tensor in pair[1].items()}
    plan = merge_plan(*pair)
    pair[1] = unopened
    assert merge_plan(*pair) == plan


@pytest.mark.parametrize(("at", "role"), [(1, "VLM"), (3, "LLM")])
@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "dtype"])
def test_a_tensor_that_is_wrong_is_named(pair, at, role, kind):
    name = {1: "visual.blocks.1.attn.qkv.weight", 3: "model.layers.1.self_attn.q_norm.weight"}[at]
    if kind == "missing":
        del pair[at][name]
        expected = f"{role}: missing tensor {name}, expected shape"
    elif kind == "unknown":
        odd = name.replace(".1.", ".2.")
        pair[at][odd] = pair[at][name]
        expected = f"{role}: unknown tensor {odd}"
    elif kind == "shape":
        replace(pair[at], name, shape=(5, 7))
        expected = f"{role}: tensor {name} has shape [5, 7], expected ["
    else:
        replace(pair[at], name, dtype="F8_E4M3")
        expected = f"{role}: tensor {name} has dtype F8_E4M3"
    assert expected in problem(pair)


@pytest.mark.parametrize(("at", "name"), [(1, "audio.proj.weight"), (1, "model.odd"), (3, "score.weight")])
def test_a_tensor_that_no_row_knows(pair, at, name):
    pair[at][name] = StoredTensor("BF16", (1,), "model.safetensors", 0, 2)
    assert f"unknown tensor {name}" in problem(pair)


def test_a_tied_head_that_is_stored_all_the_same_is_dropped_and_recorded(pair):
    """As in the published 0.6B and 1.7B."""
    pair[3]["lm_head.weight"] = pair[3]["model.embed_tokens.weight"]
    plan = merge_plan(*pair)
    assert plan.dropped["llm"] == {"the head is tied to the embeddings": 1}
    assert "lm_head.weight" not in {tensor.name for tensor in plan.tensors}


def test_an_untied_head_must_be_there(pair):
    pair[2]["tie_word_embeddings"] = False
    text = problem(pair)
    assert "missing tensor lm_head.weight" in text
    assert "tie_word_embeddings is false" in text
    pair[3]["lm_head.weight"] = pair[3]["model.embed_tokens.weight"]
    assert "lm_head.weight" in {tensor.name for tensor in merge_plan(*pair).of("llm")}


def test_attention_biases_are_expected_where_the_configuration_has_them(pair):
    pair[2]["attention_bias"] = True
    assert "missing tensor model.layers.0.self_attn.q_proj.bias" in problem(pair)
    pair[3] = stored(llm_shapes(pair[2]))
    names = {name for _, name, _ in layout(merge_plan(*pair).config)}
    assert "model.layers.1.self_attn.o_proj.bias" in names


def test_many_problems_are_told_at_once_and_cut(pair):
    pair[3] = {}
    text = problem(pair)
    assert text.count("missing tensor") == 10
    assert "... and more" in text


def test_dtypes_are_kept_or_converted(pair):
    pair[1] = stored(_tiny_vlm(), "F32")
    plan = merge_plan(*pair)
    assert {tensor.dtype for tensor in plan.of("vlm")} == {"F32"}
    assert {tensor.dtype for tensor in plan.of("new")} == {"F32"}  # the vision tower's
    assert {tensor.dtype for tensor in plan.of("llm")} == {"BF16"}
    assert plan.config["torch_dtype"] == "bfloat16"
    assert "dtypes differ (BF16 and F32)" in plan.notes[-1]
    converted = merge_plan(*pair, dtype="float16")
    assert {tensor.dtype for tensor in converted.tensors} == {"F16"}
    assert converted.config["torch_dtype"] == "float16"
    assert converted.notes == []
