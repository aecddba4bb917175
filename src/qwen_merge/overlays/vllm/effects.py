"""What `qwen-merge overlay verify vllm` asks vLLM for. `qwen_merge.overlays.effects` runs it, in its own process."""

from collections.abc import Callable
from types import SimpleNamespace


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def the_plug_in_is_found_and_loads_twice() -> None:
    from importlib.metadata import entry_points

    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    from qwen_merge.overlays.vllm import MODEL_CLASSES, register

    found = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "qwen_merge"]
    _require(
        found == ["qwen_merge.overlays.vllm:register"], f"entry points of this name: {found}; reinstall qwen-merge"
    )
    load_general_plugins()
    missing = MODEL_CLASSES.keys() - ModelRegistry.models.keys()
    _require(not missing, f"vLLM did not load {missing}; does VLLM_PLUGINS leave out qwen_merge?")
    register()


def the_classes_that_answer_are_this_kits() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    from qwen_merge.overlays.vllm import MODEL_CLASSES

    for architecture, expected in MODEL_CLASSES.items():
        model_class = ModelRegistry.models[architecture].load_model_cls()
        seen = f"{model_class.__module__}:{model_class.__name__}"
        _require(seen == expected, f"the registry answers to {architecture} with {seen}")
        _require(issubclass(model_class, Qwen2_5_VLForConditionalGeneration), f"{seen} is no subclass of Qwen2.5-VL's")
        info = ModelRegistry.models[architecture].inspect_model_cls()  # in a process of its own, as the server does
        _require(info.supports_multimodal and info.supports_pp, f"vLLM takes {seen} for {info}")


def a_graft_s_tokens_are_numbered_by_its_projector() -> None:
    from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from qwen_merge.overlays.vllm import GRAFT

    config = _CONFIG_REGISTRY[GRAFT](projector_config={"kind": "mlp", "merge_size": 1}, image_token_id=5)
    _require("mrope_section" in config.text_config.rope_scaling, "vLLM would find no M-RoPE in a graft")
    if hasattr(MRotaryEmbedding, "get_input_positions_tensor"):  # vLLM 0.9.1
        tokens = [1, config.vision_start_token_id, *[5] * 6, 2]
        positions, delta = MRotaryEmbedding.get_input_positions_tensor(tokens, config, [[1, 2, 3]], [], [])
        expected = [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
        _require((positions.tolist(), delta) == (expected, -3), f"a picture of 2 x 3 patches has {positions.tolist()}")


def pictures_and_videos_have_placeholders() -> None:
    from vllm.entrypoints.chat_utils import BaseMultiModalItemTracker

    from qwen_merge.overlays.vllm import GRAFT, MODEL_TYPE

    tracker = SimpleNamespace(_model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=MODEL_TYPE)))
    for modality, token in (("image", "<|image_pad|>"), ("video", "<|video_pad|>")):
        seen = BaseMultiModalItemTracker._placeholder_str(tracker, modality, 1)
        _require(seen == f"<|vision_start|>{token}<|vision_end|>", f"{modality}: {seen}")
    names = SimpleNamespace(convert_ids_to_tokens=lambda ids: [f"<{number}>" for number in ids])
    config = SimpleNamespace(model_type=GRAFT, vision_start_token_id=1, image_token_id=2, vision_end_token_id=3)
    tracker = SimpleNamespace(_model_config=SimpleNamespace(hf_config=config), _tokenizer=names)
    seen = BaseMultiModalItemTracker._placeholder_str(tracker, "image", 1)
    _require(seen == "<1><2><3>", f"of a graft: {seen}")


def requests_have_limits_and_may_have_a_thinking_budget() -> None:
    from vllm.entrypoints.chat_utils import AsyncMultiModalContentParser
    from vllm.entrypoints.openai.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager

    from qwen_merge.overlays.vllm import clients, reasoning

    _require(reasoning.NAME in ReasoningParserManager.reasoning_parsers, "no reasoning parser of this kit's")
    for client in (*clients.of_v1(), *clients.of_v0()):
        for flag in ("knows_thinking_budget", "checks_prompts"):
            _require(flag in client.generate.__dict__, f"vLLM's engine client {client.__name__} is not hooked ({flag})")
    _require("limits_media" in AsyncMultiModalContentParser.__init__.__dict__, "media of requests are not limited")
    for options, expected in (({"thinking_budget": 7}, {"thinking_budget": 7}), ({}, None)):
        request = ChatCompletionRequest(messages=[], model="any", chat_template_kwargs=options)
        seen = request.to_sampling_params(16, None).extra_args
        _require(seen == expected, f"{options} becomes {seen}")


def the_kernels_load() -> None:
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from importlib.util import find_spec

    _require(
        hasattr(torch.ops._C, "rms_norm"), "vllm._C did not load; run python -m qwen_merge.overlays.vllm.libstdcxx"
    )
    _require(find_spec("intel_extension_for_pytorch") is not None, "no CPU kernels for V1; run ./scripts/env.sh")


CHECKS: tuple[Callable[[], None], ...] = (
    the_plug_in_is_found_and_loads_twice,
    the_classes_that_answer_are_this_kits,
    a_graft_s_tokens_are_numbered_by_its_projector,
    pictures_and_videos_have_placeholders,
    requests_have_limits_and_may_have_a_thinking_budget,
    the_kernels_load,
)
