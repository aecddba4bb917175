"""Checks a run on `qwen2_5_vl_merge` or on a graft before its first step: what trains, and what cannot work.

Put here by `qwen-merge overlay apply llamafactory`; imports nothing from the kit, so that a checkout works on its own.
"""

import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist
from transformers.integrations import is_deepspeed_zero3_enabled

from ...extras import logging
from .qwen_merge_liger import use_fused_loss
from .qwen_merge_memory import checkpoint_layers
from .qwen_merge_parts import given_rates, part_of, parts_of, problems_of_rates, stop, trained_parts


if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

    from ...hparams import FinetuningArguments, ModelArguments


logger = logging.get_logger(__name__)

# Process groups that are kept alive until the process ends, see keep_process_groups().
_KEPT: list["dist.ProcessGroup"] = []


def check_launch(config: Any, model_args: "ModelArguments", finetuning_args: "FinetuningArguments") -> None:
    r"""Refuse what cannot work, before a model is loaded, all at once; and settle what the library does by model_type.

    ZeRO-3 over several CPU processes: with DeepSpeed 0.16.9 and gloo it trains on garbage and exits normally, a race
    around GatheredParameters. On GPUs these copies are ordered by a stream.
    """
    problems = problems_of_rates(config, finetuning_args)
    if parts_of(config) is None:
        if problems:
            stop("\n".join(problems))
        return

    keep_process_groups()
    if finetuning_args.finetuning_type == "lora" and finetuning_args.freeze_language_model:
        problems.append("finetuning_type: lora adapts the LLM, and freeze_language_model: true. Use finetuning_type: full.")
    if is_deepspeed_zero3_enabled():
        from deepspeed.accelerator import get_accelerator

        world_size = int(os.getenv("WORLD_SIZE", "1"))
        if get_accelerator().device_name() == "cpu" and world_size > 1:
            problems.append(
                f"DeepSpeed ZeRO-3 with {world_size} CPU processes gives wrong weights without an error. "
                "Use ZeRO-2 (deepspeed=examples/deepspeed/ds_z2_config.json) or a single process; ZeRO-3 is for GPUs."
            )
    if problems:
        stop("\n".join(problems))
    if model_args.moe_aux_loss_coef and config.text_config.model_type == "qwen3_moe":
        config.text_config.output_router_logits = True
        config.text_config.router_aux_loss_coef = model_args.moe_aux_loss_coef


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


def let_all_train(model: "PreTrainedModel") -> None:
    r"""Give a graft's tower its gradients, which its configuration (`freeze_vision`) may have taken: here the recipe
    says what trains, and LLaMA-Factory only ever takes gradients away. Called before it does.
    """
    if parts_of(model.config) is not None:
        for param in model.parameters():
            param.requires_grad_(param.is_floating_point())  # quantized weights take none (LoRA over a quantized LLM)


def check_training(model: "PreTrainedModel", finetuning_args: "FinetuningArguments") -> None:
    r"""Log how many parameters of each part train, and stop the run when that is not what the recipe says.

    Called after the adapter set-up and before the first step. LLaMA-Factory freezes by a table looked up by model
    type and says nothing when there is no entry: then everything trains. Under LoRA the LLM's own weights are frozen
    and its adapters train; tower and projector train as a whole, or not.
    """
    parts = parts_of(model.config)
    if parts is None:
        return

    trained: Counter[str] = Counter()
    total: Counter[str] = Counter()
    unexpected: dict[str, str] = {}
    expected = trained_parts(finetuning_args)
    by_lora = finetuning_args.finetuning_type == "lora"
    asked = [f".{name}" for name in finetuning_args.additional_target or []]
    for name, param in model.named_parameters():
        part = part_of(parts, name)
        if part is None:
            unexpected.setdefault("parameters of no known part", name)
            continue

        numel = getattr(param, "ds_numel", param.numel())  # ZeRO-3 keeps empty shells
        trained[part] += numel if param.requires_grad else 0
        wanted = expected[part]
        if by_lora:
            copied, adapts = ".modules_to_save." in name, ".lora_" in name
            if copied or adapts:
                whole = name.split(".modules_to_save.")[0]
                if adapts and part in ("vision", "projector"):
                    unexpected.setdefault(f"{part} has adapters, which are for the LLM", name)
                elif copied and part in ("LLM", "head") and not whole.endswith(tuple(asked)):
                    unexpected.setdefault(f"{part} trains beside its adapters, and additional_target does not say so", name)
            else:
                total[part] += numel
            if ".original_module." in name or (part in ("LLM", "head") and not copied and not adapts):
                wanted = False
        else:
            total[part] += numel
        if param.requires_grad != wanted:
            verb = "trains" if param.requires_grad else "is frozen"
            unexpected.setdefault(f"{part} {verb}, and the recipe says the opposite", name)

    for part in ("vision", "projector", "LLM", "head"):
        if total[part]:
            logger.info_rank0(f"Trainable parameters of {part}: {trained[part]:,} of {total[part]:,}")
        elif part == "head":
            logger.info_rank0("Trainable parameters of head: tied to the LLM's embeddings, counted there")

    # Layer-wise freezing trains parts of a part: logged above, nothing to compare with.
    if unexpected and finetuning_args.finetuning_type != "freeze":
        details = "".join(f"\n  - {problem} (first: {name})" for problem, name in unexpected.items())
        stop(
            "The trainable parameters are not those of the recipe (freeze_vision_tower: "
            f"{finetuning_args.freeze_vision_tower}, freeze_multi_modal_projector: "
            f"{finetuning_args.freeze_multi_modal_projector}, freeze_language_model: "
            f"{finetuning_args.freeze_language_model}):{details}\n"
            "No step was taken. Run `qwen-merge overlay verify llamafactory`; if that fails, `qwen-merge overlay apply`."
        )


