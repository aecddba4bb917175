"""transformers' Qwen2.5-VL vision tower, two parts exchanged: the projector, and how attention is computed.

The patch merger (the projector) gets GELU and one Linear behind it. Attention is computed within windows and frames
only. transformers' sdpa path builds a mask over all patches of a batch, in each of its layers, and multiplies by it:
work that grows with the square of the pictures in a batch. Here the windows are sorted by size, so that equal ones lie
side by side and go through one call without a mask; the four layers with full attention see the frames sorted likewise.
What stands around the attention can be compiled once for all blocks.
Features are equal within rounding (`tests/unit/test_vision.py`, 30 random batches of pictures and videos).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy
import torch
from torch import nn
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLPatchMerger,
    Qwen2_5_VLVisionBlock,
    apply_rotary_pos_emb_vision,
)

from .configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeVisionConfig


def _varlen_attn():
    """PyTorch's kernel for segments of different lengths (from 2.10 on), flash-attn's behind its name, or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        pass
    else:
        return varlen_attn
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def by_flash_attn(q, k, v, offsets_q, offsets_k, longest_q, longest_k, window_size=(-1, -1)):
        lengths = (offsets_q, offsets_k, longest_q, longest_k)
        return flash_attn_varlen_func(q, k, v, *lengths, window_size=window_size)

    return by_flash_attn


varlen_attn = _varlen_attn()


def takes_varlen(states: torch.Tensor) -> bool:
    """Whether `varlen_attn` is there and takes such states: on CUDA, 16 bit."""
    return varlen_attn is not None and states.is_cuda and states.dtype in (torch.bfloat16, torch.float16)


class Qwen2_5_VL_MergePatchMerger(Qwen2_5_VLPatchMerger):
    """The projector: Qwen2.5-VL's patch merger (`ln_q`, `mlp.0`, `mlp.2`), then GELU and `mlp.4`.

    (patches, vision width) -> (patches / merge size², LLM width). `mlp.4` is a Linear with bias.
    """

    def __init__(self, config: Qwen2_5_VL_MergeVisionConfig):
        super().__init__(config.out_hidden_size, config.hidden_size, config.spatial_merge_size)
        self.mlp.extend([nn.GELU(), nn.Linear(config.out_hidden_size, config.out_hidden_size2)])


@dataclass(frozen=True)
class Segments:
    """Runs of patches that attend to themselves only.

    lengths: of each run, equal ones side by side. offsets: where each begins, and the end, int32 (runs + 1).
    rotary: cos and sin of each patch, (patches, head width).
    """

    lengths: tuple[int, ...]
    offsets: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]


