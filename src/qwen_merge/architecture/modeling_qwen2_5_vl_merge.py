"""Qwen2_5_VL_Merge: transformers' Qwen3 decoder behind transformers' Qwen2.5-VL vision tower, two parts exchanged.

Text tower: Qwen3's rotary embedding becomes one that takes (time, height, width) positions and picks the sections into
one cos and one sin per forward, so that every layer, attention back end and kernel written for Qwen3 is used as it is.
Several samples may lie in one row (packing): attention stays within each, see `packed_sdpa_attention`.
Head: on demand it gives the loss of the labelled positions instead of logits for all.
Vision tower: see `vision_qwen2_5_vl_merge`. All else is inherited.

Written for transformers 4.52, and runs on 4.57 too; what is there for one of them says so.

On the disk the tensors are named `visual.*`, `model.*` and `lm_head.weight`; in memory transformers wants
`model.visual.*` and `model.language_model.*`. Both spellings load; a save writes the names of the disk.
"""

import copy
import re
from contextvars import ContextVar
from functools import cached_property, wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLCausalLMOutputWithPast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2RMSNorm,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Model,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    eager_attention_forward,
)

# Relative imports: the files stay neighbours wherever they are copied to.
from .configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeConfig, Qwen2_5_VL_MergeTextConfig
from .vision_qwen2_5_vl_merge import Qwen2_5_VL_MergeVisionTransformer, takes_varlen, varlen_attn

# Positions (3, batch, tokens) on their way from the text model to its rotary embedding. Qwen3's decoder would pass 3-D
# `position_ids` on to every layer, where flash attention looks in them for packed samples. A ContextVar, so that
# forwards in several threads do not take each other's.
_MROPE_POSITIONS: ContextVar[torch.Tensor | None] = ContextVar("mrope_positions", default=None)

# transformers' names for where the samples of a packed row begin and end (`FlashAttentionKwargs`): offsets in tokens,
# int32 (samples + 1), and the longest. On their way past Qwen2_5_VLModel, whose `forward` takes no further arguments.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PACKED: ContextVar[dict] = ContextVar("packed", default={})  # noqa: B039, never written to

# What a collator can say beside a batch, on the host or as places, so that no forward waits for the device to tell it:
# samples: the lengths of a row's samples. grids: (time, height, width) of all pictures, then of all videos, a list.
# features: where their tokens stand in the flattened batch, in the same order. labelled: which of the flattened
# labels[:, 1:] are labels. Without them they are found in the batch.
KNOWN = ("samples", "grids", "features", "labelled")
_KNOWN: ContextVar[dict] = ContextVar("known", default={})  # noqa: B039, never written to


class Samples:
    """How many tokens each sample of a row has, on the host: no layer but the first that asks waits for the device.

    An object, not a list: the numbers in a list would be part of a compiled layer.
    """

    def __init__(self, offsets: torch.Tensor, lengths: list[int] | None = None):
        self.offsets, self.known = offsets, lengths

    @cached_property
    def lengths(self) -> list[int]:
        return self.known or self.offsets.diff().tolist()


def packed_sdpa_attention(
    module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, samples=None, **kwargs
):
    """transformers' sdpa attention, which also takes a row of several samples: each attends to itself alone.

    query (1, heads, tokens, head_dim), key and value with their own number of heads -> (1, tokens, heads, head_dim).
    No mask over the row is made: a varlen kernel (PyTorch 2.10 or flash-attn; CUDA, 16 bit) takes all samples at once,
    elsewhere each is a call of its own, which on GPUs is the flash kernel.
    """
    if kwargs.pop("output_attentions", False) and cu_seq_lens_q is None:
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if takes_varlen(query):
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        output = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, window_size=(-1, 0))
        return output[None], None
    return _attend_one_by_one(module, query, key, value, samples, **kwargs), None


