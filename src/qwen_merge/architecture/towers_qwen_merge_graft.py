"""Vision towers of a graft, each transformers' own, behind one way of asking for features.

Pictures arrive as Qwen's do: the patches of all of them in one row, (patches, channels * frames * side * side), with
their grids, (pictures, 3). Here the patches of a picture come row by row. What is given back are the tower's features
before any projector, (patches, tower width), in the same order.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

from .configuration_qwen_merge_graft import QwenMergeGraftConfig
from .encoder_qwen_merge_graft import Encoder
from .projectors_qwen_merge_graft import Grids, in_rows, in_units
from .vision_qwen2_5_vl_merge import Qwen2_5_VL_MergeVisionTransformer


class AsUnits(nn.Module):
    """In place of a patch merger: the patches of a unit side by side, (patches, width) -> (units, unit * width)."""

    def __init__(self, unit: int):
        super().__init__()
        self.unit = unit

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.unflatten(0, (-1, self.unit)).flatten(1)


class GraftQwen2_5_VisionTransformer(Qwen2_5_VL_MergeVisionTransformer):
    """Qwen2.5-VL's tower without its patch merger."""

    def make_merger(self, config) -> nn.Module:
        return AsUnits(config.spatial_merge_size**2)


class GraftQwen2VisionTransformer(Qwen2VisionTransformerPretrainedModel):
    """Qwen2-VL's tower without its patch merger."""

    def __init__(self, config, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        self.merger = AsUnits(config.spatial_merge_size**2)


def _qwen3_vl(vision) -> nn.Module:
    """Qwen3-VL's tower without its patch mergers, of which it has one more for each level of DeepStack."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    tower = Qwen3VLVisionModel._from_config(vision)
    unit = vision.spatial_merge_size**2
    tower.merger = AsUnits(unit)
    tower.deepstack_merger_list = nn.ModuleList(AsUnits(unit) for _ in vision.deepstack_visual_indexes)
    return tower


class PictureTower:
    """In front of a tower that takes whole pictures: pictures of all sizes in one call.

    ZeRO-3 gathers weights call by call. With a call for each size, a rank whose pictures have fewer sizes than those of
    another would gather less often, and both wait for ever. A trainer sees by `gathers_as_one` that all of it is to be
    gathered at once (DeepSpeed's leaf modules).
    """

    gathers_as_one = True

    def forward(self, patches: torch.Tensor, grids: Grids, config: QwenMergeGraftConfig) -> torch.Tensor:
        """As `features_of`."""
        return _of_pictures(super().forward, patches, grids, config)  # type: ignore[misc]


class OwnEncoder(nn.Module):
    """A user's own encoder, asked as one of transformers' is."""

    def __init__(self, config):
        super().__init__()
        if Encoder is None:
            raise ValueError(
                "this graft's encoder is code in its own folder; load it through transformers with "
                "trust_remote_code=True. What runs the installed package's classes (vLLM) has no place for it."
            )
        self.encoder = Encoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> SimpleNamespace:
        """(pictures, channels, height, width) -> `last_hidden_state`, (pictures, tokens, tower width)."""
        output = self.encoder(pixel_values=pixel_values)
        return SimpleNamespace(last_hidden_state=getattr(output, "last_hidden_state", output))


class GraftOwnEncoder(PictureTower, OwnEncoder):  # type: ignore[misc]
    pass


def tower_of(config: QwenMergeGraftConfig) -> nn.Module:
    vision = config.vision_config
    if vision.model_type == "custom":
        return GraftOwnEncoder(vision)
    native: dict[str, Any] = {"qwen2_vl": GraftQwen2VisionTransformer, "qwen2_5_vl": GraftQwen2_5_VisionTransformer}
    if vision.model_type == "qwen3_vl":
        return _qwen3_vl(vision)
    if vision.model_type in native:
        return native[vision.model_type]._from_config(vision)
    if vision.model_type.startswith("siglip"):
        vision.vision_use_head = False  # it pools; nothing asks for one vector
    own = Siglip2VisionModel if vision.model_type == "siglip2_vision_model" else MODEL_MAPPING[type(vision)]
    kind: Any = type(f"Graft{own.__name__}", (PictureTower, own), {})
    return kind._from_config(vision)


def features_of(tower: nn.Module, patches: torch.Tensor, grids: Grids, config: QwenMergeGraftConfig) -> torch.Tensor:
    """(patches, channels * frames * side * side) -> (patches, tower width), both row by row.

    With DeepStack (patches, (1 + levels) * tower width): beside the tower's result what it had on the way.

    Raises:
        ValueError: a grid that this tower or projector cannot take.
    """
    for grid in grids:
        if grid[1] % config.factor or grid[2] % config.factor:
            raise ValueError(f"a picture has {grid[1]} x {grid[2]} patches; expected multiples of {config.factor}")
    if config.is_native:
        side = config.vision_config.spatial_merge_size
        units = tower(in_units(patches, grids, side), torch.tensor(grids, device=patches.device))
        levels = (units[0], *units[1]) if isinstance(units, tuple) else (units,)
        rows = [in_rows(level.unflatten(1, (side**2, -1)).flatten(0, 1), grids, side) for level in levels]
        return torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0]
    return tower(patches, grids, config)


def _of_pictures(tower: Callable, patches: torch.Tensor, grids: Grids, config: QwenMergeGraftConfig) -> torch.Tensor:
    """Pictures of one size go through the tower as one batch; class and register tokens are left behind."""
    vision, layer = config.vision_config, config.vision_feature_layer
    side, channels = vision.patch_size, vision.num_channels
    pictures = patches.split([t * r * c for t, r, c in grids])
    outputs: list[torch.Tensor | None] = [None] * len(grids)
    for grid in dict.fromkeys(grids):
        numbers = [number for number, other in enumerate(grids) if other == grid]
        time, rows, columns = grid
        if time != 1:
            raise ValueError(f"{vision.model_type} takes pictures; this is a video of {time} frames")
        squares = torch.stack([pictures[number] for number in numbers]).unflatten(2, (channels, side, side))
        output = tower(**_arguments(vision, squares, rows, columns), output_hidden_states=layer != -1)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        for number, features in zip(numbers, states[:, states.shape[1] - rows * columns :], strict=True):
            outputs[number] = features
    return torch.cat([features for features in outputs if features is not None])


def _arguments(vision, squares: torch.Tensor, rows: int, columns: int) -> dict[str, Any]:
    """What a tower of pictures is called with. squares: (pictures, rows * columns, channels, side, side)."""
    if vision.model_type == "siglip2_vision_model":  # patches whose channels come last, nothing padded
        shapes = torch.tensor([[rows, columns]] * len(squares))
        patches = squares.permute(0, 1, 3, 4, 2).flatten(2)
        return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}
    pixels = squares.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    own = vision.image_size // vision.patch_size
    if (rows, columns) == (own, own) or "dinov2" in vision.model_type:
        return {"pixel_values": pixels}
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


__all__ = ["features_of", "tower_of"]