class Qwen2_5_VL_MergeVisionBlock(Qwen2_5_VLVisionBlock):
    """Qwen2.5-VL's block with attention within segments: no mask over all patches, whose cost is quadratic in them.

    before, after: what stands on either side of the attention; `compile_blocks` puts compiled forms here.
    """

    def __init__(self, config: Qwen2_5_VL_MergeVisionConfig):
        super().__init__(config, "sdpa")
        self.before, self.after = before_attention, after_attention

    def forward(self, hidden_states: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(patches, width) -> (patches, width)."""
        q, k, v = self.before(self, hidden_states, *segments.rotary)
        return self.after(self, hidden_states, attend(q, k, v, segments).flatten(1))


def before_attention(block: nn.Module, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    """(patches, width) -> query, key and value, (patches, heads, head width) each, the first two turned."""
    qkv = block.attn.qkv(block.norm1(hidden_states)).unflatten(1, (3, block.attn.num_heads, -1))
    q, k = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
    return q, k, qkv[:, 2].contiguous()


def after_attention(block: nn.Module, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """(patches, width), and what attention gave for each -> (patches, width)."""
    hidden_states = hidden_states + block.attn.proj(attended)
    return hidden_states + block.mlp(block.norm2(hidden_states))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """q, k, v (patches, heads, head width) -> the same shape, each patch from its segment.

    A varlen kernel (PyTorch 2.10 or flash-attn; CUDA, 16 bit) takes all segments at once; elsewhere neighbours of equal
    length go through scaled_dot_product_attention as one batch, which on GPUs is its flash kernel.
    """
    if takes_varlen(q):
        longest = max(segments.lengths)
        return varlen_attn(q, k, v, segments.offsets, segments.offsets, longest, longest)
    return attend_in_batches(q, k, v, segments.lengths)


def attend_in_batches(q, k, v, lengths: tuple[int, ...]) -> torch.Tensor:
    """q, k, v (patches, heads, head width) -> the same; neighbouring segments of equal length share one call."""
    outputs, start, first = [], 0, 0
    while first < len(lengths):
        last = first
        while last < len(lengths) and lengths[last] == lengths[first]:
            last += 1
        stop = start + lengths[first] * (last - first)
        batch = (x[start:stop].unflatten(0, (last - first, -1)).transpose(1, 2) for x in (q, k, v))
        outputs.append(functional.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
        start, first = stop, last
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class Qwen2_5_VL_MergeVisionTransformer(Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's vision tower with the longer projector and attention within segments."""

    config_class = Qwen2_5_VL_MergeVisionConfig

    def __init__(self, config: Qwen2_5_VL_MergeVisionConfig, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        self.merger = self.make_merger(config)
        if config._attn_implementation == "sdpa":
            self.blocks = nn.ModuleList([Qwen2_5_VL_MergeVisionBlock(config) for _ in range(config.depth)])

    def make_merger(self, config) -> nn.Module:
        """What follows the blocks: (patches, width), a unit's patches side by side -> (units, any width)."""
        return Qwen2_5_VL_MergePatchMerger(config)

    def compile_blocks(self, **options) -> None:
        """torch.compile for what stands around the attention of all blocks, with `options`; sdpa only.

        Two small graphs serve all blocks and all grids; whole blocks would be compiled for each set of windows.
        """
        before, after = (torch.compile(part, **options) for part in (before_attention, after_attention))
        for block in self.blocks:
            block.before, block.after = before, after

    def forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches (patches, channels * 2 * 14 * 14), their grids (pictures, 3) -> (patches / merge size², LLM width).

        The blocks see the windows sorted by size, those with full attention the frames sorted by size. With grids on
        the host nothing waits for the device.
        """
        if self.config._attn_implementation != "sdpa":
            return super().forward(hidden_states, grid_thw.to(hidden_states.device))
        grids, unit = grid_thw.tolist(), self.spatial_merge_unit
        to_windows, window_lengths = self._ordered(
            grids, self.window_size // self.spatial_merge_size // self.patch_size
        )
        to_frames, frame_lengths = self._ordered(grids, None)
        positions = torch.cat([patch_positions(*grid, self.spatial_merge_size) for grid in grids])
        device = hidden_states.device
        windows = self._segments(positions.unflatten(0, (-1, unit))[to_windows].flatten(0, 1), window_lengths, device)
        frames = self._segments(positions.unflatten(0, (-1, unit))[to_frames].flatten(0, 1), frame_lengths, device)
        # Where a unit (merge size² patches) of one order stands in the other.
        back = to_windows.argsort()
        windows_to_frames = copied(back[to_frames], device)
        frames_to_windows = copied(to_frames.argsort()[to_windows], device)

        trained = any(p.requires_grad for part in (self.patch_embed, self.blocks) for p in part.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            hidden_states = permuted(self.patch_embed(hidden_states), copied(to_windows, device), unit)
            for number, block in enumerate(self.blocks):
                if number in self.fullatt_block_indexes:
                    hidden_states = permuted(hidden_states, windows_to_frames, unit)
                    hidden_states = permuted(self._block(block, hidden_states, frames), frames_to_windows, unit)
                else:
                    hidden_states = self._block(block, hidden_states, windows)
        return self.merger(hidden_states)[copied(back, device)]

    def _block(self, block, hidden_states: torch.Tensor, segments: Segments) -> torch.Tensor:
        # transformers 4.52 leaves it to the tower; 4.57's blocks have this attribute and see to it themselves.
        if self.gradient_checkpointing and self.training and not hasattr(block, "gradient_checkpointing"):
            return self._gradient_checkpointing_func(block.__call__, hidden_states, segments)
        return block(hidden_states, segments)

    def _ordered(self, grids: list[list[int]], window: int | None) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The units of all windows (frames when `window` is None), sorted by length, and the lengths in patches."""
        units, lengths, start = [], [], 0
        for time, height, width in grids:
            rows, columns = height // self.spatial_merge_size, width // self.spatial_merge_size
            order, sizes = windows_of(rows, columns, window or max(rows, columns))
            firsts = start + numpy.arange(time)[:, None] * (rows * columns)
            units.append((firsts + order).reshape(-1))
            lengths.append(numpy.tile(sizes, time))
            start += time * rows * columns
        all_units, all_lengths = numpy.concatenate(units), numpy.concatenate(lengths)
        # Stable, so that units of one segment stay side by side: a segment's number breaks the tie of lengths.
        order = numpy.argsort(numpy.repeat(all_lengths, all_lengths), kind="stable")
        sizes = numpy.sort(all_lengths) * self.spatial_merge_unit
        return torch.from_numpy(all_units[order]), tuple(sizes.tolist())

    def _segments(self, positions: torch.Tensor, lengths: tuple[int, ...], device: torch.device) -> Segments:
        frequencies = self.rotary_pos_emb.inv_freq
        angles = (copied(positions.to(frequencies.dtype), device)[..., None] * frequencies).flatten(1)
        angles = torch.cat((angles, angles), dim=-1)
        ends = numpy.cumsum((0, *lengths), dtype=numpy.int32)
        return Segments(lengths, copied(torch.from_numpy(ends), device), (angles.cos(), angles.sin()))


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` of the host on `device`, without waiting for what the device still does."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def permuted(hidden_states: torch.Tensor, order: torch.Tensor, unit: int) -> torch.Tensor:
    """Patches (patches, width) with their units of `unit` patches in another order."""
    return hidden_states.unflatten(0, (-1, unit))[order].flatten(0, 1)


@lru_cache(maxsize=4096)
def windows_of(rows: int, columns: int, side: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The units of one frame window by window, and how many each window of side x side units holds."""
    places = numpy.arange(rows * columns).reshape(rows, columns)
    parts = [
        places[top : top + side, left : left + side].reshape(-1)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    return numpy.concatenate(parts), numpy.array([len(part) for part in parts])


@lru_cache(maxsize=4096)
def patch_positions(time: int, height: int, width: int, merge: int) -> torch.Tensor:
    """Row and column of each patch in the processor's order (units of merge x merge), (patches, 2)."""
    places = numpy.stack(numpy.meshgrid(numpy.arange(height), numpy.arange(width), indexing="ij"), axis=-1)
    places = places.reshape(height // merge, merge, width // merge, merge, 2).swapaxes(1, 2)
    return torch.from_numpy(numpy.tile(places.reshape(-1, 2), (time, 1)))


__all__ = ["Qwen2_5_VL_MergePatchMerger", "Qwen2_5_VL_MergeVisionTransformer"]
