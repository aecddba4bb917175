"""Qwen2_5_VL_Merge: transformers' Qwen3 decoder behind transformers' Qwen2.5-VL vision tower, two parts exchanged.

Text tower: Qwen3's rotary embedding becomes one that takes (time, height, width) positions and picks the sections into
one cos and one sin per forward, so that every layer, attention back end and kernel written for Qwen3 is used as it is.
Vision tower: the patch merger (the projector) gets GELU and one Linear behind it. All else is inherited.

On the disk the tensors are named `visual.*`, `model.*` and `lm_head.weight`; in memory transformers 4.52 wants
`model.visual.*` and `model.language_model.*`. Both spellings load; a save writes the names of the disk.
"""

import re
from contextvars import ContextVar

import torch
from torch import nn
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPatchMerger,
    Qwen2_5_VLPreTrainedModel,
    Qwen2RMSNorm,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RMSNorm, Qwen3RotaryEmbedding

# One relative import: the two files stay neighbours wherever they are copied to.
from .configuration_qwen2_5_vl_merge import (
    Qwen2_5_VL_MergeConfig,
    Qwen2_5_VL_MergeTextConfig,
    Qwen2_5_VL_MergeVisionConfig,
)

# Positions (3, batch, tokens) on their way from the text model to its rotary embedding. Qwen3's decoder would pass 3-D
# `position_ids` on to every layer, where flash attention looks in them for packed samples. A ContextVar, so that
# forwards in several threads do not take each other's.
_MROPE_POSITIONS: ContextVar[torch.Tensor | None] = ContextVar("mrope_positions", default=None)


class Qwen2_5_VL_MergePatchMerger(Qwen2_5_VLPatchMerger):
    """The projector: Qwen2.5-VL's patch merger (`ln_q`, `mlp.0`, `mlp.2`), then GELU and `mlp.4`.

    (patches, vision width) -> (patches / merge size², LLM width). `mlp.4` is a Linear with bias.
    """

    def __init__(self, config: Qwen2_5_VL_MergeVisionConfig):
        super().__init__(config.out_hidden_size, config.hidden_size, config.spatial_merge_size)
        self.mlp.extend([nn.GELU(), nn.Linear(config.out_hidden_size, config.out_hidden_size2)])


