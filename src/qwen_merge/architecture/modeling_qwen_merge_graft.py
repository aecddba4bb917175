"""A graft: one of several vision towers, a projector, one of Qwen's LLMs. `qwen-merge graft` makes its checkpoints.

What `qwen2_5_vl_merge` can do is inherited: packed rows, a loss without logits, both spellings of the names. Different
are the parts (`visual`, `projector`, `language_model`) and how tokens are numbered (`positions`).

On the disk the tensors are named `visual.*`, `projector.*`, `model.*` and `lm_head.weight`.
"""

from contextvars import ContextVar
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel, Qwen2_5_VLPreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel, load_balancing_loss_func

# Of a checkpoint's own code transformers copies what this file names and looks for what those files name, so all of it
# is named here.
from .configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeConfig  # noqa: F401
from .configuration_qwen_merge_graft import QwenMergeGraftConfig
from .encoder_qwen_merge_graft import Encoder  # noqa: F401
from .kinds_qwen_merge_graft import CODE  # noqa: F401
from .modeling_qwen2_5_vl_merge import (
    PACKED,
    MRopeDecoder,
    Qwen2_5_VL_MergeForConditionalGeneration,
    Qwen2_5_VL_MergeHead,
    Qwen2_5_VL_MergeModel,
    Qwen2_5_VL_MergePreTrainedModel,
    names_of_memory,
)
from .projectors_qwen_merge_graft import projector_of
from .towers_qwen_merge_graft import features_of, tower_of
from .vision_qwen2_5_vl_merge import Qwen2_5_VL_MergeVisionTransformer


class GraftQwen3Model(MRopeDecoder, Qwen3Model):
    pass


# Where a forward leaves what its routers said, if its configuration has `output_router_logits`: the result of
# Qwen2_5_VLModel has no place for it.
_ROUTERS: ContextVar[list | None] = ContextVar("routers", default=None)


class GraftQwen3MoeModel(MRopeDecoder, Qwen3MoeModel):
    """Without packed rows: transformers 4.52's layers do not hand the offsets of the samples on to their attention."""

    def forward(self, *args, **kwargs):
        if PACKED.get():
            raise ValueError("Qwen3-MoE takes no packed samples: in one row they would see each other. Train unpacked.")
        outputs = super().forward(*args, **kwargs)
        routers = _ROUTERS.get()
        if routers is not None:
            routers.extend(logits for logits in outputs.router_logits or () if logits is not None)
        return outputs


class GraftQwen2Model(MRopeDecoder, Qwen2Model):
    pass


DECODERS: dict[str, Any] = {"qwen3": GraftQwen3Model, "qwen3_moe": GraftQwen3MoeModel, "qwen2": GraftQwen2Model}


# DeepStack on its way from the tower to the LLM's first layers: where the pictures' tokens stand in the flattened
# batch, and for each of these layers what is added to what it gives there, (places, LLM width).
_DEEPSTACK: ContextVar[tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None] = ContextVar("deepstack", default=None)


class DeepStackLayer:
    """In front of one of transformers' decoder layers: adds what the tower saw on the way (Qwen3-VL's DeepStack).

    Around `__call__`: behind it transformers 4.57 repeats a checkpointed layer in the backward, where nothing is known
    of the pictures any more.
    """

    number: int

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        states = super().__call__(*args, **kwargs)  # type: ignore[misc]
        stack = _DEEPSTACK.get()
        if stack is None:
            return states
        places, features = stack[0].to(states.device), stack[1][self.number].to(states.device, states.dtype)
        return states.flatten(0, 1).index_add(0, places, features).view_as(states)


def decoder_of(config: QwenMergeGraftConfig) -> torch.nn.Module:
    decoder = DECODERS[config.text_config.model_type]._from_config(config.text_config)
    decoder.prepare(config.mrope_section if config.positions == "mrope" else None, config.mrope_interleaved)
    for number, layer in enumerate(decoder.layers[: config.deepstack]):
        kind = type(layer)  # its name stays: who splits or wraps a model looks for it
        layer.__class__ = type(kind.__name__, (DeepStackLayer, kind), {"number": number})
    return decoder


class QwenMergeGraftPreTrainedModel(Qwen2_5_VL_MergePreTrainedModel):
    config_class = QwenMergeGraftConfig  # type: ignore[assignment]
    _no_split_modules = [
        "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer", "Qwen2DecoderLayer", "Qwen2_5_VL_MergeVisionBlock",
        "Qwen2_5_VLVisionBlock", "Qwen2VLVisionBlock", "Qwen3VLVisionBlock", "CLIPEncoderLayer",
        "SiglipEncoderLayer", "Siglip2EncoderLayer", "Dinov2Layer", "Dinov2WithRegistersLayer",
    ]  # fmt: skip

    @classmethod
    def from_pretrained(cls, *arguments, key_mapping: dict[str, str] | None = None, **options):
        """transformers 4.52 maps the names of a checkpoint for a list of classes only, in which this one is not."""
        mapping = cls._checkpoint_conversion_mapping if key_mapping is None else key_mapping
        return super().from_pretrained(*arguments, key_mapping=mapping, **options)


