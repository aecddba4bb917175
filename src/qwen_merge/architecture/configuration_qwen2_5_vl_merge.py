"""Configuration of Qwen2_5_VL_Merge: Qwen3's text fields flat at the top level, Qwen2.5-VL's `vision_config` nested.

In memory there are two sub-configurations, as transformers wants them; on the disk the layout of Qwen2.5-VL's own
`config.json` is kept, whatever loads and saves it. Source of the contract: Qwen2.5-VL-*-Instruct/config.json.
"""

import inspect
import shutil
from pathlib import Path

from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_rope_utils import rope_config_validation
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

_CONFIGURATION, _MODELING = "configuration_qwen2_5_vl_merge", "modeling_qwen2_5_vl_merge"
_CODE = (_CONFIGURATION, "vision_qwen2_5_vl_merge", _MODELING)
_FOR_GENERATION = f"{_MODELING}.Qwen2_5_VL_MergeForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": f"{_CONFIGURATION}.Qwen2_5_VL_MergeConfig",
    "AutoModel": f"{_MODELING}.Qwen2_5_VL_MergeModel",
    "AutoModelForImageTextToText": _FOR_GENERATION,
    "AutoModelForVision2Seq": _FOR_GENERATION,
    # LLaMA-Factory asks for a causal LM whenever the configuration's class is not transformers' own.
    "AutoModelForCausalLM": _FOR_GENERATION,
}

# What belongs to the text tower: Qwen3Config's own parameters. The rest is the whole model's.
TEXT_FIELDS = frozenset(inspect.signature(Qwen3Config.__init__).parameters) - {"self", "kwargs"}


class Qwen2_5_VL_MergeVisionConfig(Qwen2_5_VLVisionConfig):
    """Qwen2.5-VL's vision tower, whose projector has one more Linear.

    Args:
        out_hidden_size: width after Qwen2.5-VL's own patch merger (2048, 3584, 5120 or 8192 for 3B, 7B, 32B, 72B).
        out_hidden_size2: width after the new Linear: the LLM's `hidden_size`.
    """

    model_type = "qwen2_5_vl_merge"

    def __init__(self, out_hidden_size2: int = 4096, **kwargs):
        super().__init__(**kwargs)
        self.out_hidden_size2 = out_hidden_size2


class Qwen2_5_VL_MergeTextConfig(Qwen3Config):
    """Qwen3's configuration with the `mrope_section` of its rotary embedding.

    `rope_scaling` may be set again, in the form of the disk or without sections (as LLaMA-Factory's option of that name
    does): the sections stay.

    Raises:
        ValueError: the sections do not add up to half of `head_dim`.
    """

    model_type = "qwen2_5_vl_merge_text"
    base_config_key = "text_config"

    def __init__(self, rope_scaling: dict | None = None, **kwargs):
        # Qwen3Config would warn about the M-RoPE keys, which it does not know; they are validated below.
        super().__init__(rope_scaling=None, **kwargs)
        self.rope_scaling = _normalised_rope_scaling(rope_scaling, self.head_dim)
        rope_config_validation(self, ignore_keys={"mrope_section", "type"})

    def __setattr__(self, name: str, value) -> None:
        old = self.__dict__.get("rope_scaling")
        if name == "rope_scaling" and old is not None:
            value = _normalised_rope_scaling({"mrope_section": old["mrope_section"], **(value or {})}, self.head_dim)
        super().__setattr__(name, value)


