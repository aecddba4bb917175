"""The tokens that stand for pictures and videos in a prompt: which ones, and as many as there are pictures."""

import math
from collections.abc import Mapping, Sequence
from functools import wraps

from qwen_merge.overlays.vllm import GRAFT, MODEL_TYPE, MODEL_TYPES, clients

PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
PROCESSOR_OPTIONS = {  # what a request may set
    MODEL_TYPE: ("min_pixels", "max_pixels", "size", "fps"),
    GRAFT: ("min_pixels", "max_pixels"),
}
EDGES = ("shortest_edge", "longest_edge")
FRAME_RATES = (0.001, 240)  # from a frame in a quarter of an hour to slow motion; see `qwen_merge.video`


def hook_placeholders() -> None:
    """Let vLLM's chat parser know these model types.

    Symptom: "Unknown image model type: qwen2_5_vl_merge". vLLM 0.9.1 decides by a chain of names inside
    `BaseMultiModalItemTracker._placeholder_str`; 0.12 asks the model class (`get_placeholder_str`).
    """
    from vllm.entrypoints.chat_utils import BaseMultiModalItemTracker

    original = getattr(BaseMultiModalItemTracker, "_placeholder_str", None)
    if original is None or getattr(original, "knows_qwen_merge", False):
        return

    @wraps(original)
    def placeholder_str(self, modality, current_count):
        config = self._model_config.hf_config
        if config.model_type == GRAFT:
            check_kind(modality)
            ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
            return "".join(self._tokenizer.convert_ids_to_tokens(ids))
        if config.model_type == MODEL_TYPE and modality in PLACEHOLDERS:
            return PLACEHOLDERS[modality]
        return original(self, modality, current_count)

    placeholder_str.__dict__["knows_qwen_merge"] = True
    BaseMultiModalItemTracker._placeholder_str = placeholder_str


def check_kind(modality: str) -> None:
    """What a graft is shown.

    Raises:
        ValueError: no picture; the server answers 400.
    """
    if modality != "image":
        raise ValueError(f"this model takes pictures and text; the request has {modality} input.")


def hook_checks() -> None:
    """Check prompts for this kit's models before they are queued; safe to call again, other models keep vLLM's ways.

    Symptom: a prompt that vLLM 0.9.1 lets through stops its engine for everybody. `LLM`, in process, is not hooked
    there: who calls it writes the prompts. vLLM 0.12 makes an engine's request of every prompt before it calls
    `generate`, so there it is what makes it that is hooked.
    """
    if (maker := clients.request_maker()) and "checks_prompts" not in maker.process_inputs.__dict__:
        maker.process_inputs = _checking_requests(maker.process_inputs)
    for client in (*clients.of_v1(), *clients.of_v0()):
        if "checks_prompts" not in client.generate.__dict__:
            client.generate = _checking(client.generate)


def _checking_requests(original):
    @wraps(original)
    def process_inputs(self, request_id, prompt, *args, **kwargs):
        _check(self.model_config, prompt)
        return original(self, request_id, prompt, *args, **kwargs)

    process_inputs.__dict__["checks_prompts"] = True
    return process_inputs


def _checking(original):
    @wraps(original)
    def generate(self, prompt, *args, **kwargs):
        _check(clients.model_config_of(self), prompt)
        return original(self, prompt, *args, **kwargs)

    generate.__dict__["checks_prompts"] = True
    return generate


def _check(model_config, prompt) -> None:
    config = model_config.hf_config
    if config.model_type in MODEL_TYPES and isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
        check_tokens(config, prompt)
        if options := prompt.get("mm_processor_kwargs"):
            largest, known = largest_picture(model_config), PROCESSOR_OPTIONS[config.model_type]
            longest = _longest_videos(config) if "fps" in known else math.inf
            check_processor_options(options, largest, _frames(prompt), longest, known)


def check_tokens(config, prompt: Mapping) -> None:
    """Compare a tokens prompt of vLLM, its pictures not yet expanded, with its media.

    A user may write <|image_pad|> into a question, and the words become the token; vLLM finds the places for the
    features of a whole batch by that token. After <|vision_start|> it looks one token further, end or not.

    Raises:
        ValueError: placeholders and media differ in number, or there is no such token; the server answers 400.
    """
    ids, media = prompt["prompt_token_ids"], prompt.get("multi_modal_data") or {}
    for modality, token in (("image", config.image_token_id), ("video", config.video_token_id)):
        wanted = len(_items(media.get(modality)))
        if ids.count(token) != wanted:
            raise ValueError(
                f"the prompt has {ids.count(token)} {modality} placeholder(s) for {wanted} {modality}(s). Leave "
                f"<|{modality}_pad|> out of the text: the chat template puts one where each picture or video is."
            )
    if ids and ids[-1] == config.vision_start_token_id:
        raise ValueError("the prompt ends with <|vision_start|>, and no picture follows. Leave it out of the text.")
    if ids and min(ids) < 0:
        raise ValueError(f"the prompt has the token id {min(ids)}; expected 0 or more.")


