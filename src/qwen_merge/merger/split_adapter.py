"""An adapter with whole parts beside it -> a base with these parts, and an adapter of the LLM alone.

    qwen-merge split-adapter outputs/my-vlm-lora --base my-vlm-base --output outputs/my-vlm-lora-split
    vllm serve outputs/my-vlm-lora-split/base --enable-lora --lora-modules mine=outputs/my-vlm-lora-split/adapter

A training by LoRA saves the projector (and a tower that trained) whole, in PEFT's `modules_to_save`. vLLM refuses such
adapters: its adapters are low-rank matrices of the LLM. Only files are read and written, a shard at a time; the
adapter merged into the base is `llamafactory-cli export`.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_merge.errors import UserError
from qwen_merge.merger.merge import MANIFEST
from qwen_merge.merger.plan import SHOWN
from qwen_merge.merger.safetensors_file import StoredTensor, read_header
from qwen_merge.merger.sources import Source
from qwen_merge.merger.staging import resolved_output, staged

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT = "base_model.model."


@dataclass(frozen=True)
class Split:
    """What was written: names of the base's exchanged tensors, and how many tensors the adapter has."""

    output: Path
    exchanged: list[str]
    adapter_tensors: int


def split_adapter(adapter: Path, base: Path, output: Path) -> Split:
    """Write `output/base` and `output/adapter`.

    Raises:
        UserError: no adapter of PEFT's, no base with its tensors, or an output that exists.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import disk_name

    output = resolved_output(output)
    config = _adapter_config(adapter)
    read_header(adapter / WEIGHTS)  # refuses one that is cut short
    stored = {name: tensor for name, tensor in Source(base, "--base").read_tensors().items() if tensor is not None}
    with safe_open(adapter / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    whole = {disk_name(name.removeprefix(_PEFT)): x for name, x in tensors.items() if name not in lora}
    problems = _whole_problems(whole, stored, base) + _lora_problems(lora, stored, base)
    if problems or not lora:
        raise UserError.from_list(
            f"{adapter} was not trained on {base}:", problems[:SHOWN] or ["it has no low-rank matrices at all"]
        )
    with staged(output) as folder:
        for shard in sorted({tensor.file for tensor in stored.values()}):
            inside = [name for name in whole if stored[name].file == shard]
            target = folder / "base" / shard
            target.parent.mkdir(exist_ok=True)
            if inside:
                with safe_open(base / shard, "pt") as file:
                    content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                for name in inside:
                    content[name] = whole[name].to(content[name].dtype)
                save_file(content, target, metadata={"format": "pt"})
            else:
                shutil.copyfile(base / shard, target)
        for path in base.iterdir():
            # The manifest is about weights that these no longer are.
            if path.is_file() and path.suffix != ".safetensors" and path.name != MANIFEST:
                shutil.copyfile(path, folder / "base" / path.name)
        (folder / "adapter").mkdir()
        save_file(lora, folder / "adapter" / WEIGHTS, metadata={"format": "pt"})
        targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in lora})
        config |= {"modules_to_save": None, "target_modules": targets, "base_model_name_or_path": str(output / "base")}
        (folder / "adapter" / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Split(output, sorted(whole), len(lora))


def _adapter_config(adapter: Path) -> dict[str, Any]:
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{adapter} is no adapter: its {CONFIG} cannot be read ({error}).") from None
    if kind != "LORA" or not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter} has peft_type {kind!r}; expected LORA, and {WEIGHTS} beside it.")
    return config


def _whole_problems(whole: Mapping[str, Any], stored: Mapping[str, StoredTensor], base: Path) -> list[str]:
    """What cannot stand in the base's place of it."""
    problems = [f"{name}, which {base} has not" for name in whole if name not in stored]
    return problems + [
        f"{name} is {list(tensor.shape)}, and {base} has {list(stored[name].shape)}"
        for name, tensor in whole.items()
        if name in stored and tuple(tensor.shape) != stored[name].shape
    ]


def _lora_problems(lora: Mapping[str, Any], stored: Mapping[str, StoredTensor], base: Path) -> list[str]:
    """Low-rank matrices that are as wide as no matrix of the base: side 0 is what it gives, side 1 what it takes."""
    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import disk_name

    problems = []
    for name, tensor in lora.items():
        module, _, kind = name.partition(".lora_")
        side = {"A.weight": 1, "B.weight": 0}.get(kind)
        own = f"{disk_name(module.removeprefix(_PEFT))}.weight"
        if own == "lm_head.weight" and own not in stored:  # the embedding's
            own = "model.embed_tokens.weight"
        if own not in stored:
            problems.append(f"an adapter of {own}, which {base} has not")
        elif side is not None and tensor.shape[side] != stored[own].shape[side]:
            problems.append(f"{name} is {list(tensor.shape)}, and {own} is {list(stored[own].shape)}")
    return problems