class Qwen2_5_VL_MergeVisionTransformer(Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's vision tower with the longer projector."""

    config_class = Qwen2_5_VL_MergeVisionConfig

    def __init__(self, config: Qwen2_5_VL_MergeVisionConfig, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        self.merger = Qwen2_5_VL_MergePatchMerger(config)


class Qwen2_5_VL_MergeRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's rotary embedding for positions that have a time, a height and a width."""

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each (batch, tokens, head_dim), of (3, batch, tokens) or (batch, tokens) positions."""
        positions_3bt = _MROPE_POSITIONS.get()
        if positions_3bt is None:
            positions_3bt = position_ids
        if positions_3bt.ndim == 2:
            positions_3bt = positions_3bt[None].expand(3, -1, -1)
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float32)
        sections = zip(positions_3bt, inv_freq.split(self.config.rope_scaling["mrope_section"]), strict=True)
        freqs_btf = torch.cat([positions[..., None].float() * frequencies for positions, frequencies in sections], -1)
        angles_btd = torch.cat((freqs_btf, freqs_btf), dim=-1)
        cos, sin = angles_btd.cos() * self.attention_scaling, angles_btd.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class Qwen2_5_VL_MergeTextModel(Qwen3Model):
    """Qwen3's decoder with `position_ids` of (3, batch, tokens); (batch, tokens) and None mean what they mean there."""

    config_class = Qwen2_5_VL_MergeTextConfig

    def __init__(self, config: Qwen2_5_VL_MergeTextConfig):
        super().__init__(config)
        self.rotary_emb = Qwen2_5_VL_MergeRotaryEmbedding(config)

    def forward(self, *args, position_ids: torch.Tensor | None = None, **kwargs):
        if position_ids is None or position_ids.ndim == 2:
            return super().forward(*args, position_ids=position_ids, **kwargs)
        token = _MROPE_POSITIONS.set(position_ids)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _MROPE_POSITIONS.reset(token)


class Qwen2_5_VL_MergePreTrainedModel(Qwen2_5_VLPreTrainedModel):
    config_class = Qwen2_5_VL_MergeConfig
    _no_split_modules = ["Qwen3DecoderLayer", "Qwen2_5_VLVisionBlock"]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (Qwen2RMSNorm, Qwen3RMSNorm)):
            module.weight.data.fill_(1.0)


class Qwen2_5_VL_MergeModel(Qwen2_5_VL_MergePreTrainedModel, Qwen2_5_VLModel):
    """Vision tower and text tower without a head."""

    # Qwen2.5-VL's own mapping misses checkpoints that were re-saved with the names of memory.
    _checkpoint_conversion_mapping = {r"^model\.visual": "visual", r"^model(\.language_model)?": "language_model"}

    def __init__(self, config: Qwen2_5_VL_MergeConfig):
        # Not Qwen2_5_VLModel's own: it would build a whole Qwen2.5 decoder first.
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.visual = Qwen2_5_VL_MergeVisionTransformer._from_config(config.vision_config)
        self.language_model = Qwen2_5_VL_MergeTextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    def forward(self, input_ids=None, *, past_key_values=None, inputs_embeds=None, cache_position=None, **kwargs):
        """Qwen2.5-VL's, which takes every position for 0 when a cache comes without its `cache_position`."""
        if cache_position is None and past_key_values is not None:
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            start = past_key_values.get_seq_length()
            cache_position = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        return super().forward(
            input_ids=input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cache_position=cache_position,
            **kwargs,
        )

    def _fix_state_dict_keys_on_save(self, state_dict: dict) -> dict:
        """The names of the disk for a model without a head, too."""
        return {re.sub(r"^language_model\.", "model.", name): tensor for name, tensor in state_dict.items()}


class Qwen2_5_VL_MergeForConditionalGeneration(Qwen2_5_VL_MergePreTrainedModel, Qwen2_5_VLForConditionalGeneration):
    """The model that is trained and asked; `forward` and `generate` are Qwen2.5-VL's."""

    def __init__(self, config: Qwen2_5_VL_MergeConfig):
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = Qwen2_5_VL_MergeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and warns where it cannot
        # A trainer that resumes calls `load_state_dict` with the names of the disk; without this it would load
        # nothing and go on from the base weights.
        self.register_load_state_dict_pre_hook(_names_of_memory)
        self.post_init()

    def _fix_state_dict_keys_on_save(self, state_dict: dict) -> dict:
        """transformers' hook for the names of a save; its own reverse mapping does nothing in 4.52.3."""
        return {disk_name(name): tensor for name, tensor in state_dict.items()}


def disk_name(name: str) -> str:
    """The name on the disk (`visual.*`, `model.*`) of a tensor named as in memory or as on the disk."""
    return re.sub(r"^model\.(?:(visual)|language_model)\.", lambda m: f"{m[1] or 'model'}.", name)


def memory_name(name: str) -> str:
    """The name in memory (`model.visual.*`, `model.language_model.*`) of a tensor named either way."""
    prefixes = {"visual.": "model.visual.", "model.": "model.language_model."}
    return re.sub(r"^(?:visual|model)\.", lambda m: prefixes[m[0]], disk_name(name))


def _names_of_memory(module, state_dict: dict, prefix: str, *_) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[prefix + memory_name(name[len(prefix) :])] = state_dict.pop(name)


__all__ = ["Qwen2_5_VL_MergeForConditionalGeneration", "Qwen2_5_VL_MergeModel", "Qwen2_5_VL_MergePreTrainedModel"]
