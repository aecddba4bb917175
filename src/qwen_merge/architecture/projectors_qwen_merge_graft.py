"""Projectors of a graft: features of a tower -> tokens of an LLM.

Each takes the features of all pictures, (patches, tower width) with the patches of a picture row by row, and the grids
of the pictures, [(frames, rows, columns) in patches]; each gives (tokens, LLM width), picture after picture. How many
tokens a grid has is `QwenMergeGraftConfig.tokens`.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger as Qwen2VLPatchMerger

from .configuration_qwen_merge_graft import QwenMergeGraftConfig
from .kinds_qwen_merge_graft import QUERIES

Grids = list[tuple[int, int, int]]


def in_units(features: torch.Tensor, grids: Grids, side: int) -> torch.Tensor:
    """Patches row by row -> square after square of side x side patches, each square row by row. Same shape."""
    if side == 1:
        return features
    parts = []
    for picture, (time, rows, columns) in zip(features.split([t * r * c for t, r, c in grids]), grids, strict=True):
        squares = picture.unflatten(0, (time, rows // side, side, columns // side, side))
        parts.append(squares.transpose(2, 3).flatten(0, 4))
    return torch.cat(parts)


def in_rows(features: torch.Tensor, grids: Grids, side: int) -> torch.Tensor:
    """The way back of `in_units`."""
    if side == 1:
        return features
    parts = []
    for picture, (time, rows, columns) in zip(features.split([t * r * c for t, r, c in grids]), grids, strict=True):
        squares = picture.unflatten(0, (time, rows // side, columns // side, side, side))
        parts.append(squares.transpose(2, 3).flatten(0, 4))
    return torch.cat(parts)


class LinearProjector(nn.Module):
    """One Linear for each patch, (patches, tower width) -> (patches, LLM width): no merging, so any grid will do."""

    def __init__(self, config: QwenMergeGraftConfig):
        super().__init__()
        self.proj = nn.Linear(config.vision_width, config.hidden_size)

    def forward(self, features: torch.Tensor, grids: Grids) -> torch.Tensor:
        return self.proj(features)


class MLPProjector(nn.Module):
    """LayerNorm, Linear, GELU, Linear over squares of `merge_size`² patches (1: each patch alone).

    (patches, tower width) -> (patches / merge_size², LLM width); `hidden_size` (default: the LLM's) lies between.
    """

    def __init__(self, config: QwenMergeGraftConfig):
        super().__init__()
        self.merge_size = config.merge_size
        width = config.vision_width * self.merge_size**2
        hidden = config.projector_config.get("hidden_size") or config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, config.hidden_size))

    def forward(self, features: torch.Tensor, grids: Grids) -> torch.Tensor:
        squares = in_units(features, grids, self.merge_size).unflatten(0, (-1, self.merge_size**2)).flatten(1)
        return self.mlp(self.norm(squares))


class PatchMergerProjector(Qwen2_5_VLPatchMerger):
    """Qwen2.5-VL's patch merger, made for this LLM's width: RMSNorm, then Linear, GELU, Linear over squares.

    (patches, tower width) -> (patches / merge_size², LLM width).
    """

    def __init__(self, config: QwenMergeGraftConfig):
        super().__init__(config.hidden_size, config.vision_width, config.merge_size)
        self.merge_size = config.merge_size

    def forward(self, features: torch.Tensor, grids: Grids) -> torch.Tensor:
        return super().forward(in_units(features, grids, self.merge_size))


def qwen3_vl_merger(config: QwenMergeGraftConfig, width: int, deepstack: bool = False) -> nn.Module:
    """Qwen3-VL's patch merger, (patches, tower width) square by square -> (squares, `width`): LayerNorm, then Linear,
    GELU, Linear. Those of DeepStack norm whole squares, not patches.
    """
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

    shapes = SimpleNamespace(
        hidden_size=config.vision_width, spatial_merge_size=config.merge_size, out_hidden_size=width
    )
    return Qwen3VLVisionPatchMerger(shapes, use_postshuffle_norm=deepstack)


class OwnProjector(nn.Module):
    """The tower's own patch merger, as its VLM was trained, before an LLM of the width it was made for.

    (patches, tower width) -> (patches / merge_size², `out_hidden_size` or another `width`).
    """

    def __init__(self, config: QwenMergeGraftConfig, width: int | None = None):
        super().__init__()
        self.merge_size, width = config.merge_size, width or config.projector_config["out_hidden_size"]
        if config.vision_config.model_type == "qwen3_vl":
            self.merger = qwen3_vl_merger(config, width)
        else:
            merger = Qwen2VLPatchMerger if config.vision_config.model_type == "qwen2_vl" else Qwen2_5_VLPatchMerger
            self.merger = merger(width, config.vision_width, self.merge_size)

    def forward(self, features: torch.Tensor, grids: Grids) -> torch.Tensor:
        return self.merger(in_units(features, grids, self.merge_size))


class ExtendedProjector(OwnProjector):
    """The tower's own patch merger, then GELU and one new Linear (Qwen-Merge).

    (patches, tower width) -> (patches / merge_size², `out_hidden_size`) -> (…, LLM width).
    """

    def __init__(self, config: QwenMergeGraftConfig):
        super().__init__(config)
        self.proj = nn.Linear(config.projector_config["out_hidden_size"], config.hidden_size)

    def forward(self, features: torch.Tensor, grids: Grids) -> torch.Tensor:
        return self.proj(functional.gelu(super().forward(features, grids)))


class ResamplerProjector(nn.Module):
    """`queries` learned queries look at the patches of a frame through one layer of cross-attention (Qwen-VL).

    (patches, tower width) -> (frames * queries, LLM width). Queries and patches have absolute positions in two
    dimensions, the queries those of a square grid laid over the picture.
    """

    def __init__(self, config: QwenMergeGraftConfig):
        super().__init__()
        width, settings = config.hidden_size, config.projector_config
        self.side = round(settings.get("queries", QUERIES) ** 0.5)
        self.queries = nn.Parameter(torch.empty(self.side**2, width).normal_(0, 0.02))
        self.kv_proj = nn.Linear(config.vision_width, width, bias=False)
        self.norm_q, self.norm_kv, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, settings.get("heads") or max(1, width // 128), batch_first=True)

    def forward(self, features: torch.Tensor, grids: Grids) -> torch.Tensor:
        states, outputs = self.norm_kv(self.kv_proj(features)), []
        queries = self.norm_q(self.queries)
        for picture, (time, rows, columns) in zip(states.split([t * r * c for t, r, c in grids]), grids, strict=True):
            values = picture.unflatten(0, (time, -1))
            at, own = (plane_positions(r, c, states) for r, c in ((rows, columns), (self.side, self.side)))
            asked = (queries + own).expand(time, -1, -1)
            outputs.append(self.attention(asked, values + at, values, need_weights=False)[0].flatten(0, 1))
        return self.norm_out(torch.cat(outputs))


def plane_positions(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of where the middle of each cell lies in a 16 x 16 plane, (rows * columns, width of `like`).

    The plane is 16 wide for every grid, so that cells of two grids at the same place of a picture have the same value.
    """
    width = like.shape[-1]
    frequencies = 10000 ** -torch.arange(width // 4, device=like.device, dtype=torch.float32).div(width / 4)
    parts = []
    for count, repeat in ((rows, lambda x: x.repeat_interleave(columns, 0)), (columns, lambda x: x.repeat(rows, 1))):
        middles = (torch.arange(count, device=like.device, dtype=torch.float32) + 0.5) * (16 / count)
        angles = middles[:, None] * frequencies
        parts.append(repeat(torch.cat((angles.sin(), angles.cos()), dim=-1)))
    return functional.pad(torch.cat(parts, dim=-1), (0, width % 4)).to(like.dtype)


def patch_merger(config: QwenMergeGraftConfig) -> nn.Module:
    """A patch merger made for this LLM's width: behind Qwen3-VL's tower one of its kind, else Qwen2.5-VL's."""
    if config.vision_config.model_type == "qwen3_vl":
        return OwnProjector(config, config.hidden_size)
    return PatchMergerProjector(config)


class DeepStackProjector(nn.Module):
    """A projector for the tower's result, and one of Qwen3-VL's mergers for each level of DeepStack.

    (patches, (1 + levels) * tower width) -> (tokens, (1 + levels) * LLM width).
    """

    def __init__(self, config: QwenMergeGraftConfig, first: nn.Module):
        super().__init__()
        self.merge_size, self.first = config.merge_size, first
        self.deepstack = nn.ModuleList(
            qwen3_vl_merger(config, config.hidden_size, deepstack=True) for _ in range(config.deepstack)
        )

    def forward(self, features: torch.Tensor, grids: Grids) -> torch.Tensor:
        first, *levels = features.chunk(1 + len(self.deepstack), dim=-1)
        mergers = zip(self.deepstack, levels, strict=True)
        tokens = [merger(in_units(level, grids, self.merge_size)) for merger, level in mergers]
        return torch.cat([self.first(first, grids), *tokens], dim=-1)


KINDS: dict[str, Callable[[QwenMergeGraftConfig], nn.Module]] = {
    "own": OwnProjector,
    "extended": ExtendedProjector,
    "patch_merger": patch_merger,
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "resampler": ResamplerProjector,
}


def projector_of(config: QwenMergeGraftConfig) -> nn.Module:
    """As the configuration says; the trailing levels of DeepStack are told in `DeepStackProjector`."""
    projector = KINDS[config.projector_config["kind"]](config)
    return DeepStackProjector(config, projector) if config.deepstack else projector


__all__ = ["projector_of"]
