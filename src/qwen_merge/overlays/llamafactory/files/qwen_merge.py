"""Checks a run on `qwen2_5_vl_merge` before its first step: what trains, and what cannot work.

Put here by `qwen-merge overlay apply llamafactory`; imports nothing from the kit, so that a checkout works on its own.
"""

import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, Optional

import torch.distributed as dist
from transformers.integrations import is_deepspeed_zero3_enabled

from ...extras import logging
from .qwen_merge_memory import checkpoint_layers


if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

    from ...hparams import FinetuningArguments


logger = logging.get_logger(__name__)

# The first prefix that fits names the group. These are the model's own names on purpose: the check must not trust the
# table that the freezing itself uses.
GROUPS = {
    "model.visual.merger.": "projector",
    "model.visual.": "vision",
    "model.language_model.": "LLM",
    "lm_head.": "head",
}


# Process groups that are kept alive until the process ends, see keep_process_groups().
_KEPT: list["dist.ProcessGroup"] = []


def check_launch() -> None:
    r"""Refuse what cannot work, before anything is loaded: ZeRO-3 over several CPU processes.

    With DeepSpeed 0.16.9 and gloo it trains on garbage and exits normally: a race around GatheredParameters. On GPUs
    these copies are ordered by a stream.
    """
    keep_process_groups()
    if not is_deepspeed_zero3_enabled():
        return

    from deepspeed.accelerator import get_accelerator

    world_size = int(os.getenv("WORLD_SIZE", "1"))
    if get_accelerator().device_name() == "cpu" and world_size > 1:
        _stop(
            f"DeepSpeed ZeRO-3 with {world_size} CPU processes gives wrong weights without an error. "
            "Use ZeRO-2 (deepspeed=examples/deepspeed/ds_z2_config.json) or a single process; ZeRO-3 is for GPUs."
        )


def keep_process_groups() -> None:
    r"""Let gloo's process groups live until the process ends, so that a finished run can end.

    Symptom: several CPU processes train, save, and never exit. torch 2.7.0's ProcessGroupGloo destructor holds the GIL
    and waits for a worker thread, which waits for the GIL to release the tensors of the last collective. Keeping the
    groups puts their end behind the interpreter's, when no collective is left. Remove with a torch whose worker drops
    its work outside the lock.
    """
    destroy = dist.destroy_process_group
    if getattr(destroy, "keeps_groups", False):
        return

    def destroy_process_group(group: Optional["dist.ProcessGroup"] = None) -> None:
        if dist.is_initialized() and dist.get_backend() == "gloo":
            _KEPT.extend(dist.distributed_c10d._world.pg_map)
        destroy(group)

    destroy_process_group.__dict__["keeps_groups"] = True
    dist.destroy_process_group = destroy_process_group


def check_training(model: "PreTrainedModel", finetuning_args: "FinetuningArguments") -> None:
    r"""Log how many parameters of each group train, and stop the run when that is not what the recipe says.

    Called after the adapter set-up and before the first step. LLaMA-Factory freezes by a table looked up by model
    type and says nothing when there is no entry: then everything trains.
    """
    trained: Counter[str] = Counter()
    total: Counter[str] = Counter()
    unexpected: dict[str, str] = {}
    expected = {
        "vision": not finetuning_args.freeze_vision_tower,
        "projector": not finetuning_args.freeze_multi_modal_projector,
        "LLM": not finetuning_args.freeze_language_model,
        "head": not finetuning_args.freeze_language_model,
    }
    for name, param in model.named_parameters():
        name = name.removeprefix("base_model.model.")  # PEFT's
        group = next((group for prefix, group in GROUPS.items() if name.startswith(prefix)), None)
        if group is None:
            unexpected.setdefault("parameters of no known group", name)
            continue

        numel = getattr(param, "ds_numel", param.numel())  # ZeRO-3 keeps empty shells
        total[group] += numel
        trained[group] += numel if param.requires_grad else 0
        if param.requires_grad != expected[group]:
            verb = "trains" if param.requires_grad else "is frozen"
            unexpected.setdefault(f"{group} {verb}, and the recipe says the opposite", name)

    for group in ("vision", "projector", "LLM", "head"):
        if total[group]:
            logger.info_rank0(f"Trainable parameters of {group}: {trained[group]:,} of {total[group]:,}")
        elif group == "head":
            logger.info_rank0("Trainable parameters of head: tied to the LLM's embeddings, counted there")

    # LoRA and layer-wise freezing train parts of a group: logged above, nothing to compare with.
    if unexpected and finetuning_args.finetuning_type == "full":
        details = "".join(f"\n  - {problem} (first: {name})" for problem, name in unexpected.items())
        _stop(
            "The trainable parameters are not those of the recipe (freeze_vision_tower: "
            f"{finetuning_args.freeze_vision_tower}, freeze_multi_modal_projector: "
            f"{finetuning_args.freeze_multi_modal_projector}, freeze_language_model: "
            f"{finetuning_args.freeze_language_model}):{details}\n"
            "No step was taken. Run `qwen-merge overlay verify llamafactory`; if that fails, `qwen-merge overlay apply`."
        )


def prepare_training(
    model: "PreTrainedModel",
    args: "TrainingArguments",
    callbacks: list["TrainerCallback"],
    train_dataset: Any = None,
    **kwargs,
) -> None:
    r"""What this architecture can do in a fine-tuning run, settled before Trainer reads its arguments, which these are.

    The loss is taken without logits of all positions: SFT reads no others. Of packed samples as many layers keep their
    activations as fit into the memory (`qwen_merge_memory`). `torch_compile: true` compiles layer by layer: two graphs
    for the vision tower, one for the LLM's layers. Trainer's own way compiles the model as a whole, which breaks at
    every picture and begins anew for every length. Called when it is settled what trains.
    """
    if getattr(model.config, "model_type", None) != "qwen2_5_vl_merge":
        return

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = base.model.language_model.config._attn_implementation
    if getattr(train_dataset, "is_packed", False) and attention not in ("sdpa", "flash_attention_2"):
        _stop(
            f"Packed samples would see each other in {attention} attention, which takes no offsets. "
            "Set flash_attn: sdpa, or fa2 where flash-attn is installed."
        )
    base.loss_without_logits = True
    try:
        callback = checkpoint_layers(base, getattr(train_dataset, "is_packed", False))
    except ValueError as error:
        _stop(str(error))
    if callback is not None:
        callbacks.append(callback)
    if args.torch_compile:
        _compile_layers(base, args)


def _compile_layers(model: "PreTrainedModel", args: "TrainingArguments") -> None:
    args.torch_compile = False
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]

    if is_deepspeed_zero3_enabled():
        logger.warning_rank0("torch_compile is left out: ZeRO-3 gathers weights by hooks, at which graphs break.")
        return

    if any(type(module).__module__.startswith("liger_kernel") for module in model.modules()):
        logger.warning_rank0(
            "torch_compile is left out: PyTorch cannot compile Liger's kernels (seen with 2.11). Without Liger the "
            "layers are compiled, which was faster (`qwen-merge bench train`)."
        )
        return

    options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode, "dynamic": True}
    model.compile_blocks(**{name: value for name, value in options.items() if value is not None})
    logger.info_rank0("The layers of both towers are compiled; the first step takes a minute or two longer.")


def _stop(message: str) -> None:
    logger.error(message)
    sys.exit(2)
