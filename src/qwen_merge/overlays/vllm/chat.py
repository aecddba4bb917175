"""The tokens that stand for pictures and videos in a prompt: which ones, and as many as there are pictures."""

from collections.abc import Mapping
from functools import wraps

from qwen_merge.overlays.vllm import MODEL_TYPE

PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "image_embeds": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}


def hook_placeholders() -> None:
    """Let vLLM's chat parser know this model type.

    Symptom: "Unknown image model type: qwen2_5_vl_merge". vLLM 0.9.1 decides by a chain of names inside
    `BaseMultiModalItemTracker._placeholder_str`; later versions ask the model class (`get_placeholder_str`), and then
    this can go.
    """
    from vllm.entrypoints.chat_utils import BaseMultiModalItemTracker

    original = BaseMultiModalItemTracker._placeholder_str
    if getattr(original, "knows_qwen_merge", False):
        return

    @wraps(original)
    def placeholder_str(self, modality, current_count):
        if self._model_config.hf_config.model_type == MODEL_TYPE and modality in PLACEHOLDERS:
            return PLACEHOLDERS[modality]
        return original(self, modality, current_count)

    placeholder_str.__dict__["knows_qwen_merge"] = True
    BaseMultiModalItemTracker._placeholder_str = placeholder_str


def hook_counting() -> None:
    """Refuse a prompt that holds more placeholders than pictures; safe to call again.

    Symptom: a user writes <|image_pad|> into a question, the words become the token, and vLLM's V1 engine, which finds
    the places for the features of a whole batch by that token, stops for everybody.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.generate
    if "counts_placeholders" in original.__dict__:
        return

    @wraps(original)
    def generate(self, prompt, *args, **kwargs):
        config = self.model_config.hf_config
        if config.model_type == MODEL_TYPE and isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            check_placeholders(config, prompt)
        return original(self, prompt, *args, **kwargs)

    generate.__dict__["counts_placeholders"] = True
    AsyncLLM.generate = generate


def check_placeholders(config, prompt: Mapping) -> None:
    """Compare a tokens prompt of vLLM, its pictures not yet expanded, with its media.

    Raises:
        ValueError: placeholders and media differ in number; the server answers 400.
    """
    media = prompt.get("multi_modal_data") or {}
    for modality, token in (("image", config.image_token_id), ("video", config.video_token_id)):
        items = media.get(modality) or []
        wanted = len(items) if isinstance(items, (list, tuple)) else 1
        seen = prompt["prompt_token_ids"].count(token)
        if seen != wanted:
            raise ValueError(
                f"the prompt has {seen} {modality} placeholder(s) for {wanted} {modality}(s). Leave <|{modality}_pad|> "
                "out of the text: the chat template puts one where each picture or video is."
            )
