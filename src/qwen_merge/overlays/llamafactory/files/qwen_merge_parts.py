"""The parts of `qwen2_5_vl_merge` and of grafts in a training: which parameter is whose, LoRA, a learning rate a part.

Put here by `qwen-merge overlay apply llamafactory`; imports nothing from the kit, so that a checkout works on its own.
"""

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, Optional

import torch

from ...extras import logging


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...hparams import FinetuningArguments


logger = logging.get_logger(__name__)

_LLM = {"model.language_model.": "LLM", "lm_head.": "head"}
# By model_type; the first prefix that fits names the part. These are the models' own names on purpose: the check of what
# trains must not trust the table that LLaMA-Factory's freezing uses.
PARTS = {
    "qwen2_5_vl_merge": {"model.visual.merger.": "projector", "model.visual.": "vision", **_LLM},
    "qwen_merge_graft": {"model.visual.": "vision", "model.projector.": "projector", **_LLM},
}


def parts_of(config: Any) -> Optional[dict[str, str]]:
    r"""Prefixes and parts of a model; None for a model that is none of this kit's."""
    return PARTS.get(getattr(config, "model_type", None))


def part_of(parts: dict[str, str], name: str) -> Optional[str]:
    r"""Whose a parameter or module is: vision, projector, LLM, head."""
    name = name.removeprefix("base_model.model.")  # PEFT's
    return next((part for prefix, part in parts.items() if name.startswith(prefix)), None)


def trained_parts(finetuning_args: "FinetuningArguments") -> dict[str, bool]:
    r"""What the recipe says about each part."""
    return {
        "vision": not finetuning_args.freeze_vision_tower,
        "projector": not finetuning_args.freeze_multi_modal_projector,
        "LLM": not finetuning_args.freeze_language_model,
        "head": not finetuning_args.freeze_language_model,
    }


# --- LoRA: the LLM by adapters, tower and projector as a whole or not at all ---


def lora_targets(
    model: "PreTrainedModel", finetuning_args: "FinetuningArguments", wanted: list[str]
) -> Optional[list[str]]:
    r"""The LLM's Linear layers among `wanted`; None for a model that is none of this kit's.

    LLaMA-Factory looks for `wanted` anywhere in a name: `v_proj` would be found in a resampler's `kv_proj`, and a tower
    that trains would get adapters as well.
    """
    parts = parts_of(model.config)
    if parts is None:
        return None
    linear = [
        name
        for name, module in model.named_modules()
        if part_of(parts, f"{name}.") in ("LLM", "head")
        and (isinstance(module, torch.nn.Linear) or "Linear" in type(module).__name__)  # quantized ones
    ]
    found = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in wanted}
    missing = [target for target, names in found.items() if not names]
    if missing and finetuning_args.lora_target != ["all"]:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        stop(f"lora_target names {', '.join(missing)}; the LLM's layers are {', '.join(known)}, or say all.")
    return sorted({name for names in found.values() for name in names})


def whole_modules(model: "PreTrainedModel", finetuning_args: "FinetuningArguments") -> Optional[list[str]]:
    r"""What trains as a whole beside the adapters, and is saved with them: additional_target, and the parts that the
    recipe does not freeze. LLaMA-Factory itself would leave them frozen, whatever freeze_* says.
    """
    given, parts = finetuning_args.additional_target, parts_of(model.config)
    if parts is None:
        return given
    names = list(given or [])
    for part in ("vision", "projector"):
        if trained_parts(finetuning_args)[part]:
            own = _modules_of(model, parts, part)
            names += [name for name in own if not any(f".{name}".endswith(f".{other}") for other in names)]
    if names:
        logger.info_rank0("Trained as a whole beside the adapters: {}.".format(", ".join(names)))
    return names or None


def _modules_of(model: "torch.nn.Module", parts: dict[str, str], part: str, prefix: str = "") -> list[str]:
    r"""The largest modules that hold parameters of this part only. No lists: PEFT does not wrap them."""
    names = []
    for name, module in model.named_children():
        name = prefix + name
        inside = {part_of(parts, f"{name}.{parameter}") for parameter, _ in module.named_parameters()}
        if inside == {part} and not isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            names.append(name)
        elif part in inside:
            names += _modules_of(module, parts, part, f"{name}.")
    return names


# --- A learning rate a part ---


def given_rates(finetuning_args: Optional["FinetuningArguments"]) -> dict[str, float]:
    r"""The learning rates that the recipe has beside `learning_rate`, by part."""
    rates = {part: getattr(finetuning_args, f"{part}_learning_rate", None) for part in ("vision", "projector")}
    return {part: rate for part, rate in rates.items() if rate is not None}


def problems_of_rates(config: Any, finetuning_args: "FinetuningArguments") -> list[str]:
    r"""Why the learning rates cannot be had."""
    rates = given_rates(finetuning_args)
    if not rates:
        return []
    names = ", ".join(f"{part}_learning_rate" for part in rates)
    if parts_of(config) is None:
        return [f"{names}: for {' and '.join(PARTS)}, and this is {getattr(config, 'model_type', None)}. Remove it."]
    freeze = {"vision": "freeze_vision_tower", "projector": "freeze_multi_modal_projector"}
    problems = [
        f"{part}_learning_rate is {rate}, and {freeze[part]}: true. Remove one of them."
        for part, rate in rates.items()
        if not trained_parts(finetuning_args)[part]
    ]
    problems += [f"{part}_learning_rate is {rate}; expected more than 0." for part, rate in rates.items() if rate <= 0]
    own = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "loraplus_lr_ratio")
    problems += [f"{names} and {name}, whose optimizer has groups of its own." for name in own if getattr(finetuning_args, name, None)]
    if finetuning_args.finetuning_type == "freeze":
        problems.append(f"{names}: for finetuning_type full and lora, not for freeze.")
    return problems


def set_learning_rates(
    model: "PreTrainedModel", optimizer: "torch.optim.Optimizer", finetuning_args: "FinetuningArguments"
) -> None:
    r"""Split the optimizer's groups by part, each with its learning rate. Schedules scale each group's own.

    The LLM's groups come first, whose rate is the one that Trainer logs. Nothing is touched without rates.
    """
    rates = given_rates(finetuning_args)
    if not rates:
        return
    parts = parts_of(model.config) or {}
    names = {"head": "LLM"}
    part_by_parameter = {}
    for name, parameter in model.named_parameters():
        part = part_of(parts, name)
        part_by_parameter[parameter] = names.get(part, part)
    groups, counts, seen = [], Counter(), {}
    for part in ("LLM", "projector", "vision"):
        for group in optimizer.param_groups:
            own = [parameter for parameter in group["params"] if part_by_parameter[parameter] == part]
            if own:
                rate = rates.get(part, group["lr"])
                groups.append({**group, "params": own, "lr": rate})
                counts[part] += sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in own)
                seen[part] = rate
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
    for part, rate in seen.items():
        logger.info_rank0(f"Learning rate of {part}: {rate:g} for {counts[part]:,} parameters")


def stop(message: str) -> None:
    logger.error(message)
    sys.exit(2)
