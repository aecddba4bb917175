"""Configuration of a graft: any vision tower, a projector and any of Qwen's LLMs (`qwen-merge graft`).

On the disk and in memory three parts stand side by side, each as its source has it: `vision_config` and `text_config`
with their own `model_type`, `projector_config` with a `kind`. Qwen2.5-VL's tower with the extended projector before a
dense Qwen3 is not written in this form: it is `qwen2_5_vl_merge`, byte for byte as the merger of step 1 makes it.
"""

import shutil
from collections.abc import Callable, Collection
from math import lcm
from pathlib import Path
from typing import Any

import transformers
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

from .configuration_qwen2_5_vl_merge import with_torch_dtype
from .kinds_qwen_merge_graft import CODE, LLMS, POSITIONS, PROJECTORS, QUERIES

try:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
except ImportError:  # before 4.57
    Qwen3VLVisionConfig = None

# Towers of Qwen's VLMs, which take any grid of patches and videos; the others take pictures. The Auto classes know only
# whole models under these names.
NATIVE_TOWERS = {"qwen2_vl": Qwen2VLVisionConfig, "qwen2_5_vl": Qwen2_5_VLVisionConfig, "qwen3_vl": Qwen3VLVisionConfig}
PICTURE_TOWERS = (
    "clip_vision_model",
    "siglip_vision_model",
    "siglip2_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "custom",
)

_STEM = "qwen_merge_graft"
_FOR_GENERATION = f"modeling_{_STEM}.QwenMergeGraftForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": f"configuration_{_STEM}.QwenMergeGraftConfig",
    "AutoModel": f"modeling_{_STEM}.QwenMergeGraftModel",
    "AutoModelForImageTextToText": _FOR_GENERATION,
    "AutoModelForVision2Seq": _FOR_GENERATION,
    "AutoModelForCausalLM": _FOR_GENERATION,
}


class CustomVisionConfig(PretrainedConfig):
    """What the `config.json` of a user's own encoder says (`encoder_qwen_merge_graft.py`).

    Args:
        hidden_size: of a token. patch_size: pixels on its side. image_size: pixels on the side of a picture.
        num_hidden_layers, intermediate_size: for estimates of what a picture costs.
    """

    model_type = "custom"

    def __init__(
        self,
        hidden_size: int = 0,
        patch_size: int = 0,
        image_size: int = 0,
        num_channels: int = 3,
        num_hidden_layers: int = 12,
        intermediate_size: int = 3072,
        **kwargs,
    ):
        self.hidden_size, self.patch_size, self.image_size = hidden_size, patch_size, image_size
        self.num_channels, self.num_hidden_layers = num_channels, num_hidden_layers
        self.intermediate_size = intermediate_size
        super().__init__(**kwargs)