def gather_as_one(model: "PreTrainedModel") -> None:
    r"""Under ZeRO-3: what ranks do not run through alike is gathered as a whole, or they would wait for each other.

    Towers that take whole pictures run once for each size, and experts once for each that a token is sent to.
    LLaMA-Factory knows the experts by the model_type of a text model.
    """
    if parts_of(model.config) is None or not is_deepspeed_zero3_enabled():
        return

    classes = {type(module) for module in model.modules()}
    whole = [cls for cls in classes if getattr(cls, "gathers_as_one", False) or cls.__name__.endswith("SparseMoeBlock")]
    if whole:
        from deepspeed.utils import set_z3_leaf_modules

        for module in set_z3_leaf_modules(model, whole):
            if getattr(type(module), "gathers_as_one", False):
                module.register_forward_pre_hook(_ask_for_gradients)
        logger.info_rank0("ZeRO-3 gathers as a whole: {}.".format(", ".join(cls.__name__ for cls in whole)))


def _ask_for_gradients(module: "torch.nn.Module", args: tuple) -> None:
    r"""DeepSpeed reduces the gradients of what it gathers as one when that of its input is there."""
    if torch.is_grad_enabled():
        args[0].requires_grad_(True)


def prepare_training(
    model: "PreTrainedModel",
    args: "TrainingArguments",
    callbacks: list["TrainerCallback"],
    train_dataset: Any = None,
    finetuning_args: Optional["FinetuningArguments"] = None,
    **kwargs,
) -> None:
    r"""What this architecture can do in a fine-tuning run, settled before Trainer reads its arguments, which these are.

    The loss is taken without logits of all positions: SFT reads no others. Of packed samples as many layers keep their
    activations as fit into the memory (`qwen_merge_memory`). `torch_compile: true` compiles layer by layer: two graphs
    for the vision tower, one for the LLM's layers. Trainer's own way compiles the model as a whole, which breaks at
    every picture and begins anew for every length. Called when it is settled what trains.
    """
    if parts_of(model.config) is None:
        return

    own = [name for name in ("optimizer", "scheduler") if name in deepspeed_config(args)]
    if own and given_rates(finetuning_args):
        stop(
            f"The DeepSpeed configuration has its own {' and '.join(own)}, which knows one learning rate; the recipe has "
            f"one more for {' and '.join(given_rates(finetuning_args))}. Take them out, as in examples/deepspeed/."
        )

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    by_fsdp = getattr(args, "fsdp", None) or os.getenv("ACCELERATE_USE_FSDP") == "true"  # the latter: accelerate launch
    if by_fsdp and any(getattr(module, "gathers_as_one", False) for module in base.modules()):
        stop(
            "FSDP gathers weights call by call, and this graft's tower is called once for each size of pictures: ranks "
            "whose pictures have unlike sizes would wait for each other for ever. Leave fsdp out and take DeepSpeed "
            "(deepspeed: examples/deepspeed/ds_z2_config.json, or ds_z3_config.json)."
        )
    attention = base.model.language_model.config._attn_implementation
    if getattr(train_dataset, "is_packed", False) and attention not in ("sdpa", "flash_attention_2"):
        stop(
            f"Packed samples would see each other in {attention} attention, which takes no offsets. "
            "Set flash_attn: sdpa, or fa2 where flash-attn is installed."
        )
    base.loss_without_logits = True
    use_fused_loss(base)
    try:
        callback = checkpoint_layers(base, getattr(train_dataset, "is_packed", False))
    except ValueError as error:
        stop(str(error))
    if callback is not None:
        callbacks.append(callback)
    if args.torch_compile:
        _compile_layers(base, args)


def deepspeed_config(args: "TrainingArguments") -> dict[str, Any]:
    found = getattr(args, "hf_deepspeed_config", None)
    return found.config if found is not None else {}


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