def check_processor_options(
    options: Mapping,
    largest: int,
    frames: Sequence[int] = (),
    longest: float = math.inf,
    known: Sequence[str] = PROCESSOR_OPTIONS[MODEL_TYPE],
) -> None:
    """Let `mm_processor_kwargs` say how large pictures are and how fast videos run, and nothing else.

    Every other option of transformers' processor changes how many features a picture has, or is passed on unread: the
    engine then finds more or fewer places for them than it counted, and stops for everybody.

    Args:
        options: `mm_processor_kwargs` of a request.
        largest: the processor's own `max_pixels`; beyond it vLLM would run out of memory, or wait for ever for a cache
            that can hold the features.
        frames: how many each video of the request has.
        longest: how many seconds the videos together may last, so that their times are positions that exist.
        known: names of options.

    Raises:
        ValueError: another option, or a value out of bounds; the server answers 400.
    """
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"mm_processor_kwargs: {', '.join(map(str, unknown))} cannot be set by a request; expected "
            f"{', '.join(known)}."
        )
    sides = {name: options[name] for name in ("min_pixels", "max_pixels") if name in options}
    if "size" in options:
        size = options["size"]
        if not isinstance(size, Mapping) or set(size) != set(EDGES):
            raise ValueError(f"mm_processor_kwargs: size is {size!r}; expected an object with {' and '.join(EDGES)}.")
        sides |= {f"size.{edge}": size[edge] for edge in EDGES}
    for name, value in sides.items():
        if not _is_number(value, int) or not 0 < value <= largest:
            raise ValueError(f"mm_processor_kwargs: {name} is {value!r}; expected 1 to {largest:,} pixels.")
    if "fps" in options:
        _check_frame_rates(options["fps"], frames, longest)


def _check_frame_rates(fps, frames: Sequence[int], longest: float) -> None:
    rates = fps if isinstance(fps, (list, tuple)) else [fps] * max(1, len(frames))
    slowest, fastest = FRAME_RATES
    if not all(_is_number(rate, (int, float)) and slowest <= rate <= fastest for rate in rates):
        raise ValueError(f"mm_processor_kwargs: fps is {fps!r}; expected {slowest} to {fastest} frames a second.")
    if isinstance(fps, (list, tuple)) and len(rates) != len(frames):
        raise ValueError(
            f"mm_processor_kwargs: fps has {len(rates)} value(s) for {len(frames)} video(s); expected one for each, or "
            "one number."
        )
    seconds = sum(count / rate for count, rate in zip(frames, rates, strict=False))
    if seconds > longest:
        raise ValueError(
            f"mm_processor_kwargs: with fps {fps!r} the videos last {seconds:,.0f} seconds; at most {longest:,.0f} are "
            "allowed."
        )


def _is_number(value, kinds) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _frames(prompt: Mapping) -> list[int]:
    """How many frames each video of a tokens prompt has."""
    videos = _items((prompt.get("multi_modal_data") or {}).get("video"))
    return [len(video[0] if isinstance(video, tuple) else video) for video in videos]


def _items(media) -> list:
    """The pictures or videos of a prompt, one or several. For vLLM 0.12 (frames, facts about them) is one video."""
    if media is None:
        return []
    if isinstance(media, tuple) and len(media) == 2 and (media[1] is None or isinstance(media[1], Mapping)):
        return [media]
    return list(media) if isinstance(media, (list, tuple)) else [media]


def _longest_videos(config) -> float:
    """Seconds that have a position of their own: vLLM's table of them is four times as long, text included."""
    return config.get_text_config().max_position_embeddings / config.vision_config.tokens_per_second


def largest_picture(model_config) -> int:
    """The most pixels that the model's image processor leaves of a picture."""
    from vllm.transformers_utils.processor import cached_image_processor_from_config

    processor = cached_image_processor_from_config(model_config)
    return getattr(processor, "max_pixels", None) or processor.size["longest_edge"]
