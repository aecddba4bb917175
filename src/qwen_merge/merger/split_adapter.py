"""An adapter with whole parts beside it -> a base with these parts, and an adapter of the LLM alone.

    qwen-merge split-adapter outputs/my-vlm-lora --base my-vlm-base --output outputs/my-vlm-lora-split
    vllm serve outputs/my-vlm-lora-split/base --enable-lora --lora-modules mine=outputs/my-vlm-lora-split/adapter

A training by LoRA saves the projector (and a tower that trained) whole, in PEFT's `modules_to_save`. vLLM refuses such
adapters: its adapters are low-rank matrices of the LLM. Only files are read and written, a shard at a time; the
adapter merged into the base is `llamafactory-cli export`.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_merge.errors import UserError
from qwen_merge.merger.shards import INDEX_NAME, SINGLE_NAME
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
    config, shard_of = _adapter_config(adapter), _shards(base)
    with safe_open(adapter / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    whole = {disk_name(name.removeprefix(_PEFT)): x for name, x in tensors.items() if name not in lora}
    missing = [f"{name}, which {base} has not" for name in whole if name not in shard_of]
    if missing or not lora:
        raise UserError.from_list(
            f"{adapter} was not trained on {base}:", missing or ["it has no low-rank matrices at all"]
        )
    with staged(output) as folder:
        for shard in sorted(set(shard_of.values())):
            inside = [name for name in whole if shard_of[name] == shard]
            target = folder / "base" / shard
            target.parent.mkdir(exist_ok=True)
            if inside:
                with safe_open(base / shard, "pt") as file:
                    content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                for name in inside:
                    if content[name].shape != whole[name].shape:
                        shapes = f"{list(whole[name].shape)}, and {base} has {list(content[name].shape)}"
                        raise UserError(f"{adapter}: {name} is {shapes}. Name the base that it was trained on.")
                    content[name] = whole[name].to(content[name].dtype)
                save_file(content, target, metadata={"format": "pt"})
            else:
                shutil.copyfile(base / shard, target)
        for path in base.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
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
    except (OSError, ValueError) as error:
        raise UserError(f"{adapter} is no adapter: its {CONFIG} cannot be read ({error}).") from None
    if config.get("peft_type") != "LORA" or not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter} has peft_type {config.get('peft_type')!r}; expected LORA, and {WEIGHTS} beside it.")
    return config


def _shards(base: Path) -> dict[str, str]:
    """The file of each of a checkpoint's tensors."""
    from safetensors import safe_open

    if (base / INDEX_NAME).is_file():
        return json.loads((base / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    if not (base / SINGLE_NAME).is_file():
        raise UserError(f"--base {base} holds no {SINGLE_NAME} and no {INDEX_NAME}; expected a checkpoint's folder.")
    with safe_open(base / SINGLE_NAME, "pt") as file:
        return dict.fromkeys(file.keys(), SINGLE_NAME)
