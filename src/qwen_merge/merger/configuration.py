"""Configuration surgery, dict to dict: two `config.json` in, the merged one out. No files, no libraries.

The result has Qwen2.5-VL's published shape: text fields flat at the top level and taken from Qwen3, `vision_config`
nested. Everything that would only show up later, as a model that loads and talks nonsense, is checked here: sections
of M-RoPE that do not fit the heads, token ids that the tokenizer knows otherwise, a RoPE scaling that would get lost.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from qwen_merge.errors import UserError
from qwen_merge.merger.safetensors_file import StoredTensor

MODEL_TYPE = "qwen2_5_vl_merge"
ARCHITECTURE = "Qwen2_5_VL_MergeForConditionalGeneration"
_FOR_GENERATION = f"modeling_{MODEL_TYPE}.{ARCHITECTURE}"
AUTO_MAP = {
    "AutoConfig": f"configuration_{MODEL_TYPE}.Qwen2_5_VL_MergeConfig",
    "AutoModel": f"modeling_{MODEL_TYPE}.Qwen2_5_VL_MergeModel",
    "AutoModelForImageTextToText": _FOR_GENERATION,
    "AutoModelForVision2Seq": _FOR_GENERATION,
    "AutoModelForCausalLM": _FOR_GENERATION,
}

# Token whose id the VLM's configuration holds under this name, and how Qwen's tokenizers spell it.
VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}

# What transformers 4.52.3 takes for a field that is missing; a configuration saved by it leaves out what is default.
# (A test compares both tables with the library.) `None`: no sensible default, must be there.
TEXT_DEFAULTS = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "attention_dropout": 0.0,
}
VISION_DEFAULTS = {
    "hidden_act": "silu",
    "num_heads": 16,
    "tokens_per_second": 4,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "initializer_range": 0.02,
}
# Fields of the vision tower that its tensors settle: read from the shapes where the configuration is silent.
VISION_FROM_SHAPES = (
    "depth", "hidden_size", "intermediate_size", "in_channels", "patch_size", "temporal_patch_size",
    "spatial_merge_size", "out_hidden_size",
)  # fmt: skip

# What a merge computes with must be of these types; all else is carried over as it is.
_IS_A: dict[str, Callable[[object], bool]] = {
    "a whole number above 0": lambda value: type(value) is int and value > 0,
    "a number above 0": lambda value: type(value) in (int, float) and cast(float, value) > 0,
    "true or false": lambda value: type(value) is bool,
}
TEXT_TYPES = {
    **dict.fromkeys((name for name, default in TEXT_DEFAULTS.items() if default is None), "a whole number above 0"),
    "head_dim": "a whole number above 0",
    "rope_theta": "a number above 0",
    "tie_word_embeddings": "true or false",
    "attention_bias": "true or false",
}
VISION_TYPES = dict.fromkeys(VISION_FROM_SHAPES, "a whole number above 0")
_ROPE = ("rope_scaling", "rope_parameters")
_OBJECTS = ("text_config", "quantization_config", *_ROPE, *(f"text_config.{name}" for name in _ROPE))

# Of the LLM's top level these are replaced or mean nothing in the merged file.
_NOT_CARRIED = {
    "architectures", "auto_map", "dtype", "model_type", "rope_parameters", "rope_scaling", "torch_dtype",
    "transformers_version", "_name_or_path", "_attn_implementation", "quantization_config",
}  # fmt: skip


@dataclass(frozen=True)
class RopeOptions:
    """What the user may decide about rotary positions. mrope_section: time, height, width; None: the VLM's."""

    mrope_section: tuple[int, int, int] | None = None
    drop_rope_scaling: bool = False


AS_THE_VLM = RopeOptions()


@dataclass
class Merged:
    """A merged configuration and what the user should know about how it came about."""

    config: dict
    notes: list[str] = field(default_factory=list)


