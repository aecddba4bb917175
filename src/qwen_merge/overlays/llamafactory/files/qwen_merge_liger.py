"""Liger's kernels for `qwen2_5_vl_merge` and for grafts, called by LLaMA-Factory's dispatch (`enable_liger_kernel: true`)."""

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Optional


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a graft, whose head may be a class of the checkpoint's own code: kept until the model is there.
_fused_loss: Optional[Callable] = None


def apply_liger_kernel_to_qwen2_5_vl_merge(
    rope: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    fused_linear_cross_entropy: bool = True,
    cross_entropy: bool = False,
) -> None:
    r"""Liger's kernels for both towers, before the model is built.

    The text tower is transformers' Qwen3, so Liger's own Qwen3 patch serves it. For the fused loss Liger replaces whole
    forward methods, and the one for Qwen2.5-VL does not fit transformers 4.52: here the head calls it, for the
    positions that carry a label. LLaMA-Factory passes False for trainings that read logits, and cross_entropy, of which
    nothing follows: their loss is not the model's.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    from transformers.models.qwen2_5_vl_merge import modeling_qwen2_5_vl_merge

    _apply_to_towers("qwen3", rope, rms_norm, swiglu)
    if fused_linear_cross_entropy:
        modeling_qwen2_5_vl_merge.Qwen2_5_VL_MergeHead.fused_loss = LigerFusedLinearCrossEntropyLoss()
        modeling_qwen2_5_vl_merge.Qwen2_5_VL_MergeForConditionalGeneration.loss_without_logits = True


def liger_kernel_for_graft(config: Any) -> Callable[..., None]:
    r"""The same for a graft, by its LLM. Towers other than Qwen2.5-VL's have nothing that Liger replaces."""
    return partial(_apply_to_graft, config.text_config.model_type)


def _apply_to_graft(
    llm: str,
    rope: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    fused_linear_cross_entropy: bool = True,
    cross_entropy: bool = False,
) -> None:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    global _fused_loss
    _apply_to_towers(llm, rope, rms_norm, swiglu)
    _fused_loss = LigerFusedLinearCrossEntropyLoss() if fused_linear_cross_entropy else None


def use_fused_loss(model: "PreTrainedModel") -> None:
    r"""Give a graft's head the fused loss that was asked for; PEFT may have wrapped it."""
    if _fused_loss is not None and model.config.model_type == "qwen_merge_graft":
        for head in model.lm_head.modules():
            if hasattr(type(head), "fused_loss"):
                head.fused_loss = _fused_loss


def _apply_to_towers(llm: str, rope: bool, rms_norm: bool, swiglu: bool) -> None:
    from liger_kernel import transformers as liger
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    getattr(liger, f"apply_liger_kernel_to_{llm}")(
        rope=rope, rms_norm=rms_norm, swiglu=swiglu, cross_entropy=False, fused_linear_cross_entropy=False
    )
    if rms_norm:
        modeling_qwen2_5_vl.Qwen2RMSNorm = liger.LigerRMSNorm
