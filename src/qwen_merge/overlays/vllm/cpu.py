"""What vLLM 0.9.1 lacks for serving on a CPU. Nothing here runs where vLLM finds a GPU.

Two things, both so that the engine that answers on a CPU is V1, the one that serves on GPUs:

- its CPU attention takes a kernel from intel_extension_for_pytorch for prefix caching and chunked prefill. That package
  changes PyTorch's and accelerate's behaviour in every process that sees it, trainers included, so `scripts/env.sh`
  puts it into a folder of its own that only vLLM's processes look into;
- it refuses float32, because its GPU kernels have none. The CPU's kernels do, and greedy decoding can be compared with
  transformers token by token only in float32.

(And for Qwen3-MoE it takes the experts' CPU kernel in eager mode only: `leave_experts_uncompiled`.)

(The older engine is no way round: its CPU runner mixes up the positions of a batch that holds both pictures and text.)
"""

import copy
import sys
from functools import wraps
from pathlib import Path

KERNELS = Path(sys.prefix, "vllm-cpu-kernels")


def prepare() -> None:
    """Make V1 usable on a CPU; safe to call again, and does nothing on other platforms."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if KERNELS.is_dir() and str(KERNELS) not in sys.path:
        sys.path.append(str(KERNELS))
    _accept_float32()


def _accept_float32() -> None:
    import torch
    from vllm.engine.arg_utils import EngineArgs

    original = getattr(EngineArgs, "_is_v1_supported_oracle", None)  # gone in vLLM 0.12, whose V1 takes float32
    if original is None or getattr(original, "accepts_float32", False):
        return

    @wraps(original)
    def is_v1_supported(self, model_config):
        if model_config.dtype is torch.float32:
            model_config = copy.copy(model_config)
            model_config.dtype = torch.bfloat16  # for the question alone
        return original(self, model_config)

    is_v1_supported.__dict__["accepts_float32"] = True
    EngineArgs._is_v1_supported_oracle = is_v1_supported


def leave_experts_uncompiled(vllm_config) -> None:
    """As with `enforce_eager`, for a model with experts; to be called before it is made.

    Symptom: "'_OpNamespace' '_moe_C' object has no attribute 'topk_softmax'": where vLLM 0.9.1 compiles, it leaves out
    its own operators, and what it has in place of the experts' is CUDA's. The CPU's kernel makes itself ready at its
    first call, which cannot be compiled.
    """
    from vllm.model_executor.layers.fused_moe import layer
    from vllm.platforms import current_platform

    method = layer.UnquantizedFusedMoEMethod
    if current_platform.is_cpu() and getattr(method, "forward_native", None) is method.forward_cuda:
        vllm_config.compilation_config.level = 0
        vllm_config.compilation_config.custom_ops = ["all"]
