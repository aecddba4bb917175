"""Liger's kernels for `qwen2_5_vl_merge`, called by LLaMA-Factory's dispatch (`enable_liger_kernel: true`)."""


def apply_liger_kernel_to_qwen2_5_vl_merge(
    rope: bool = True, rms_norm: bool = True, swiglu: bool = True, fused_linear_cross_entropy: bool = True
) -> None:
    r"""Liger's kernels for both towers, before the model is built.

    The text tower is transformers' Qwen3, so Liger's own Qwen3 patch serves it. For the fused loss Liger replaces whole
    forward methods, and the one for Qwen2.5-VL does not fit transformers 4.52: here the head calls it, for the
    positions that carry a label. LLaMA-Factory passes False for trainings that read logits.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerRMSNorm, apply_liger_kernel_to_qwen3
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_5_vl_merge import modeling_qwen2_5_vl_merge

    apply_liger_kernel_to_qwen3(
        rope=rope, rms_norm=rms_norm, swiglu=swiglu, cross_entropy=False, fused_linear_cross_entropy=False
    )
    if rms_norm:
        modeling_qwen2_5_vl.Qwen2RMSNorm = LigerRMSNorm
    if fused_linear_cross_entropy:
        modeling_qwen2_5_vl_merge.Qwen2_5_VL_MergeHead.fused_loss = LigerFusedLinearCrossEntropyLoss()
        modeling_qwen2_5_vl_merge.Qwen2_5_VL_MergeForConditionalGeneration.loss_without_logits = True
