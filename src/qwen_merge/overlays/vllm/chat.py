"""The text that stands for a picture or a video in a chat message, where the template does not write it itself."""

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
