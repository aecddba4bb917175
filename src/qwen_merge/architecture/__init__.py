"""Qwen2_5_VL_Merge for transformers 4.52 and 4.57: Qwen3 that sees through Qwen2.5-VL's vision tower.

The three modules beside this one import transformers by absolute names only, so the same files serve three times: here,
as the overlay's new folder inside transformers, and as the code that travels with a checkpoint (`auto_map`).
"""

from pathlib import Path

from qwen_merge.architecture.kinds_qwen_merge_graft import CODE


def _files(architecture: str, *parts: str) -> tuple[Path, ...]:
    return tuple(Path(__file__).with_name(f"{part}_{architecture}.py") for part in parts)


CODE_FILES = _files("qwen2_5_vl_merge", "configuration", "vision", "modeling")
GRAFT_CODE_FILES = tuple(Path(__file__).with_name(f"{module}.py") for module in CODE)


def register() -> None:
    """Make the Auto classes of this process know both architectures; safe to call again.

    Leaves out what transformers itself knows: `qwen2_5_vl_merge` where the overlay is applied.
    """
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from qwen_merge.architecture.configuration_qwen_merge_graft import QwenMergeGraftConfig
    from qwen_merge.architecture.modeling_qwen_merge_graft import (
        QwenMergeGraftForConditionalGeneration,
        QwenMergeGraftModel,
    )
    from qwen_merge.architecture.processing_qwen_merge_graft import (
        QwenMergeGraftImageProcessor,
        QwenMergeGraftProcessor,
    )

    _register_model(QwenMergeGraftConfig, QwenMergeGraftModel, QwenMergeGraftForConditionalGeneration)
    AutoImageProcessor.register(
        QwenMergeGraftConfig, slow_image_processor_class=QwenMergeGraftImageProcessor, exist_ok=True
    )
    AutoProcessor.register(QwenMergeGraftConfig, QwenMergeGraftProcessor, exist_ok=True)
    if "qwen2_5_vl_merge" in CONFIG_MAPPING_NAMES:
        return
    from qwen_merge.architecture.configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeConfig
    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import (
        Qwen2_5_VL_MergeForConditionalGeneration,
        Qwen2_5_VL_MergeModel,
    )

    _register_model(Qwen2_5_VL_MergeConfig, Qwen2_5_VL_MergeModel, Qwen2_5_VL_MergeForConditionalGeneration)


def _register_model(config: type, model: type, for_generation: type) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForVision2Seq

    AutoConfig.register(config.model_type, config, exist_ok=True)  # type: ignore[attr-defined]
    AutoModel.register(config, model, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForVision2Seq):
        auto_class.register(config, for_generation, exist_ok=True)
