"""Several samples in one row: the loss and every gradient are those of the samples alone."""

import copy
import functools
import sys
from functools import cached_property
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import modeling_flash_attention_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packing import SAMPLES, alone, apart, distance, gradients, known, packed, trajectory
from qwen_merge.architecture import modeling_qwen2_5_vl_merge as merge
from qwen_merge.architecture import vision_qwen2_5_vl_merge as vision
from qwen_merge.architecture.modeling_qwen2_5_vl_merge import Qwen2_5_VL_MergeForConditionalGeneration


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request):
    source = request.getfixturevalue(request.param)
    return Qwen2_5_VL_MergeForConditionalGeneration.from_pretrained(
        source.merged, torch_dtype="float32", attn_implementation="sdpa"
    )


@pytest.fixture(scope="module")
def expected(model):
    """Loss and gradients of the samples one by one, each weighing as much as it has labels."""
    model.train()
    samples = [alone(model, seed, *sample) for seed, sample in enumerate(SAMPLES)]
    counts = [int((sample["labels"][0, 1:] != -100).sum()) for sample in samples]
    pairs = zip(samples, counts, strict=True)
    loss = sum(model(**sample).loss * count for sample, count in pairs if count) / sum(counts)
    return samples, float(loss), gradients(model, loss)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("without_logits", [False, True])
def test_a_row_of_samples_trains_as_they_do_alone(model, expected, without_logits, checkpointing, monkeypatch):
    samples, loss, grads = expected
    if checkpointing:
        monkeypatch.setattr(model.lm_head, "positions_at_once", 7)  # of 34
    model.loss_without_logits = without_logits
    try:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = model(**packed(samples), use_cache=False)
        assert (output.logits is None) == without_logits
        assert abs(float(output.loss) - loss) < 1e-5
        assert distance(gradients(model, output.loss), grads) < 1e-5
    finally:
        model.loss_without_logits = False
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize("missing", ["offsets", "positions"])
def test_without_the_offsets_or_the_positions_it_trains_otherwise(model, expected, missing):
    """The controls: samples that see the ones before them, or pictures without rows and columns."""
    samples, _, grads = expected
    row = packed(samples)
    if missing == "offsets":
        row = {name: value for name, value in row.items() if not name.startswith(("cu_seq", "max_length"))}
    else:
        row["position_ids"] = torch.arange(row["input_ids"].shape[1]).expand(3, 1, -1)
    assert distance(gradients(model, model(**row).loss), grads) > 1e-3


def test_no_row_changes_another_rows_samples(model, expected):
    samples, _, _ = expected
    model.eval()
    with torch.no_grad():
        whole = model(**packed(samples), use_cache=False).logits[0]
        start = 0
        for sample in samples:
            length = sample["input_ids"].shape[1]
            torch.testing.assert_close(whole[start : start + length], model(**sample).logits[0], atol=1e-5, rtol=1e-4)
            start += length
    model.train()


def test_compiled_layers_give_the_same(model, expected):
    samples, loss, grads = expected
    compiled = copy.deepcopy(model)
    compiled.compile_blocks(backend="aot_eager", dynamic=True)
    output = compiled(**packed(samples), use_cache=False)
    assert abs(float(output.loss) - loss) < 1e-5
    assert distance(gradients(compiled, output.loss), grads) < 1e-4


def test_the_number_of_samples_is_no_part_of_a_compiled_layer(model, expected):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled.model.language_model.layers[0].compile(backend=backend, dynamic=True)
    found = []
    for count in (4, 5, 6):
        compiled(**packed(expected[0][:count]), use_cache=False)
        found.append(len(graphs))
    assert 0 < found[0] == found[1] == found[2]


def test_samples_are_counted_once_a_forward_also_where_layers_are_run_again(model, expected, monkeypatch):
    asked = []
    counted = merge.Samples.lengths.func
    lengths = cached_property(lambda self: asked.append(1) or counted(self))
    lengths.__set_name__(merge.Samples, "lengths")
    monkeypatch.setattr(merge.Samples, "lengths", lengths)
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**packed(expected[0]), use_cache=False).loss.backward()
    finally:
        model.gradient_checkpointing_disable()
    assert len(asked) == 1


