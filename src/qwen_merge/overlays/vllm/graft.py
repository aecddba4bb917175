"""Grafts for vLLM 0.9.1 and 0.12: the architecture's own tower and projector before vLLM's own LLM.

Tower and projector are transformers' modules, whole on every tensor-parallel rank; what is large and runs for every
token, the LLM, is vLLM's. Pictures go through the graft's own processor, so that any size and any tower gives exactly
the tokens that training saw. What is not here is inherited from `model.py`.

Which graft is served how, and what is not: `python tests/support_table.py --help`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, ProcessorMixin
from transformers.modeling_utils import no_init_weights
from vllm.config import VllmConfig
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo, PromptReplacement
from vllm.multimodal.profiling import BaseDummyInputsBuilder

from qwen_merge.architecture.projectors_qwen_merge_graft import projector_of
from qwen_merge.architecture.towers_qwen_merge_graft import features_of, tower_of
from qwen_merge.overlays.vllm import chat, cpu, positions
from qwen_merge.overlays.vllm.model import Qwen2_5_VL_MergeForConditionalGeneration

LLMS = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "qwen2": "Qwen2ForCausalLM"}
LONGEST_SIDE = 200  # times the shorter one, of pictures that Qwen's image processors take


class GraftProcessingInfo(BaseProcessingInfo):
    def get_hf_config(self):
        return self.ctx.get_hf_config(PretrainedConfig)

    def get_hf_processor(self, **_: object):
        """The graft's own; what a request says of its pictures is said at the call."""
        return self.ctx.get_hf_processor(ProcessorMixin)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def largest_picture(self) -> tuple[int, int]:
        """(width, height) in pixels of a picture than which none has more tokens, nor many more patches."""
        config, processor = self.get_hf_config(), self.get_hf_processor().image_processor
        if processor.tower_processor is not None:  # every picture gets the tower's own size
            return (config.vision_config.image_size,) * 2
        side = processor.patch_size * processor.factor
        squares = chat.largest_picture(self.ctx.model_config) // side**2
        rows = range(1, math.isqrt(squares) + 1)
        most = max((r * min(squares // r, LONGEST_SIDE * r), r) for r in rows)[1]
        return min(squares // most, LONGEST_SIDE * most) * side, most * side


class GraftDummyInputsBuilder(BaseDummyInputsBuilder[GraftProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], *_) -> dict[str, Any]:
        width, height = self.info.largest_picture()
        return {"image": self._get_dummy_images(width=width, height=height, num_images=mm_counts.get("image", 0))}


class GraftMultiModalProcessor(BaseMultiModalProcessor[GraftProcessingInfo]):
    def _apply_hf_processor_text_only(self, prompt_text: str, tokenization_kwargs: Mapping | None = None) -> list[int]:
        """Not by the graft's processor, which takes no placeholder without its picture: vLLM has those in its cache."""
        return self.info.get_tokenizer()(prompt_text, **(tokenization_kwargs or {}))["input_ids"]

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        if "image_grid_thw" not in hf_inputs:
            return {}
        patches = hf_inputs["image_grid_thw"].prod(-1)
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", patches),
            "image_grid_thw": MultiModalFieldConfig.batched("image"),
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptReplacement]:
        token = self.info.get_hf_config().image_token_id
        count = self.info.get_hf_processor().image_processor.tokens

        def tokens(number: int) -> list[int]:
            if "image_grid_thw" in out_mm_kwargs:  # vLLM 0.9.1
                grid = out_mm_kwargs["image_grid_thw"][number]
            else:
                grid = out_mm_kwargs["image"][number]["image_grid_thw"].data
            return [token] * count(grid)

        return [PromptReplacement(modality="image", target=[token], replacement=tokens)]


@MULTIMODAL_REGISTRY.register_processor(
    GraftMultiModalProcessor, info=GraftProcessingInfo, dummy_inputs=GraftDummyInputsBuilder
)
class QwenMergeGraftForConditionalGeneration(Qwen2_5_VL_MergeForConditionalGeneration):
    """Tower, projector and LLM side by side, as on the disk; logits are `model.py`'s."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            # as transformers names them in memory
            "model.language_model.": "language_model.model.",
            "model.visual.": "visual.",
            "model.projector.": "projector.",
            # as they are named on the disk
            "lm_head.": "language_model.lm_head.",
            "model.": "language_model.model.",
        }
    )
    supports_encoder_tp_data = False  # vLLM 0.12: each rank runs the whole tower on all pictures

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.config = config
        self.multimodal_config = vllm_config.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = False  # what vLLM 0.12 asks for; it prunes videos
        with no_init_weights():
            self.visual, self.projector = tower_of(config), projector_of(config)
        for parameter in (*self.visual.parameters(), *self.projector.parameters()):
            # Not `.to`, which would round the tower's rotary frequencies as well.
            parameter.data = parameter.data.to(vllm_config.model_config.dtype)
        if config.text_config.model_type == "qwen3_moe":
            cpu.leave_experts_uncompiled(vllm_config)
        self.levels, llm_prefix = None, maybe_prefix(prefix, "language_model")
        if config.deepstack:  # of Qwen3-VL's tower, which came with vLLM 0.12's transformers
            from qwen_merge.overlays.vllm import deepstack

            self.levels = deepstack.Levels(vllm_config, config.deepstack, config.hidden_size)
            self.language_model = deepstack.language_model(vllm_config, llm_prefix)
        else:
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                prefix=llm_prefix,
                hf_config=config.text_config,
                architectures=[LLMS[config.text_config.model_type]],
            )
        if config.mrope_interleaved:
            positions.interleave(self.language_model)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.never_said = (config.image_token_id, config.video_token_id, config.vision_start_token_id)

    def _process_image_input(self, image_input: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Patches and grids of some pictures -> for each its tokens, (tokens, LLM width)."""
        grids = [tuple(grid) for grid in image_input["image_grid_thw"].tolist()]
        patches = image_input["pixel_values"].type(self.visual.dtype)
        tokens = self.projector(features_of(self.visual, patches, grids, self.config), grids)
        return tokens.split([self.config.tokens(grid) for grid in grids])

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings=None, *, is_multimodal=None, **options
    ) -> Tensor:
        """As vLLM 0.12 asks for the embeddings of a step's tokens, (tokens, LLM width)."""
        if self.levels is not None and multimodal_embeddings:
            multimodal_embeddings = self.levels.keep(multimodal_embeddings, is_multimodal)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal, **options)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **inputs):
        if self.levels is None or intermediate_tensors is not None or inputs_embeds is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **inputs)
        return self.levels.run(self.language_model.model, inputs_embeds, input_ids=input_ids, positions=positions)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """As vLLM 0.12 asks for them; 0.9.1 is taught by `positions.hook`."""
        grids = [feature.data["image_grid_thw"].data.tolist() for feature in mm_features if feature.data is not None]
        return positions.number(self.config, input_tokens, grids)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        chat.check_kind(modality)
        return chat.PLACEHOLDERS[modality]

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="projector.", tower_model="visual."
        )