def merged_config(
    vlm: dict,
    llm: dict,
    vision_tensors: Mapping[str, StoredTensor],
    token_ids: Mapping[str, int] | None = None,
    rope: RopeOptions = AS_THE_VLM,
) -> Merged:
    """Join two configurations. `torch_dtype` is left to whoever knows what is written.

    vlm, llm: the sources' `config.json`. vision_tensors: the VLM's vision tensors by their names on the disk.
    token_ids: ids of the LLM's tokenizer by token text; None skips that check (a plan without files).

    Raises:
        UserError: all the problems of both configurations in one message.
    """
    check_kinds(vlm, llm)
    problems: list[str] = []
    notes: list[str] = []
    text = _text_fields(llm, problems, notes)
    vision = _vision_fields(vlm, vision_tensors, problems, notes)
    text["rope_theta"] = _rope_theta(llm, text["rope_theta"])
    _check_types(text, TEXT_TYPES, "the LLM's config.json", problems)
    _check_types(vision, VISION_TYPES, "the VLM's vision_config", problems)
    if not problems:
        vision["out_hidden_size2"] = text["hidden_size"]
        sections = _mrope_section(vlm, llm, text["head_dim"], rope, problems, notes)
        tokens = _token_ids(vlm, token_ids, text["vocab_size"], problems, notes)
    if problems:
        raise UserError.from_list("these two checkpoints cannot be merged:", problems)
    config = {
        "architectures": [ARCHITECTURE],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        **text,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        **tokens,
        "vision_config": vision,
    }
    return Merged(config, notes)


def check_kinds(vlm: dict, llm: dict) -> None:
    """Refuse two checkpoints that are not of the two families, before more of them is read.

    Raises:
        UserError: another kind of model, quantised weights, or a part that is not the JSON object it should be.
    """
    problems: list[str] = []
    _check_kind(vlm, "qwen2_5_vl", "VLM", "a Qwen2.5-VL checkpoint", problems)
    _check_kind(llm, "qwen3", "LLM", "a dense Qwen3 checkpoint", problems)
    if problems:
        raise UserError.from_list("these two checkpoints cannot be merged:", problems)


def _check_kind(config: dict, model_type: str, role: str, wanted: str, problems: list[str]) -> None:
    seen = config.get("model_type")
    if seen == MODEL_TYPE:
        problems.append(f"the {role} is itself a merged checkpoint (model_type {seen}); expected {wanted}")
    elif seen != model_type:
        problems.append(f"the {role} has model_type {seen!r}; expected {model_type!r}, {wanted}")
    text = config.get("text_config")
    parts = {**config, **({f"text_config.{name}": text.get(name) for name in _ROPE} if isinstance(text, dict) else {})}
    wrong = [name for name in _OBJECTS if not isinstance(parts.get(name), dict | None)]
    problems += [f"the {role}'s config.json has {name} {parts[name]!r}; expected a JSON object" for name in wrong]
    if config.get("quantization_config") and not wrong:
        method = config["quantization_config"].get("quant_method", "unknown method")
        problems.append(
            f"the {role} is quantised ({method}); a merge copies plain weights: take the unquantised checkpoint"
        )


def _text_fields(llm: dict, problems: list[str], notes: list[str]) -> dict:
    fields = {name: value for name, value in llm.items() if name not in _NOT_CARRIED}
    for name, default in TEXT_DEFAULTS.items():
        if name in fields:
            continue
        if default is None:
            problems.append(f"the LLM's config.json has no {name}")
        else:
            fields[name] = default
            notes.append(f"the LLM's config.json has no {name}: took transformers' default, {default}")
    return fields


def _check_types(fields: Mapping, types: Mapping[str, str], where: str, problems: list[str]) -> None:
    """Fields that are there and are not what they must be; one that is missing was reported before."""
    for name, kind in types.items():
        if name in fields and not _IS_A[kind](fields[name]):
            problems.append(f"{where} has {name} {fields[name]!r}; expected {kind}")


def _vision_fields(vlm: dict, tensors: Mapping[str, StoredTensor], problems: list[str], notes: list[str]) -> dict:
    if not isinstance(vlm.get("vision_config"), dict):
        problems.append("the VLM's config.json has no vision_config")
        return {}
    fields = {name: value for name, value in vlm["vision_config"].items() if name not in ("model_type", "torch_dtype")}
    if "in_chans" in fields:  # the published spelling; the library's is in_channels
        fields.setdefault("in_channels", fields["in_chans"])
    missing = [name for name in VISION_FROM_SHAPES if name not in fields]
    shapes = vision_shapes(tensors) if missing else {}
    for name in missing:
        if name not in shapes:
            problems.append(f"the VLM's vision_config has no {name}, and its tensors do not tell")
            continue
        fields[name] = shapes[name]
        if name != "in_channels":
            notes.append(f"the VLM's vision_config has no {name}: its tensors say {shapes[name]}")
    for name, default in VISION_DEFAULTS.items():
        if name not in fields:
            fields[name] = default
            if name != "initializer_range":  # not among the published fields, and without effect on a merge
                notes.append(f"the VLM's vision_config has no {name}: took transformers' default, {default}")
    return fields