@pytest.fixture
def flash_attn(monkeypatch):
    """flash-attn's function, computed with PyTorch's; a list of its calls."""
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        causal = options.get("causal", False) or options.get("window_size", (-1, -1)) == (-1, 0)
        calls.append(causal)
        parts = zip(*(x.split(cu_seqlens_q.diff().tolist()) for x in (q, k, v)), strict=True)
        attend = functools.partial(functional.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
        return torch.cat([attend(*(x.transpose(0, 1) for x in part)).transpose(0, 1) for part in parts])

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


def without_offsets(q, k, v, offsets_q, offsets_k, longest_q, longest_k, window_size=(-1, -1)):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    causal = window_size == (-1, 0)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize("control", [False, True])
def test_flash_attn_takes_the_place_of_pytorchs_varlen_kernel(model, expected, flash_attn, monkeypatch, control):
    samples, loss, grads = expected
    # The overlay's copy of the module registers its own under the same name when something imports it.
    ALL_ATTENTION_FUNCTIONS.register("packed_sdpa", merge.packed_sdpa_attention)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # of a PyTorch that has it
    varlen = without_offsets if control else vision._varlen_attn()
    for module in (merge, vision):
        monkeypatch.setattr(module, "takes_varlen", lambda states: True)
        monkeypatch.setattr(module, "varlen_attn", varlen)
    output = model(**packed(samples), use_cache=False)
    found = distance(gradients(model, output.loss), grads)
    if control:
        assert found > 1e-3
        return
    assert abs(float(output.loss) - loss) < 1e-5
    assert found < 1e-5
    layers = model.config.num_hidden_layers
    assert flash_attn.count(True) == layers  # of the LLM
    assert flash_attn.count(False) == len(model.model.visual.blocks)


def test_without_flash_attn_and_in_an_older_pytorch_there_is_no_varlen_kernel(monkeypatch):
    for name in ("torch.nn.attention.varlen", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    assert vision._varlen_attn() is None


@pytest.mark.parametrize("control", [False, True])
def test_transformers_own_flash_attention_gets_the_offsets(model, expected, flash_attn, monkeypatch, control):
    samples, loss, grads = expected
    function = sys.modules["flash_attn"].flash_attn_varlen_func
    names = {"flash_attn_varlen_func": function, "flash_241": False, "_flash_supports_window_size": False}
    for name, value in names.items():
        monkeypatch.setattr(modeling_flash_attention_utils, name, value, raising=False)
    whole = lambda q, k, v, *_, causal, **__: without_offsets(  # noqa: E731
        *(x[0] for x in (q, k, v)), *[None] * 4, window_size=(-1, 0) if causal else (-1, -1)
    )[None]
    if hasattr(modeling_flash_attention_utils, "lazy_import_flash_attention"):  # transformers 4.57
        options_of = modeling_flash_attention_utils._lazy_define_process_function(function)
        found = (whole, function, None, None), options_of
        monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_: found)
    else:
        monkeypatch.setattr(modeling_flash_attention_utils, "flash_attn_func", whole)
    other = copy.deepcopy(model)
    configs = [
        other.model.language_model.config,
        *(layer.self_attn.config for layer in other.model.language_model.layers),
    ]
    for config in configs:
        config._attn_implementation_internal = "flash_attention_2"
    row = packed(samples)
    if control:
        row = {name: value for name, value in row.items() if not name.startswith(("cu_seq", "max_length"))}
    output = other(**row, use_cache=False)
    found = distance(gradients(other, output.loss), grads)
    if control:
        assert found > 1e-3
        return
    assert abs(float(output.loss) - loss) < 1e-5
    assert found < 1e-5
    assert flash_attn == [True] * model.config.num_hidden_layers


def test_a_mask_beside_the_offsets_is_refused(model, expected):
    row = packed(expected[0])
    with pytest.raises(ValueError, match="packed samples come without an attention_mask"):
        model(**row, attention_mask=torch.ones_like(row["input_ids"]))


def test_attention_that_knows_no_offsets_is_refused(tied, expected):
    eager = Qwen2_5_VL_MergeForConditionalGeneration.from_pretrained(tied.merged, attn_implementation="eager")
    with pytest.raises(ValueError, match="eager attention would see all samples of a row"):
        eager(**packed(expected[0]))


def test_attentions_are_still_given_on_demand(model, expected):
    attentions = model(**expected[0][0], output_attentions=True).attentions
    assert attentions[0].shape[1] == model.config.num_attention_heads


def test_what_is_known_on_the_host_changes_nothing(model, expected):
    samples, loss, grads = expected
    row = packed(samples)
    told = known(model, row)
    model.loss_without_logits = True
    try:
        output = model(**row, **told, use_cache=False)
        assert abs(float(output.loss) - loss) < 1e-5
        assert distance(gradients(model, output.loss), grads) < 1e-5
        for name in told:  # the control: each of them is taken, not found again
            wrong = {**told, name: told[name].flip(0) if torch.is_tensor(told[name]) else told[name][::-1]}
            if name == "labelled":
                wrong[name] = told[name][1:]
            assert abs(float(model(**row, **wrong, use_cache=False).loss) - loss) > 1e-4, name
    finally:
        model.loss_without_logits = False


def test_pictures_and_videos_are_one_call_of_the_tower(model, expected):
    """As transformers' own two calls give it; on ranks with pictures only it is one call, too."""
    row, calls = packed(expected[0]), []
    hook = model.model.visual.register_forward_hook(lambda _, inputs, output: calls.append(len(output)))
    seen = []
    inside = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**row, use_cache=False)
        assert calls == [(len(row["pixel_values"]) + len(row["pixel_values_videos"])) // 4]
        without = {name: value for name, value in row.items() if "video" not in name}
        video = row["input_ids"] == model.config.video_token_id
        model(**{**without, "input_ids": row["input_ids"].masked_fill(video, 5)}, use_cache=False)
        assert len(calls) == 2
        embeddings = model.get_input_embeddings()(row["input_ids"])
        kinds = {"image": model.model.get_image_features, "video": model.model.get_video_features}
        for kind, features_of in kinds.items():
            pixels = row["pixel_values" if kind == "image" else "pixel_values_videos"]
            features = features_of(pixels, row[f"{kind}_grid_thw"])
            features = torch.cat(features) if isinstance(features, tuple) else features  # transformers 4.57
            mask = (row["input_ids"] == getattr(model.config, f"{kind}_token_id"))[..., None].expand_as(embeddings)
            embeddings = embeddings.masked_scatter(mask, features)
        torch.testing.assert_close(seen[0], embeddings, atol=1e-5, rtol=1e-5)
    finally:
        hook.remove()
        inside.remove()


def test_pictures_that_have_no_place_are_refused(model, expected):
    row = packed(expected[0])
    row["input_ids"] = row["input_ids"].clone()
    row["input_ids"][row["input_ids"] == model.config.video_token_id] = model.config.image_token_id
    with pytest.raises(ValueError, match="features and image tokens do not match"):
        model(**row)


@pytest.mark.parametrize("change", ["nothing", "vocabulary", "lora", "saved"])
def test_a_head_that_takes_no_targets_is_not_asked_for_a_loss(untied, expected, change):
    model = Qwen2_5_VL_MergeForConditionalGeneration.from_pretrained(
        untied.merged, torch_dtype="float32", attn_implementation="sdpa"
    )
    base = model
    if change == "vocabulary":
        model.resize_token_embeddings(model.config.vocab_size + 8)
        assert type(model.lm_head) is torch.nn.Linear
    elif change != "nothing":
        target = {"target_modules": ["lm_head", "q_proj"]} if change == "lora" else {"target_modules": ["q_proj"]}
        saved = ["lm_head"] if change == "saved" else None
        model = get_peft_model(model, LoraConfig(r=2, modules_to_save=saved, init_lora_weights=False, **target))
        base = model.get_base_model()
        model.enable_input_require_grads()
    row = packed(expected[0])
    results, shapes = [], []
    for base.loss_without_logits in (False, True):
        model.train()
        model.zero_grad()
        output = model(**row, use_cache=False)
        output.loss.backward()
        shapes.append(output.logits is None)
        results.append((output.loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    # The control: where the head can do it, no logits are made.
    assert shapes == [False, change in ("nothing", "saved")]
    (loss, grads), (short_loss, short_grads) = results
    assert torch.allclose(loss, short_loss, atol=1e-5)
    assert len(grads) == len(short_grads) > 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, short_grads, strict=True))


@pytest.mark.slow
def test_fifty_steps_without_logits_go_the_way_of_those_with_them(tied):
    """In float32 step by step, in bfloat16 no farther from float32 than with logits."""

    def losses(dtype: str, parts: bool, steps: int = 50, **changes) -> torch.Tensor:
        model = Qwen2_5_VL_MergeForConditionalGeneration.from_pretrained(
            tied.merged, torch_dtype=dtype, attn_implementation="sdpa"
        )
        model.loss_without_logits = parts
        model.lm_head.positions_at_once = 7  # of 34
        for name, value in changes.items():
            setattr(model.lm_head, name, value)
        return trajectory(model, steps)

    exact = losses("float32", parts=False)
    assert exact[-5:].mean() < exact[:5].mean() - 0.2  # it learns
    assert apart(losses("float32", parts=True), exact) < 1e-5
    plain, fused = (apart(losses("bfloat16", parts), exact) for parts in (False, True))
    assert fused < 1.3 * plain

    def other_mean(weight, hidden_states, targets):  # the control: a mean of parts' means would weigh 6 like 7
        return torch.nn.functional.cross_entropy(hidden_states @ weight.T, targets) * 34 / 5

    assert apart(losses("float32", parts=True, steps=10, summed_loss=other_mean), exact[:10]) > 1e-3
