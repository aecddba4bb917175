"""Activation checkpointing for no more of the LLM's layers than memory asks for (packed samples of this kit's models).

Put here by `qwen-merge overlay apply llamafactory`. LLaMA-Factory checkpoints every layer that trains, at the price of
a forward more, or none. Packs are all equally long, so that one step shows what every step needs: in the second step,
when weights, gradients and optimizer states are where they stay, all layers but the first are checkpointed, and what
the first one keeps is compared with what the others keep. Then as many layers go without as there is room for.

By hand: `disable_gradient_checkpointing: true` for none, or QWEN_MERGE_CHECKPOINT_LAYERS=N in the environment.
"""

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from ...extras import logging


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.get_logger(__name__)

BY_HAND = "QWEN_MERGE_CHECKPOINT_LAYERS"
KEPT_FREE = 0.08  # of a GPU's memory: packs with more patches than the measured ones, and holes between tensors


def checkpoint_layers(model: "PreTrainedModel", is_packed: bool) -> Optional["TrainerCallback"]:
    r"""Set which layers are checkpointed. A callback that will do it, when it has to be measured.

    Raises:
        ValueError: QWEN_MERGE_CHECKPOINT_LAYERS is no number of layers.
    """
    layers = model.model.language_model.layers
    wanted = os.getenv(BY_HAND)
    if wanted is not None:
        if not wanted.isdecimal() or int(wanted) > len(layers):
            raise ValueError(f"{BY_HAND} is {wanted!r}; expected a number of layers, 0 to {len(layers)}.")
        set_checkpointed(layers, int(wanted))
        logger.info_rank0(f"Activation checkpointing: {wanted} of {len(layers)} layers, as {BY_HAND} says.")
        return None

    if not (is_packed and model.is_gradient_checkpointing and model.device.type == "cuda"):
        return None
    set_checkpointed(layers, len(layers))
    return MeasuredCheckpointing(layers)


def set_checkpointed(layers: "torch.nn.ModuleList", number: int) -> None:
    r"""Let the last `number` of `layers` be checkpointed, whether they train or not, and no other."""
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index >= len(layers) - number
        # LLaMA-Factory's own leaves out frozen layers; their activations are kept for the projector's gradient.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def plain_layers(spare: float, saved: float, layers: int) -> int:
    r"""How many of `layers` can do without checkpointing, of which one already does.

    spare: bytes that are left. saved: bytes that a layer saves by being checkpointed.
    """
    more = layers if saved <= 0 else int(spare // saved)
    return max(0, min(1 + more, layers))


class Probe:
    r"""Calls a layer and notes the most bytes that a call left behind."""

    def __init__(self, call: Callable) -> None:
        self.call, self.kept = call, 0

    def __call__(self, function: Callable, *args: Any) -> Any:
        before = torch.cuda.memory_allocated()
        output = self.call(function, *args)
        self.kept = max(self.kept, torch.cuda.memory_allocated() - before)
        return output


class MeasuredCheckpointing(TrainerCallback):
    r"""Measures the second step, then chooses. All ranks choose the same: ZeRO-3 gathers weights in a common order."""

    def __init__(self, layers: "torch.nn.ModuleList") -> None:
        self.layers = layers
        self.steps = 0

    def on_step_begin(self, *args, **kwargs) -> None:
        self.steps += 1
        if self.steps == 2:
            torch.cuda.reset_peak_memory_stats()
            self.plain = Probe(lambda function, *inputs: function(*inputs))
            self.checkpointed = Probe(self.layers[-1]._gradient_checkpointing_func)
            self.layers[-1]._gradient_checkpointing_func = self.checkpointed
            self.layers[0]._gradient_checkpointing_func = self.plain

    def on_pre_optimizer_step(self, *args, **kwargs) -> None:
        if self.steps != 2:
            return

        peak = torch.cuda.max_memory_allocated()
        free, total = torch.cuda.mem_get_info()
        foreign = total - free - torch.cuda.memory_reserved()  # CUDA's own, NCCL's, other processes'
        saved = self.plain.kept - self.checkpointed.kept
        number = plain_layers((1 - KEPT_FREE) * total - foreign - peak, saved, len(self.layers))
        if dist.is_initialized():
            smallest = torch.tensor(number, device="cuda")
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
            number = int(smallest)
        set_checkpointed(self.layers, len(self.layers) - number)
        torch.cuda.empty_cache()  # blocks cut for the activations of checkpointed layers
        gib = 2**30
        logger.info_rank0(
            f"Activation checkpointing: {len(self.layers) - number} of {len(self.layers)} layers. With all but one a "
            f"step takes {peak / gib:.1f} of {total / gib:.1f} GiB, and each layer without takes {saved / gib:.2f} "
            f"more. {BY_HAND}=N sets another number."
        )