@torch.compiler.disable  # the number of samples would be part of a compiled layer
def _attend_one_by_one(module, query, key, value, samples: Samples, **kwargs) -> torch.Tensor:
    parts = zip(*(states.split(samples.lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *part, None, is_causal=True, **kwargs)[0] for part in parts]
    return torch.cat(outputs, dim=1)


ALL_ATTENTION_FUNCTIONS.register("packed_sdpa", packed_sdpa_attention)


class Qwen2_5_VL_MergeRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's rotary embedding for positions that have a time, a height and a width.

    mrope_section: their shares of half of `head_dim`; None: the configuration's. interleaved: the frequencies go to
    time, height, width, time, ... as long as each has some left (Qwen3-VL), instead of section after section.
    """

    def __init__(self, config, device=None, mrope_section: list[int] | None = None, interleaved: bool = False):
        super().__init__(config, device)
        self.mrope_section = mrope_section or config.rope_scaling["mrope_section"]
        self.interleaved = interleaved

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
        if self.interleaved:
            time_bt, *sides = positions_3bt
            freqs_btf = time_bt[..., None].float() * inv_freq
            for first, (positions, length) in enumerate(zip(sides, self.mrope_section[1:], strict=True), start=1):
                turns = slice(first, 3 * length, 3)
                freqs_btf[..., turns] = positions[..., None].float() * inv_freq[turns]
        else:
            sections = zip(positions_3bt, inv_freq.split(self.mrope_section), strict=True)
            freqs_btf = torch.cat([positions[..., None].float() * part for positions, part in sections], dim=-1)
        angles_btd = torch.cat((freqs_btf, freqs_btf), dim=-1)
        cos, sin = angles_btd.cos() * self.attention_scaling, angles_btd.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class MRopeDecoder:
    """In front of one of transformers' decoders: `position_ids` of (3, batch, tokens), and packed samples.

    Positions of (batch, tokens) and None mean what they mean there.
    """

    config: Any
    layers: Any

    def prepare(self, mrope_section: list[int] | None, interleaved: bool = False) -> None:
        """To be called when the decoder has been built; without sections its own rotary embedding stays."""
        if mrope_section is not None:
            self.rotary_emb = Qwen2_5_VL_MergeRotaryEmbedding(self.config, None, mrope_section, interleaved)
        if self.config._attn_implementation == "sdpa":  # masks are still made, or left out, as for sdpa
            layer_config = copy.copy(self.config)
            layer_config._attn_implementation_internal = "packed_sdpa"
            for layer in self.layers:
                layer.self_attn.config = layer_config

    def forward(self, *args, position_ids: torch.Tensor | None = None, **kwargs):
        packing = PACKED.get()
        if packing and kwargs.get("attention_mask") is not None:
            raise ValueError("packed samples come without an attention_mask: their offsets say what attends to what")
        if packing and self.config._attn_implementation not in ("sdpa", "flash_attention_2"):
            raise ValueError(
                f"packed samples need sdpa or flash_attention_2; {self.config._attn_implementation} attention would "
                "see all samples of a row"
            )
        kwargs.update(packing)
        if packing and self.config._attn_implementation == "sdpa":
            kwargs["samples"] = Samples(packing["cu_seq_lens_q"], _KNOWN.get().get("samples"))
        if position_ids is not None and position_ids.ndim == 3 and not hasattr(self.rotary_emb, "mrope_section"):
            position_ids = position_ids[0]
        if position_ids is None or position_ids.ndim == 2:
            return super().forward(*args, position_ids=position_ids, **kwargs)  # type: ignore[misc]
        # transformers 4.57: `generate` puts the text's positions, a fourth row, before time, height and width.
        token = _MROPE_POSITIONS.set(position_ids[-3:])
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _MROPE_POSITIONS.reset(token)


class Qwen2_5_VL_MergeTextModel(MRopeDecoder, Qwen3Model):
    """Qwen3's decoder with M-RoPE's positions."""

    config_class = Qwen2_5_VL_MergeTextConfig

    def __init__(self, config: Qwen2_5_VL_MergeTextConfig):
        super().__init__(config)
        self.prepare(config.rope_scaling["mrope_section"])


class Qwen2_5_VL_MergePreTrainedModel(Qwen2_5_VLPreTrainedModel):
    config_class = Qwen2_5_VL_MergeConfig
    _no_split_modules = ["Qwen3DecoderLayer", "Qwen2_5_VLVisionBlock", "Qwen2_5_VL_MergeVisionBlock"]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (Qwen2RMSNorm, Qwen3RMSNorm)):
            module.weight.data.fill_(1.0)


class Qwen2_5_VL_MergeModel(Qwen2_5_VL_MergePreTrainedModel, Qwen2_5_VLModel):
    """Vision tower and text tower without a head."""

    # Qwen2.5-VL's own mapping misses checkpoints that were re-saved with the names of memory.
    # Spelled so that what transformers 4.57 makes of the patterns for a save, `model.visual` and `model`, are names.
    _checkpoint_conversion_mapping = {"^model.visual": "visual", r"^model(\.language_model|)": "language_model"}

    def __init__(self, config: Qwen2_5_VL_MergeConfig):
        # Not Qwen2_5_VLModel's own: it would build a whole Qwen2.5 decoder first.
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.visual = Qwen2_5_VL_MergeVisionTransformer._from_config(config.vision_config)
        self.language_model = Qwen2_5_VL_MergeTextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    def forward(
        self,
        input_ids=None,
        *,
        past_key_values=None,
        inputs_embeds=None,
        cache_position=None,
        pixel_values=None,
        pixel_values_videos=None,
        **kwargs,
    ):
        """Qwen2.5-VL's, with two things otherwise.

        Pictures and videos go through the vision tower in one call: ranks of which some have both would gather its
        weights more often than others under ZeRO-3, and hang. And a cache that comes without its `cache_position`
        does not make every position 0.
        """
        if cache_position is None and past_key_values is not None:
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            start = past_key_values.get_seq_length()
            cache_position = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        if inputs_embeds is None:
            images = (pixel_values, kwargs.get("image_grid_thw"), self.config.image_token_id)
            videos = (pixel_values_videos, kwargs.get("video_grid_thw"), self.config.video_token_id)
            inputs_embeds = self._embed(input_ids, [kind for kind in (images, videos) if kind[0] is not None])
        return super().forward(
            input_ids=input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cache_position=cache_position,
            **kwargs,
        )

    def picture_features(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Patches of pictures and videos, and their grids (pictures, 3) -> (tokens, LLM width)."""
        return self.visual(patches, grid_thw=grids)

    def count_features(self, patches: torch.Tensor, grids: torch.Tensor) -> int:
        """How many tokens they have."""
        return len(patches) // self.visual.spatial_merge_unit

    def _embed(self, input_ids: torch.Tensor, kinds: list[tuple]) -> torch.Tensor:
        """(batch, tokens, width) of `input_ids`; of each kind's patches, grids and token the features in its places."""
        embeddings = self.get_input_embeddings()(input_ids)
        if not kinds:
            return embeddings
        patches, grids = (torch.cat(parts) for parts in list(zip(*kinds, strict=True))[:2])
        known = _KNOWN.get()
        if "grids" in known:
            grids = torch.tensor(known["grids"])
        features = self.picture_features(patches.type(self.visual.dtype), grids)
        places = known.get("features")
        if places is None:
            found = [(input_ids.flatten() == token).nonzero().squeeze(1) for *_, token in kinds]
            tokens, wanted = [*map(len, found)], [self.count_features(*kind[:2]) for kind in kinds]
            if tokens != wanted:
                raise ValueError(f"Image features and image tokens do not match: tokens: {tokens}, features {wanted}")
            places = torch.cat(found)
        return self.placed(embeddings, places, features.to(embeddings.device, embeddings.dtype))

    def placed(self, embeddings: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`embeddings` (batch, tokens, width) with `features` (places, width) at `places` of its flattened tokens."""
        return embeddings.flatten(0, 1).index_copy(0, places, features).view_as(embeddings)

    def _fix_state_dict_keys_on_save(self, state_dict: dict) -> dict:
        """The names of the disk for a model without a head, too."""
        return {disk_name(re.sub(r"^language_model\.", "model.", name)): tensor for name, tensor in state_dict.items()}


def _summed_loss(weight: torch.Tensor, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(functional.linear(hidden_states, weight).float(), targets, reduction="sum")


class Qwen2_5_VL_MergeHead(nn.Linear):
    """The output head. With `targets` it gives their loss, so that a sharded weight is gathered for it as for logits.

    fused_loss: called with the weight, (positions, width) and targets; set by who enables Liger's kernels.
    """

    fused_loss = None
    positions_at_once = 4096  # logits of more are made again in the backward: 1.2 GB in bfloat16, twice that in float32
    summed_loss = staticmethod(_summed_loss)

    def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """(..., width) -> logits (..., vocabulary); with targets (positions): their mean cross entropy, float32."""
        if targets is None:
            return super().forward(hidden_states)
        if self.fused_loss is not None:
            return self.fused_loss(self.weight, hidden_states, targets)
        parts = list(zip(*(x.split(self.positions_at_once) for x in (hidden_states, targets)), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            losses = [self.summed_loss(self.weight, *part) for part in parts]
        else:
            losses = [checkpoint(self.summed_loss, self.weight, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum() / len(targets)


class Qwen2_5_VL_MergeForConditionalGeneration(Qwen2_5_VL_MergePreTrainedModel, Qwen2_5_VLForConditionalGeneration):
    """The model that is trained and asked; `generate` is Qwen2.5-VL's.

    loss_without_logits: in training, `forward` with labels gives the loss alone. Set by trainers that read nothing
    else; the head then sees only the positions that carry a label.
    """

    loss_without_logits = False

    def __init__(self, config: Qwen2_5_VL_MergeConfig):
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = Qwen2_5_VL_MergeModel(config)
        self.lm_head = Qwen2_5_VL_MergeHead(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and warns where it cannot
        # A trainer that resumes calls `load_state_dict` with the names of the disk; without this it would load
        # nothing and go on from the base weights.
        self.register_load_state_dict_pre_hook(names_of_memory)
        self.post_init()

    def compile_blocks(self, **options) -> None:
        """torch.compile for the layers of both towers one by one, with `options`; their first step then takes a minute.

        To be called when it is settled what trains: PyTorch takes a graph without gradients for one with them.
        """
        if self.model.visual.config._attn_implementation == "sdpa":
            self.model.visual.compile_blocks(**options)
        for layer in self.model.language_model.layers:
            layer.compile(**options)
        summed_loss = torch.compile(_summed_loss, **options)
        for head in self.lm_head.modules():  # PEFT may have wrapped it
            # Inductor pads sides that are no multiples of 8, not alike in a forward and when a checkpoint repeats it.
            if isinstance(head, Qwen2_5_VL_MergeHead) and head.out_features % 8 == 0:
                head.summed_loss = summed_loss

    @wraps(Qwen2_5_VLForConditionalGeneration.forward)
    def forward(self, *args, labels=None, **kwargs):
        """Qwen2.5-VL's, with two more cases: several samples in a row (`PACKING`), and `loss_without_logits`.

        It takes what is `KNOWN` of the batch, too.
        """
        packing, known = ({name: kwargs.pop(name) for name in names if name in kwargs} for names in (PACKING, KNOWN))
        tokens = PACKED.set(packing), _KNOWN.set(known)
        try:
            short = self.training and self.loss_without_logits and labels is not None and self._head_takes_targets()
            if not short:
                return super().forward(*args, labels=labels, **kwargs)
            outputs = self.model(*args, **{**kwargs, "return_dict": True})
        finally:
            PACKED.reset(tokens[0])
            _KNOWN.reset(tokens[1])
        targets = labels[:, 1:].flatten()
        labelled = known.get("labelled")
        if labelled is None:
            labelled = (targets != -100).nonzero().squeeze(1)
        hidden_states = outputs.last_hidden_state[:, :-1].flatten(0, 1)[labelled]
        loss = self.lm_head(hidden_states, targets[labelled])
        return Qwen2_5_VLCausalLMOutputWithPast(loss=loss, rope_deltas=outputs.rope_deltas)

    def _head_takes_targets(self) -> bool:
        """Not when a resized vocabulary made it a plain Linear, or LoRA adds its own to what it gives."""
        # PEFT trains a copy of what `modules_to_save` names and hands everything on to it.
        whole = hasattr(self.lm_head, "modules_to_save")
        return isinstance(self.lm_head.original_module if whole else self.lm_head, Qwen2_5_VL_MergeHead)

    def _fix_state_dict_keys_on_save(self, state_dict: dict) -> dict:
        """transformers' hook for the names of a save; its own reverse mapping does nothing in 4.52.3, but in 4.57."""
        return {disk_name(name): tensor for name, tensor in state_dict.items()}


def disk_name(name: str) -> str:
    """The name on the disk (`visual.*`, `model.*`) of a tensor named as in memory or as on the disk."""
    return re.sub(r"^model\.(?:(visual|projector)|language_model)\.", lambda m: f"{m[1] or 'model'}.", name)


def memory_name(name: str) -> str:
    """The name in memory (`model.visual.*`, `model.language_model.*`) of a tensor named either way."""
    prefixes = {"visual.": "model.visual.", "projector.": "model.projector.", "model.": "model.language_model."}
    return re.sub(r"^(?:visual|projector|model)\.", lambda m: prefixes[m[0]], disk_name(name))


def names_of_memory(module, state_dict: dict, prefix: str, *_) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[prefix + memory_name(name[len(prefix) :])] = state_dict.pop(name)


__all__ = ["Qwen2_5_VL_MergeForConditionalGeneration", "Qwen2_5_VL_MergeModel", "Qwen2_5_VL_MergePreTrainedModel"]