def vision_config_of(values: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a tower.

    Raises:
        ValueError: no tower of that `model_type` is known, or not to this transformers.
    """
    kind = values.get("model_type")
    _check("vision_config's model_type", kind, (*NATIVE_TOWERS, *PICTURE_TOWERS))
    check_version(kind)
    if kind in NATIVE_TOWERS:
        return NATIVE_TOWERS[kind](**values)
    if kind == "custom":
        for name in ("hidden_size", "patch_size", "image_size"):
            if type(values.get(name)) is not int or values[name] < 1:
                raise ValueError(f"the encoder's config.json has {name} {values.get(name)!r}; expected a number")
        return CustomVisionConfig(**values)
    # The Auto classes of 4.52 know no SigLIP2 of any size; what is published as SigLIP2 of one size is a SigLIP.
    make = Siglip2VisionConfig if kind == "siglip2_vision_model" else CONFIG_MAPPING[kind]
    return make(**{name: value for name, value in values.items() if name != "model_type"})


def check_version(kind: Any) -> None:
    """Raises ValueError when this transformers is too old for the tower."""
    if NATIVE_TOWERS.get(kind, kind) is None:
        raise ValueError(
            f"{kind} needs transformers 4.57 or later, and this is {transformers.__version__}; the kit's "
            "environment with it: ./scripts/env.sh --stack current"
        )


def text_config_of(values: dict[str, Any]) -> PretrainedConfig:
    """The configuration of an LLM.

    Raises:
        ValueError: no LLM of that `model_type` is known.
    """
    _check("text_config's model_type", values.get("model_type"), LLMS)
    return CONFIG_MAPPING[values["model_type"]](**{name: v for name, v in values.items() if name != "model_type"})


def _config_of(part: "dict | PretrainedConfig", make: Callable[[dict[str, Any]], PretrainedConfig]) -> PretrainedConfig:
    return make(part) if isinstance(part, dict) else part


def _check(name: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, known))}")


class QwenMergeGraftConfig(PretrainedConfig):
    """A vision tower, a projector, an LLM, and how their tokens are numbered.

    What the LLM's configuration has can be read here as well (`config.hidden_size`).

    Args:
        vision_config: the tower's own fields, `model_type` among them.
        projector_config: `kind`, one of `PROJECTORS`, and its settings: `merge_size` (patches on a token's side),
            `hidden_size` (mlp), `queries` and `heads` (resampler), `out_hidden_size` (extended).
        text_config: the LLM's own fields, `model_type` among them.
        positions: "mrope": rotary positions with a time, a height and a width; "1d": as a text has.
        mrope_section: their shares of half of `head_dim`; a time of 0 leaves height and width.
        mrope_interleaved: they take turns (Qwen3-VL), instead of lying one behind the other (Qwen2.5-VL).
        vision_feature_layer: which layer's output is taken of a tower that takes whole pictures (-1: its result).
        freeze_vision: the tower is made without gradients; a trainer may give them back.
        image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: as the tokenizer numbers them.

    Raises:
        ValueError: unknown kinds, or sections that do not add up.
    """

    model_type = "qwen_merge_graft"
    sub_configs = {"vision_config": PretrainedConfig, "text_config": PretrainedConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vision_config: "dict | PretrainedConfig | None" = None,
        projector_config: dict | None = None,
        text_config: "dict | PretrainedConfig | None" = None,
        positions: str = "mrope",
        mrope_section: list[int] | None = None,
        mrope_interleaved: bool = False,
        vision_feature_layer: int = -1,
        freeze_vision: bool = True,
        image_token_id: int = 151655,
        video_token_id: int = 151656,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        **kwargs,
    ):
        self.vision_config = _config_of(vision_config or {"model_type": "qwen2_5_vl"}, vision_config_of)
        self.text_config = text = _config_of(text_config or {"model_type": "qwen3"}, text_config_of)
        self.projector_config = dict(projector_config or {"kind": "patch_merger", "merge_size": 2})
        _check("projector_config's kind", self.projector_config.get("kind"), PROJECTORS)
        _check("positions", positions, POSITIONS)
        self.positions, self.vision_feature_layer = positions, vision_feature_layer
        self.freeze_vision = freeze_vision
        self.mrope_section, self.mrope_interleaved = mrope_section, mrope_interleaved
        if positions == "mrope":
            self.mrope_section = sections_of(text, mrope_section, mrope_interleaved)
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        self.vision_start_token_id, self.vision_end_token_id = vision_start_token_id, vision_end_token_id
        kwargs.pop("tie_word_embeddings", None)  # the LLM's word
        super().__init__(tie_word_embeddings=text.tie_word_embeddings, **kwargs)
        self.auto_map = dict(AUTO_MAP)

    def __getattr__(self, name: str):
        # Reached only for what the top level itself does not have.
        if not name.startswith("_") and "text_config" in self.__dict__:
            return getattr(self.text_config, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    @property
    def is_native(self) -> bool:
        """Whether the tower is one of Qwen's VLMs, which takes any grid of patches, and videos."""
        return self.vision_config.model_type in NATIVE_TOWERS

    @property
    def vision_width(self) -> int:
        """Of the tower's features."""
        return (
            self.vision_config.embed_dim
            if self.vision_config.model_type == "qwen2_vl"
            else self.vision_config.hidden_size
        )

    @property
    def deepstack(self) -> int:
        """How many layers of the tower give features of their own for the LLM's first layers (Qwen3-VL's DeepStack)."""
        return len(getattr(self.vision_config, "deepstack_visual_indexes", ()))

    @property
    def frames(self) -> int:
        """Frames in a patch."""
        return self.vision_config.temporal_patch_size if self.is_native else 1

    @property
    def merge_size(self) -> int:
        """Patches on the side of a token; 1 where tokens and patches are not laid out alike (resampler)."""
        return self.projector_config.get("merge_size", 1)

    @property
    def factor(self) -> int:
        """Patches whose multiples the sides of a picture must have."""
        return lcm(self.merge_size, self.vision_config.spatial_merge_size if self.is_native else 1)

    def tokens(self, grid: "list[int] | tuple[int, int, int]") -> int:
        """How many tokens a picture of `grid` (frames, rows and columns of patches) has."""
        time, rows, columns = grid
        if self.projector_config["kind"] == "resampler":
            return time * self.projector_config.get("queries", QUERIES)
        return time * (rows // self.merge_size) * (columns // self.merge_size)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        with_torch_dtype(output, output["vision_config"], output["text_config"])
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write `config.json`, and beside it the code that its `auto_map` names, and what that code imports."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for module in CODE:
            source, target = Path(__file__).with_name(f"{module}.py"), Path(save_directory, f"{module}.py")
            if source.exists() and not (target.exists() and target.samefile(source)):
                target.unlink(missing_ok=True)  # it may be a link into a cache
                shutil.copyfile(source, target)


def head_dim_of(text: PretrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def sections_of(text: PretrainedConfig, sections: list[int] | None, interleaved: bool = False) -> list[int]:
    """`sections`, or Qwen2.5-VL's proportions (16, 24, 24 of a head_dim of 128), interleaved Qwen3-VL's (24, 20, 20).

    Raises:
        ValueError: they do not add up to half of head_dim, or have no room to take turns.
    """
    half = head_dim_of(text) // 2
    if sections is None and interleaved:
        side = half * 5 // 16
        return [half - 2 * side, side, side]
    if sections is None:
        side = (half - half // 4) // 2
        return [half - 2 * side, side, side]
    if len(sections) != 3 or sum(sections) != half or min(sections) < 0:
        raise ValueError(f"mrope_section is {sections}; time, height and width must add up to head_dim / 2 = {half}")
    if interleaved and max(3 * sections[1] - 2, 3 * sections[2] - 1) >= half:
        raise ValueError(f"mrope_section is {sections}; interleaved, height and width have at most a third each")
    return list(sections)


__all__ = ["QwenMergeGraftConfig"]