class QwenMergeGraftModel(QwenMergeGraftPreTrainedModel, Qwen2_5_VL_MergeModel):
    """Tower, projector and decoder without a head."""

    # For these, too: a save of transformers 4.57 takes what stands right for a pattern, and left for a name.
    _checkpoint_conversion_mapping = {
        "^model.visual": "visual",
        "^model.projector": "projector",
        r"^model(\.language_model|)": "language_model",
    }

    def __init__(self, config: QwenMergeGraftConfig):
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.visual = tower_of(config)
        self.projector = projector_of(config)
        self.language_model = decoder_of(config)
        self.rope_deltas = None
        self.post_init()
        if config.freeze_vision:
            self.visual.requires_grad_(False)

    def picture_features(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """(tokens, LLM width); with DeepStack (tokens, (1 + levels) * LLM width), level beside level."""
        of_each = [tuple(grid) for grid in grids.tolist()]
        trained = any(parameter.requires_grad for parameter in self.visual.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            features = features_of(self.visual, patches, of_each, self.config)
        return self.projector(features, of_each)

    def forward(self, *args, **kwargs):
        """As in `qwen2_5_vl_merge`, with DeepStack."""
        token = _DEEPSTACK.set(None)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _DEEPSTACK.reset(token)

    def placed(self, embeddings: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        first, *stack = features.chunk(1 + self.config.deepstack, dim=-1)
        if stack:
            _DEEPSTACK.set((places, tuple(stack)))
        return super().placed(embeddings, places, first)

    def count_features(self, patches: torch.Tensor, grids: torch.Tensor) -> int:
        return sum(self.config.tokens(grid) for grid in grids.tolist())

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches and grids of all pictures -> their tokens, (tokens, LLM width)."""
        features = self.picture_features(pixel_values.type(self.visual.dtype), image_grid_thw)
        return features[:, : self.config.hidden_size]

    def get_video_features(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor) -> torch.Tensor:
        """Of towers that take any size; the others are made for pictures."""
        return self.get_image_features(pixel_values_videos, video_grid_thw)

    def get_rope_index(
        self, input_ids=None, image_grid_thw=None, video_grid_thw=None, second_per_grid_ts=None, attention_mask=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (3, batch, tokens), and what is to be added to a token's number behind the prompt (batch, 1).

        Qwen2.5-VL's own for tokens that lie on a grid under M-RoPE; a text's for the others, three times the same. A
        video's time is counted in seconds behind Qwen2.5-VL's tower, else in patches of frames. For Qwen3-VL's LLM its
        frames stand in the text one by one, like pictures.
        """
        vision = SimpleNamespace(
            spatial_merge_size=self.config.merge_size,
            tokens_per_second=getattr(self.config.vision_config, "tokens_per_second", 1),
        )
        tokens = ("image_token_id", "video_token_id", "vision_start_token_id")
        names = {name: getattr(self.config, name) for name in tokens}
        asked = SimpleNamespace(config=SimpleNamespace(vision_config=vision, **names))
        if not hasattr(self.config.vision_config, "tokens_per_second"):
            second_per_grid_ts = None
        if self.config.mrope_interleaved and video_grid_thw is not None:
            video_grid_thw = video_grid_thw.repeat_interleave(video_grid_thw[:, 0], dim=0).clone()
            video_grid_thw[:, 0], second_per_grid_ts = 1, None
        grids = (image_grid_thw, video_grid_thw, second_per_grid_ts)
        if self.config.positions == "1d" or self.config.projector_config["kind"] == "resampler":
            grids = (None, None, None)
        return Qwen2_5_VLModel.get_rope_index(asked, input_ids, *grids, attention_mask)


class QwenMergeGraftForConditionalGeneration(QwenMergeGraftPreTrainedModel, Qwen2_5_VL_MergeForConditionalGeneration):
    """The model that is trained and asked."""

    _checkpoint_conversion_mapping = {
        "^visual": "model.visual",
        "^projector": "model.projector",
        r"^model(?!\.(language_model|visual|projector))": "model.language_model",
    }

    def __init__(self, config: QwenMergeGraftConfig):
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = QwenMergeGraftModel(config)
        self.lm_head = Qwen2_5_VL_MergeHead(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.register_load_state_dict_pre_hook(names_of_memory)
        self.post_init()

    @wraps(Qwen2_5_VL_MergeForConditionalGeneration.forward)
    def forward(self, *args, labels=None, **kwargs):
        """As in `qwen2_5_vl_merge`; Qwen3-MoE's router loss is in the loss where the text's configuration says so."""
        routers: list[torch.Tensor] = []
        token = _ROUTERS.set(routers)
        try:
            outputs = super().forward(*args, labels=labels, **kwargs)
        finally:
            _ROUTERS.reset(token)
        if routers and labels is not None:
            text = self.model.language_model.config
            counts = (text.num_experts, text.num_experts_per_tok)
            added = load_balancing_loss_func(tuple(routers), *counts, kwargs.get("attention_mask"))
            outputs["loss"] = outputs["loss"] + text.router_aux_loss_coef * added.to(outputs["loss"].device)
        return outputs

    def compile_blocks(self, **options) -> None:
        """As in `qwen2_5_vl_merge`, whose tower is the only one that is made for it."""
        if isinstance(self.model.visual, Qwen2_5_VL_MergeVisionTransformer):
            super().compile_blocks(**options)
            return
        for layer in self.model.language_model.layers:
            layer.compile(**options)


__all__ = ["QwenMergeGraftForConditionalGeneration", "QwenMergeGraftModel", "QwenMergeGraftPreTrainedModel"]