def _normalised_rope_scaling(rope_scaling: dict | None, head_dim: int) -> dict:
    if rope_scaling is None:  # Qwen2.5-VL's proportions: [16, 24, 24] of head_dim 128
        temporal = head_dim // 8
        rope_scaling = {"type": "mrope", "mrope_section": [temporal, *[(head_dim // 2 - temporal) // 2] * 2]}
    rope_scaling = dict(rope_scaling)
    sections = rope_scaling.get("mrope_section")
    if not (
        isinstance(sections, (list, tuple))
        and len(sections) == 3
        and all(isinstance(section, int) for section in sections)
        and sum(sections) == head_dim // 2
    ):
        raise ValueError(
            f"rope_scaling['mrope_section'] is {sections}; its time, height and width sections must add up to "
            f"head_dim / 2 = {head_dim // 2}. Merge again with sections that fit this LLM."
        )
    rope_type = rope_scaling.get("rope_type", rope_scaling.get("type", "mrope"))
    # transformers has no RoPE initialiser of the name "mrope": M-RoPE's frequencies are the default ones.
    rope_scaling["type"] = rope_scaling["rope_type"] = "default" if rope_type == "mrope" else rope_type
    return rope_scaling


def with_torch_dtype(*parts: dict) -> None:
    """transformers 4.57 writes `dtype` and reads both names; 4.52 and the contract know `torch_dtype` only."""
    for part in parts:
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")


class Qwen2_5_VL_MergeConfig(PretrainedConfig):
    """A vision tower, a text tower and the ids of the tokens that stand for pictures.

    Attributes of the text tower can be read and set here as well (`config.hidden_size` is
    `config.text_config.hidden_size`): one value, no second copy that could differ.

    Args:
        text_config: the text fields as a dict or configuration. What it lacks is taken from the keyword arguments of
            Qwen3's names: the flat layout of the disk.
        vision_config: dict or configuration of the vision tower.
        image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: as in Qwen2.5-VL and Qwen3.
    """

    model_type = "qwen2_5_vl_merge"
    sub_configs = {"vision_config": Qwen2_5_VL_MergeVisionConfig, "text_config": Qwen2_5_VL_MergeTextConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        text_config: "dict | Qwen2_5_VL_MergeTextConfig | None" = None,
        vision_config: "dict | Qwen2_5_VL_MergeVisionConfig | None" = None,
        image_token_id: int = 151655,
        video_token_id: int = 151656,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        **kwargs,
    ):
        flat = {name: kwargs.pop(name) for name in list(kwargs) if name in TEXT_FIELDS}
        if isinstance(text_config, PretrainedConfig):
            text_config = text_config.to_dict()
        # A save by the original has both forms, and `tie_word_embeddings` only in the nested one: nested wins.
        text_config = {**flat, **(text_config or {})}
        text_config.pop("model_type", None)
        self.text_config = Qwen2_5_VL_MergeTextConfig(**text_config)
        if isinstance(vision_config, PretrainedConfig):
            vision_config = vision_config.to_dict()
        vision_config = {"out_hidden_size2": self.text_config.hidden_size, **(vision_config or {})}
        vision_config.pop("model_type", None)
        self.vision_config = Qwen2_5_VL_MergeVisionConfig(**vision_config)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id
        super().__init__(tie_word_embeddings=self.text_config.tie_word_embeddings, **kwargs)
        self.auto_map = dict(AUTO_MAP)

    def __getattr__(self, name: str):
        # Reached only for what the top level itself does not have.
        if name in TEXT_FIELDS and "text_config" in self.__dict__:
            return getattr(self.text_config, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value) -> None:
        if name in TEXT_FIELDS and "text_config" in self.__dict__:
            setattr(self.text_config, name, value)
        else:
            super().__setattr__(name, value)

    def to_dict(self) -> dict:
        """The layout of the disk: text fields flat, `rope_scaling` of type mrope, `vision_config` nested."""
        output = super().to_dict()
        text = output.pop("text_config")
        output.update({name: text[name] for name in TEXT_FIELDS})
        rope_scaling = dict(output["rope_scaling"])
        if rope_scaling["rope_type"] == "default":
            rope_scaling = {"type": "mrope", "mrope_section": rope_scaling["mrope_section"]}
        output["rope_scaling"] = rope_scaling
        with_torch_dtype(output, output["vision_config"])
        output["vision_config"].pop("torch_dtype", None)  # from_pretrained sets it on each part; the top level has it
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write `config.json`, and beside it the code that its `auto_map` names, and what that code imports.

        A checkpoint then loads in a transformers that does not know the architecture (`trust_remote_code=True`).
        """
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for module in _CODE:
            source, target = Path(__file__).with_name(f"{module}.py"), Path(save_directory, f"{module}.py")
            if source.exists() and not (target.exists() and target.samefile(source)):
                target.unlink(missing_ok=True)  # it may be a link into a cache
                shutil.copyfile(source, target)


__all__ = ["Qwen2_5_VL_MergeConfig", "Qwen2_5_VL_MergeTextConfig", "Qwen2_5_VL_MergeVisionConfig"]
