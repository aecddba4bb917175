"""Qwen2_5_VL_Merge for vLLM 0.9.1 and 0.12: its Qwen2.5-VL with its Qwen3 as the LLM, and the projector's new layer.

What is not here is inherited: picture and video inputs, windows, M-RoPE positions (found by `mrope_section`, not by the
model type), prefix cache, chunked prefill, LoRA, pipeline stages, both spellings of tensor names on the disk.
"""

from functools import partial

from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionPatchMerger,
    Qwen2_5_VisionTransformer,
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY


class Qwen2_5_VL_MergePatchMerger(Qwen2_5_VisionPatchMerger):
    """Qwen2.5-VL's patch merger followed by GELU and a Linear to the LLM's width.

    Args:
        d_model2: width of the LLM; the other arguments are the patch merger's.

    The new layer is whole on every tensor-parallel rank: what it reads (the output of a row-parallel layer) is whole
    there as well, and cutting it would cost one more all-reduce for 42 MB at the 4B's size.
    """

    def __init__(self, *, d_model: int, d_model2: int, quant_config=None, prefix: str = "", **kwargs):
        super().__init__(d_model=d_model, quant_config=quant_config, prefix=prefix, **kwargs)
        self.mlp.append(nn.GELU())
        self.mlp.append(
            ReplicatedLinear(d_model, d_model2, bias=True, quant_config=quant_config, prefix=f"{prefix}.mlp.4")
        )

    def forward(self, x: Tensor) -> Tensor:
        """(patches, width of the tower) -> (patches / 4, width of the LLM)."""
        x = self.ln_q(x).view(-1, self.hidden_size)
        for layer in self.mlp:
            x = layer(x)
            if isinstance(x, tuple):  # vLLM's linear layers return their output and a bias not yet added
                x = x[0]
        return x


class Qwen2_5_VL_MergeVisionTransformer(Qwen2_5_VisionTransformer):
    """Qwen2.5-VL's vision tower with the extended projector."""

    def __init__(self, vision_config, norm_eps: float = 1e-6, quant_config=None, prefix: str = "", **kwargs):
        super().__init__(vision_config, norm_eps=norm_eps, quant_config=quant_config, prefix=prefix, **kwargs)
        self.out_hidden_size = vision_config.out_hidden_size2  # what vLLM 0.12 shares pictures among ranks by
        self.merger = Qwen2_5_VL_MergePatchMerger(
            d_model=vision_config.out_hidden_size,
            d_model2=vision_config.out_hidden_size2,
            context_dim=self.hidden_size,
            norm_layer=partial(RMSNorm, eps=norm_eps),
            spatial_merge_size=self.spatial_merge_size,
            quant_config=quant_config,
            prefix=f"{prefix}.merger",
            **{name: kwargs[name] for name in kwargs if name == "use_data_parallel"},
        )


class Qwen2_5_VL_MergeProcessingInfo(Qwen2_5_VLProcessingInfo):
    """Takes the configuration as it is: the installed class, or the one that travels with a checkpoint."""

    def get_hf_config(self):
        return self.ctx.get_hf_config(PretrainedConfig)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLMultiModalProcessor,
    info=Qwen2_5_VL_MergeProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class Qwen2_5_VL_MergeForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """The two exchanged parts put together; everything that runs is Qwen2.5-VL's or Qwen3's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        # Not the parent's __init__: it would build Qwen2 and the short projector first.
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.config = config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        if hasattr(self, "_maybe_ignore_quant_config"):  # vLLM 0.9
            quant_config, options = self._maybe_ignore_quant_config(vllm_config.quant_config), {}
        else:  # vLLM 0.12: what its Qwen2.5-VL sets and hands on
            self.vllm_config, quant_config = vllm_config, self.quant_config
            self.use_data_parallel = self.multimodal_config.mm_encoder_tp_mode == "data"
            self.video_pruning_rate = self.multimodal_config.video_pruning_rate
            self.is_multimodal_pruning_enabled = self.multimodal_config.is_multimodal_pruning_enabled()
            options = {
                "use_data_parallel": self.use_data_parallel,
                "attn_backend_override": self.multimodal_config.mm_encoder_attn_backend,
            }
        self.visual = Qwen2_5_VL_MergeVisionTransformer(
            config.vision_config,
            # The tower's own epsilon. Stock vLLM passes the LLM's, which happens to be the same number.
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "visual"),
            **options,
        )
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "language_model"),
            hf_config=config.text_config,
            architectures=["Qwen3ForCausalLM"],
        )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.never_said = (config.image_token_id, config.video_token_id, config.vision_start_token_id)

    def compute_logits(self, hidden_states: Tensor, *metadata) -> Tensor | None:  # vLLM 0.9 has one more argument
        """(tokens, width) -> (tokens, vocabulary); None on ranks that do not sample.

        A model never says a picture's or a video's placeholder: vLLM finds the places for the features of a whole batch
        by these ids, and one more of them, in anybody's answer, stops the engine for everybody. Nor what opens a
        picture, which must not be a prompt's last token. (So `prompt_logprobs` knows no probability for them.)
        """
        logits = super().compute_logits(hidden_states, *metadata)
        if logits is not None:
            for token in self.never_said:  # one by one: a list would be copied to the GPU, which waits for it
                logits[..., token] = float("-inf")
        return logits