def vision_shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """What the shapes of a Qwen2.5-VL vision tower say about its configuration; {} when tensors are missing."""
    try:
        blocks = [int(name.split(".")[2]) for name in tensors if name.startswith("visual.blocks.")]
        patch = tensors["visual.patch_embed.proj.weight"].shape
        merger = tensors["visual.merger.mlp.2.weight"].shape
        return {
            "depth": max(blocks) + 1,
            "hidden_size": patch[0],
            "intermediate_size": tensors["visual.blocks.0.mlp.gate_proj.weight"].shape[0],
            "in_channels": patch[1],
            "temporal_patch_size": patch[2],
            "patch_size": patch[3],
            "spatial_merge_size": round((merger[1] / patch[0]) ** 0.5),
            "out_hidden_size": merger[0],
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return {}


def _rope_theta(llm: dict, flat: float) -> float:
    """transformers 5 keeps it in `rope_parameters`."""
    return (llm.get("rope_parameters") or {}).get("rope_theta", llm.get("rope_theta", flat))


def _rope_of(config: dict) -> dict:
    """`rope_scaling` of either form: flat or in `text_config`; `rope_parameters` is transformers 5's name."""
    for part in (config.get("text_config") or {}, config):
        for name in _ROPE:
            if part.get(name):
                return part[name]
    return {}


def _mrope_section(
    vlm: dict, llm: dict, head_dim: int, rope: RopeOptions, problems: list[str], notes: list[str]
) -> list[int]:
    scaling = _rope_of(llm)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        if rope.drop_rope_scaling:
            notes.append(f"the LLM's rope_scaling of type {kind!r} was dropped, as asked: {scaling}")
        else:
            problems.append(
                f"the LLM's config.json has rope_scaling of type {kind!r}, which M-RoPE's would replace: its long "
                "context would be lost. The weights do not depend on it: remove it from the LLM's config.json, or "
                "pass --drop-rope-scaling to do so in the result only"
            )
    sections: Sequence[int] | None = rope.mrope_section or _rope_of(vlm).get("mrope_section")
    origin = "--mrope-section" if rope.mrope_section else "the VLM's rope_scaling.mrope_section"
    if not sections:
        problems.append("the VLM's config.json has no mrope_section; say it with --mrope-section TIME,HEIGHT,WIDTH")
        return []
    if not isinstance(sections, list | tuple) or not all(type(section) is int for section in sections):
        problems.append(f"{origin} is {sections!r}; expected three whole numbers")
        return []
    if len(sections) != 3 or any(section < 0 for section in sections) or 2 * sum(sections) != head_dim:
        time = head_dim // 8
        space = (head_dim // 2 - time) // 2
        problems.append(
            f"{origin} is {list(sections)}, which adds up to {sum(sections)}; the LLM's head_dim is {head_dim}, so its "
            f"three sections must add up to {head_dim // 2}. Say them with --mrope-section TIME,HEIGHT,WIDTH "
            f"(Qwen2.5-VL's proportions would be {head_dim // 2 - 2 * space},{space},{space})"
        )
    return list(sections)


def _token_ids(
    vlm: dict, tokenizer: Mapping[str, int] | None, vocab_size: int, problems: list[str], notes: list[str]
) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, token in VISION_TOKENS.items():
        # Re-saved forms hold some at the top, some in text_config, and null where the class has no use for one.
        number = next((part[name] for part in (vlm, vlm.get("text_config") or {}) if part.get(name) is not None), None)
        if tokenizer is not None:
            known = tokenizer.get(token)
            if known is None:
                problems.append(f"the LLM's tokenizer has no {token}, which stands for pictures and videos in a prompt")
            elif number is None:
                number = known
                notes.append(f"the VLM's config.json has no {name}: took {known}, the LLM's tokenizer's {token}")
            elif known != number and type(number) is int:
                problems.append(
                    f"{token} is {number} in the VLM's config.json ({name}) and {known} in the LLM's tokenizer: these "
                    "two do not speak of the same token. Take a Qwen3 whose tokenizer agrees"
                )
        if number is None:
            if tokenizer is None:
                problems.append(f"the VLM's config.json has no {name}")
            continue
        if type(number) is not int or number < 0:
            problems.append(f"the VLM's config.json has {name} {number!r}; expected a token's number")
        elif number >= vocab_size:
            problems.append(f"{name} is {number}, but the LLM's embeddings have only {vocab_size} rows")
        found[name] = number
    return found
