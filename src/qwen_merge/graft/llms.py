"""What an LLM's checkpoint says of its decoder, and where its tensors lie.

Qwen3, Qwen3-MoE and Qwen2.5 as they are published, and the decoder inside a Qwen3-VL: a Qwen3 whose rotary positions
have a time, a height and a width that take turns (interleaved M-RoPE). Only its place in the file differs.
"""

from collections import Counter
from typing import Any

from qwen_merge.architecture.kinds_qwen_merge_graft import LLMS
from qwen_merge.errors import UserError
from qwen_merge.merger.safetensors_file import StoredTensor
from qwen_merge.merger.sources import Source

# What a source's configuration says of the checkpoint and not of the model.
NOT_CARRIED = {"_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version"}
LEFT_OUT = "the stock architecture has no place for q/k norms"
INSIDE = {"qwen3_vl": "qwen3"}  # `model_type` of a VLM whose decoder can be taken -> the decoder's
SOURCES = (*LLMS, *INSIDE)
_DECODER, _HEAD = "model.language_model.", "lm_head."  # where such a VLM has it
_QWEN3_VL_SECTIONS = [24, 20, 20]
Found = dict[str, tuple[str, str, StoredTensor | None]]  # name on the disk -> (origin, source name, where it lies)


def text_fields(config: dict) -> dict[str, Any]:
    """The decoder's own fields; transformers 5 keeps all of its RoPE in `rope_parameters`."""
    inner = _decoder(config)
    text = {name: value for name, value in inner.items() if name not in (*NOT_CARRIED, "rope_parameters")}
    parameters = dict(inner.get("rope_parameters") or {})
    if "rope_theta" in parameters:
        text["rope_theta"] = parameters.pop("rope_theta")
    if parameters.get("rope_type", "default") != "default":
        text["rope_scaling"] = parameters
    if config["model_type"] in INSIDE:
        # Its sections are the graft's word (`sections`); what is left is about longer texts, as in any Qwen3.
        rope = {k: v for k, v in (text.get("rope_scaling") or {}).items() if not k.startswith("mrope_")}
        text["rope_scaling"] = rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None
        text["model_type"] = INSIDE[config["model_type"]]
        text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return text


def sections(config: dict) -> tuple[list[int] | None, bool]:
    """The M-RoPE sections that the LLM was trained with, and whether they are interleaved. None: a text's LLM."""
    if config["model_type"] not in INSIDE:
        return None, False
    inner = _decoder(config)
    rope = inner.get("rope_scaling") or inner.get("rope_parameters") or {}
    return list(rope.get("mrope_section", _QWEN3_VL_SECTIONS)), True


def _decoder(config: dict) -> dict:
    """The part of a checkpoint's `config.json` that is about the decoder."""
    inner = config.get("text_config") if config["model_type"] in INSIDE else config
    return inner if isinstance(inner, dict) else {}


def of_the_llm(
    source: Source, model_type: str, tied: bool, dropped: Counter[str], left_out: tuple[str, ...] = ()
) -> Found:
    """Its tensors. model_type: of its checkpoint. left_out: how names end for which the result has no place."""
    inside, found = model_type in INSIDE, Found()
    wanted = (_DECODER, _HEAD) if inside else ("",)
    for name, stored in source.read_tensors(lambda name: name.startswith(wanted)).items():
        if not name.startswith(wanted):
            dropped["the VLM's own tower"] += 1
        elif name == "lm_head.weight" and tied:
            dropped["the head is tied to the embeddings"] += 1
        elif name.endswith(left_out or ("\0",)):
            dropped[LEFT_OUT] += 1
        else:
            found[name.replace(_DECODER, "model.", 1) if inside else name] = ("llm", name, stored)
    return found


def class_of(source: Source) -> Any:
    """The Auto class that loads an LLM's own checkpoint.

    Raises:
        UserError: this transformers does not know it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from qwen_merge.architecture.configuration_qwen_merge_graft import check_version

    model_type = source.read_json("config.json").get("model_type")
    if model_type not in INSIDE:
        return AutoModelForCausalLM
    try:
        check_version(model_type)
    except ValueError as error:
        raise UserError(f"the LLM lies in a {model_type}, whose own model is loaded to compare with: {error}") from None
    return AutoModelForImageTextToText
