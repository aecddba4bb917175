"""Qwen2_5_VL_Merge for transformers 4.52 and 4.57: Qwen3 that sees through Qwen2.5-VL's vision tower.

The three modules beside this one import transformers by absolute names only, so the same files serve three times: here,
as the overlay's new folder inside transformers, and as the code that travels with a checkpoint (`auto_map`).
"""

from pathlib import Path

CODE_FILES = tuple(
    Path(__file__).with_name(f"{stem}_qwen2_5_vl_merge.py") for stem in ("configuration", "vision", "modeling")
)


def register() -> None:
    """Make the Auto classes of this process know `qwen2_5_vl_merge`; safe to call again.

    Does nothing where the overlay is applied: then transformers itself knows the architecture.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForVision2Seq
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if "qwen2_5_vl_merge" in CONFIG_MAPPING_NAMES:
        return
    from qwen_merge.architecture.configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeConfig
    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import (
        Qwen2_5_VL_MergeForConditionalGeneration,
        Qwen2_5_VL_MergeModel,
    )

    AutoConfig.register("qwen2_5_vl_merge", Qwen2_5_VL_MergeConfig, exist_ok=True)
    AutoModel.register(Qwen2_5_VL_MergeConfig, Qwen2_5_VL_MergeModel, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForVision2Seq):
        auto_class.register(Qwen2_5_VL_MergeConfig, Qwen2_5_VL_MergeForConditionalGeneration, exist_ok=True)
