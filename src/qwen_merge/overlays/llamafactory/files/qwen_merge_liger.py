"""Liger's kernels for `qwen2_5_vl_merge`, called by LLaMA-Factory's dispatch (`enable_liger_kernel: true`)."""


def apply_liger_kernel_to_qwen2_5_vl_merge(rope: bool = True, rms_norm: bool = True, swiglu: bool = True) -> None:
    r"""Liger's kernels for both towers, before the model is built.

    The text tower is transformers' Qwen3, so Liger's own Qwen3 patch serves it. The fused loss is left out: Liger
    0.5.10 replaces whole forward methods for it, and the one for Qwen2.5-VL does not fit transformers 4.52.
    """
    from liger_kernel.transformers import LigerRMSNorm, apply_liger_kernel_to_qwen3
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    apply_liger_kernel_to_qwen3(
        rope=rope, rms_norm=rms_norm, swiglu=swiglu, cross_entropy=False, fused_linear_cross_entropy=False
    )
    if rms_norm:
        modeling_qwen2_5_vl.Qwen2RMSNorm = LigerRMSNorm
