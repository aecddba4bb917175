"""How many of the LLM's layers keep their activations: the choice, and that it changes nothing but memory."""

from types import SimpleNamespace

import pytest
import torch

from packing import SAMPLES, alone, distance, gradients, packed
from qwen_merge.architecture.modeling_qwen2_5_vl_merge import Qwen2_5_VL_MergeForConditionalGeneration

BY_HAND = "QWEN_MERGE_CHECKPOINT_LAYERS"


@pytest.fixture
def model(tied):
    model = Qwen2_5_VL_MergeForConditionalGeneration.from_pretrained(tied.merged, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():  # stage 1: frozen layers have activations to save, too
        parameter.requires_grad_("merger" in name)
    return model.train()


@pytest.mark.parametrize(
    ("spare", "expected"),
    [(-1, 0), (0, 1), (99, 1), (350, 4), (10_000, 36)],
)
def test_as_many_layers_go_without_as_there_is_room_for(spare, expected):
    from llamafactory.model.model_utils.qwen_merge_memory import plain_layers

    assert plain_layers(spare, 100, 36) == expected


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_number_set_by_hand_is_taken_and_the_gradients_stay(model, number, monkeypatch):
    from llamafactory.model.model_utils.qwen_merge_memory import checkpoint_layers

    row = packed([alone(model, seed, *sample) for seed, sample in enumerate(SAMPLES)])
    expected = gradients(model, model(**row, use_cache=False).loss)
    monkeypatch.setenv(BY_HAND, str(number))
    assert checkpoint_layers(model, is_packed=True) is None
    runs = [0] * len(model.model.language_model.layers)
    for index, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    assert distance(gradients(model, model(**row, use_cache=False).loss), expected) < 1e-6
    assert runs == [1] * (len(runs) - number) + [2] * number


@pytest.mark.parametrize("value", ["", "-1", "half", "3"])
def test_no_number_of_layers_is_refused(model, value, monkeypatch):
    from llamafactory.model.model_utils.qwen_merge_memory import checkpoint_layers

    monkeypatch.setenv(BY_HAND, value)
    with pytest.raises(ValueError, match=f"{BY_HAND} is '{value}'; expected a number of layers, 0 to 2"):
        checkpoint_layers(model, is_packed=True)


def test_nothing_is_chosen_without_packs_or_without_a_gpu(model):
    from llamafactory.model.model_utils.qwen_merge_memory import checkpoint_layers

    model.gradient_checkpointing_enable()
    before = [layer._gradient_checkpointing_func for layer in model.model.language_model.layers]
    assert checkpoint_layers(model, is_packed=False) is None
    assert checkpoint_layers(model, is_packed=True) is None or torch.cuda.is_available()
    assert [layer._gradient_checkpointing_func for layer in model.model.language_model.layers] == before


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packed_samples", [True, False])
def test_attention_that_takes_no_offsets_is_refused_before_the_first_step(tied, caplog, attention, packed_samples):
    from llamafactory.model.model_utils.qwen_merge import prepare_training

    model = Qwen2_5_VL_MergeForConditionalGeneration.from_pretrained(tied.merged, attn_implementation=attention)
    arguments = (model, SimpleNamespace(torch_compile=False), [], SimpleNamespace(is_packed=packed_samples))
    if attention == "eager" and packed_samples:
        with caplog.at_level("ERROR"), pytest.raises(SystemExit) as stop:
            prepare_training(*arguments)
        assert stop.value.code == 2
        assert "Packed samples would see each other in eager attention" in caplog.text
    else:  # the controls
        prepare_training(*arguments)
        assert model.loss_without_logits


@pytest.mark.parametrize("with_liger", [True, False])
def test_layers_with_ligers_kernels_are_not_compiled(model, with_liger, caplog):
    from liger_kernel.transformers import LigerRMSNorm
    from llamafactory.model.model_utils.qwen_merge import prepare_training

    if with_liger:
        model.model.language_model.norm = LigerRMSNorm(64)
    wanted = {"torch_compile": True, "torch_compile_backend": "aot_eager", "torch_compile_mode": None}
    arguments = SimpleNamespace(**wanted)
    with caplog.at_level("WARNING"):
        prepare_training(model, arguments, [])
    assert arguments.torch_compile is False  # Trainer must not compile the model as a whole
    compiled = [layer._compiled_call_impl is not None for layer in model.model.language_model.layers]
    assert compiled == [not with_liger] * len(compiled)
    assert ("PyTorch cannot compile Liger's kernels" in caplog.text) == with_liger
