"""The tokens that stand for pictures and videos in a prompt: which ones, and as many as there are pictures."""

from collections.abc import Mapping
from functools import wraps

from qwen_merge.overlays.vllm import MODEL_TYPE

PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}


def hook_placeholders() -> None:
    """Let vLLM's chat parser know this model type.

    Symptom: "Unknown image model type: qwen2_5_vl_merge". vLLM 0.9.1 decides by a chain of names inside
    `BaseMultiModalItemTracker._placeholder_str`; 0.12 asks the model class (`get_placeholder_str`).
    """
    from vllm.entrypoints.chat_utils import BaseMultiModalItemTracker

    original = getattr(BaseMultiModalItemTracker, "_placeholder_str", None)
    if original is None or getattr(original, "knows_qwen_merge", False):
        return

    @wraps(original)
    def placeholder_str(self, modality, current_count):
        if self._model_config.hf_config.model_type == MODEL_TYPE and modality in PLACEHOLDERS:
            return PLACEHOLDERS[modality]
        return original(self, modality, current_count)

    placeholder_str.__dict__["knows_qwen_merge"] = True
    BaseMultiModalItemTracker._placeholder_str = placeholder_str


def hook_checks() -> None:
    """Check prompts for this kit's models before they are queued; safe to call again, other models keep vLLM's ways.

    Symptom: a prompt that vLLM 0.9.1 lets through stops its V1 engine for everybody. `LLM`, in process, is not hooked
    there: who calls it writes the prompts. vLLM 0.12 makes an engine's request of every prompt before it calls
    `generate`, so there it is what makes it that is hooked.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    if input_processor := input_processor_class():
        process_inputs = input_processor.process_inputs
        if "checks_prompts" in process_inputs.__dict__:
            return

        @wraps(process_inputs)
        def process_checked_inputs(self, request_id, prompt, *args, **kwargs):
            _check(self.model_config, prompt)
            return process_inputs(self, request_id, prompt, *args, **kwargs)

        process_checked_inputs.__dict__["checks_prompts"] = True
        input_processor.process_inputs = process_checked_inputs
        return

    original = AsyncLLM.generate
    if "checks_prompts" in original.__dict__:
        return

    @wraps(original)
    def generate(self, prompt, *args, **kwargs):
        _check(self.model_config, prompt)
        return original(self, prompt, *args, **kwargs)

    generate.__dict__["checks_prompts"] = True
    AsyncLLM.generate = generate


def input_processor_class():
    """What makes an engine's request of a prompt in vLLM 0.12; None in 0.9.1, whose engine client does."""
    try:
        from vllm.v1.engine.input_processor import InputProcessor
    except ImportError:
        return None
    return InputProcessor


def _check(model_config, prompt) -> None:
    config = model_config.hf_config
    if config.model_type == MODEL_TYPE and isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
        check_tokens(config, prompt)
        if options := prompt.get("mm_processor_kwargs"):
            check_processor_options(options, _largest_picture(model_config))


def check_tokens(config, prompt: Mapping) -> None:
    """Compare a tokens prompt of vLLM, its pictures not yet expanded, with its media.

    A user may write <|image_pad|> into a question, and the words become the token; vLLM finds the places for the
    features of a whole batch by that token. After <|vision_start|> it looks one token further, end or not.

    Raises:
        ValueError: placeholders and media differ in number, or there is no such token; the server answers 400.
    """
    ids, media = prompt["prompt_token_ids"], prompt.get("multi_modal_data") or {}
    for modality, token in (("image", config.image_token_id), ("video", config.video_token_id)):
        items = media.get(modality)
        wanted = 0 if items is None else len(items) if isinstance(items, (list, tuple)) else 1
        if ids.count(token) != wanted:
            raise ValueError(
                f"the prompt has {ids.count(token)} {modality} placeholder(s) for {wanted} {modality}(s). Leave "
                f"<|{modality}_pad|> out of the text: the chat template puts one where each picture or video is."
            )
    if ids and ids[-1] == config.vision_start_token_id:
        raise ValueError("the prompt ends with <|vision_start|>, and no picture follows. Leave it out of the text.")
    if ids and min(ids) < 0:
        raise ValueError(f"the prompt has the token id {min(ids)}; expected 0 or more.")


def check_processor_options(options: Mapping, largest: int) -> None:
    """Refuse pictures scaled beyond what the server has made room for at its start.

    Args:
        options: `mm_processor_kwargs` of a request.
        largest: the processor's own `max_pixels`.

    Raises:
        ValueError: more pixels; vLLM would run out of memory, or wait for ever for a cache that can hold them.
    """
    size = options.get("size") or {}
    for name, value in {**options, **{f"size.{key}": value for key, value in size.items()}}.items():
        counts_pixels = name in ("min_pixels", "max_pixels", "size.shortest_edge", "size.longest_edge")
        if counts_pixels and not (isinstance(value, int) and 0 < value <= largest):
            raise ValueError(f"mm_processor_kwargs: {name} is {value!r}; expected 1 to {largest:,} pixels.")


def _largest_picture(model_config) -> int:
    from vllm.transformers_utils.processor import cached_image_processor_from_config

    processor = cached_image_processor_from_config(model_config)
    return getattr(processor, "max_pixels", None) or processor.size["longest_edge"]
