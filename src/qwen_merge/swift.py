"""ms-swift 3.12 learns this kit's architectures, from outside and without a patched file.

    swift sft --custom_register_path examples/simple_vl/register.py --model GRAFT …

A checkpoint's architecture then says which model it is; `--model_type` is not needed. What is registered:

- the models `qwen_merge_graft` and `qwen2_5_vl_merge`, each with its freeze groups: vision tower, aligner (the
  projector) and LLM, to which the head belongs;
- the templates `qwen_merge_graft` and `qwen_merge`. Both are the ChatML of this kit's checkpoints, without a system
  prompt and with answers as the rows have them (no empty thought is put in front). Both take the numbers of the picture
  tokens from the checkpoint and count. ms-swift's own template has Qwen's numbers (151655, 151656) in its code: with
  any other vocabulary placeholders stay one token long, and training goes on with pictures that are scattered over
  nothing.
  `--model_type qwen2_5_vl --template qwen_merge` is for checkpoints of the stock architecture.
"""

from typing import Any

from PIL import Image
from swift.llm import (
    ModelMeta,
    MultiModelKeys,
    Template,
    get_model_tokenizer_with_flash_attn,
    register_model,
    register_model_arch,
    register_template,
)
from swift.llm.model.model.qwen import get_model_tokenizer_qwen2_5_vl
from swift.llm.model.patcher import patch_get_input_embeddings
from swift.llm.template.template.qwen import Qwen2_5VLTemplate, QwenTemplateMeta
from swift.utils import get_env_args

from qwen_merge.architecture import register as register_architectures

GRAFT, MERGE, STOCK = "qwen_merge_graft", "qwen2_5_vl_merge", "qwen2_5_vl"
TEMPLATE = "qwen_merge"


class QwenMergeTemplate(Qwen2_5VLTemplate):
    """Qwen2.5-VL's template with the checkpoint's own tokens, counted."""

    def init_processor(self, processor) -> None:
        if processor is not None and not self._processor_inited:
            config = processor.model_info.config
            self.image_token_id, self.video_token_id = config.image_token_id, config.video_token_id
            self.placeholder_tokens = [self.image_token_id, self.video_token_id]  # the class's is written to
        super().init_processor(processor)

    def _encode(self, inputs) -> dict[str, Any]:
        return self.counted(super()._encode(inputs))

    def counted(self, encoded: dict[str, Any]) -> dict[str, Any]:
        """The same.

        Raises:
            ValueError: not as many placeholders as the pictures or videos have features.
        """
        for kind, token in (("image", self.image_token_id), ("video", self.video_token_id)):
            grids = encoded.get(f"{kind}_grid_thw")
            features = 0 if grids is None else sum(self.tokens(grid) for grid in grids)
            found = encoded["input_ids"].count(token)
            if found != features:
                raise ValueError(
                    f"the text has {found} placeholders for {kind}s (token {token}), and its {kind}s have {features} "
                    "features. Is a placeholder written out in a message, or the template that of another checkpoint?"
                )
        return encoded

    def tokens(self, grid) -> int:
        return int(grid.prod()) // self.processor.image_processor.merge_size**2

    def _post_encode(self, model, inputs: dict[str, Any]) -> dict[str, Any]:
        """This kit's models take pictures themselves, and count again.

        A batch of texts alone gets the features of a grey picture, times 0: every rank then gathers the same weights,
        and the projector has gradients where nothing else trains.
        """
        if self.config.model_type == STOCK:
            return super()._post_encode(model, inputs)
        if not self.is_training or "pixel_values" in inputs or "pixel_values_videos" in inputs:
            return inputs
        grey = self.processor.image_processor(images=[Image.new("RGB", (56, 56), (128, 128, 128))], return_tensors="pt")
        whole = self.get_base_model(model).model
        embeddings = whole.get_input_embeddings()(inputs["input_ids"])
        patches = grey["pixel_values"].to(embeddings.device, whole.visual.dtype)
        features = whole.picture_features(patches, grey["image_grid_thw"].to(embeddings.device))
        return {"inputs_embeds": embeddings + 0 * features.mean().to(embeddings.dtype)}

    def _data_collator(self, batch, *, padding_to=None) -> dict[str, Any]:
        collated = super()._data_collator(batch, padding_to=padding_to)
        if not self.padding_free:  # said of a batch of one, too, which is no packed row
            for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
                collated.pop(name, None)
        return collated


class QwenMergeGraftTemplate(QwenMergeTemplate):
    """Pictures are cut by the graft's own processor, whatever its tower.

    MAX_PIXELS and MIN_PIXELS make them smaller than the checkpoint says, never larger: a server has memory for the
    checkpoint's own size, and what is trained must be what is served.
    """

    def init_env_args(self) -> None:
        super().init_env_args()
        largest = self.processor.image_processor.size["longest_edge"]
        asked = {name: get_env_args(name, int, None) for name in ("min_pixels", "max_pixels")}
        self.bounds = {name: min(value, largest) for name, value in asked.items() if value is not None}

    def replace_tag(self, media_type, index, inputs) -> list[str]:
        if media_type != "image":
            raise ValueError(f"a graft is trained on pictures and texts here; a message has a {media_type}")
        names = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
        if self.mode == "vllm":
            inputs.mm_processor_kwargs.update(self.bounds)
        return ["".join(self.tokenizer.convert_ids_to_tokens([getattr(self.config, name) for name in names]))]

    def _encode(self, inputs) -> dict[str, Any]:
        encoded = Template._encode(self, inputs)
        if inputs.videos:
            raise ValueError("a graft is trained on pictures and texts here; a message has a video")
        if inputs.images:
            pictures = self.processor.image_processor(images=inputs.images, return_tensors="pt", **self.bounds)
            counts = [self.tokens(grid) for grid in pictures["image_grid_thw"]]
            places = [at for at, token in enumerate(encoded["input_ids"]) if token == self.image_token_id]
            parts = (encoded["input_ids"], encoded["labels"], encoded.get("loss_scale"), places[: len(counts)])
            encoded["input_ids"], encoded["labels"], encoded["loss_scale"] = self._extend_tokens(
                *parts, lambda number: [self.image_token_id] * counts[number]
            )
            encoded.update(pictures)
        return self.counted(encoded)

    def tokens(self, grid) -> int:
        return self.processor.image_processor.tokens(grid)


def load_graft(model_dir: str, *args, **kwargs):
    """(model or None, processor) as ms-swift asks for them: the installed package's, not the checkpoint's code."""
    from transformers import AutoProcessor

    from qwen_merge.architecture.configuration_qwen_merge_graft import QwenMergeGraftConfig
    from qwen_merge.architecture.modeling_qwen_merge_graft import QwenMergeGraftForConditionalGeneration

    kwargs["automodel_class"] = kwargs.get("automodel_class") or QwenMergeGraftForConditionalGeneration
    if kwargs.get("model_config") is None:
        kwargs["model_config"] = QwenMergeGraftConfig.from_pretrained(model_dir)
    processor = AutoProcessor.from_pretrained(model_dir, trust_remote_code=False)
    model, _ = get_model_tokenizer_with_flash_attn(model_dir, *args, **{**kwargs, "tokenizer": processor.tokenizer})
    if model is not None and hasattr(model.model.visual, "patch_embed"):
        # Whose results get gradients where a tower is checkpointed; Qwen's towers do not say it themselves.
        patch_get_input_embeddings(model.model.visual, "patch_embed")
    return model, processor


def load_merge(model_dir: str, *args, **kwargs):
    """(model or None, processor) as ms-swift asks for them."""
    from qwen_merge.architecture.configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeConfig
    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import Qwen2_5_VL_MergeForConditionalGeneration

    kwargs["automodel_class"] = kwargs.get("automodel_class") or Qwen2_5_VL_MergeForConditionalGeneration
    if kwargs.get("model_config") is None:
        kwargs["model_config"] = Qwen2_5_VL_MergeConfig.from_pretrained(model_dir)
    return get_model_tokenizer_qwen2_5_vl(model_dir, *args, **kwargs)


def register() -> None:
    """Everything at once; called once a process, by the file that `--custom_register_path` names."""
    register_architectures()
    language_model = ["model.language_model", "lm_head"]
    register_model_arch(
        MultiModelKeys(GRAFT, language_model=language_model, aligner="model.projector", vision_tower="model.visual")
    )
    for name, kind in ((TEMPLATE, QwenMergeTemplate), (GRAFT, QwenMergeGraftTemplate)):
        register_template(QwenTemplateMeta(name, default_system=None, template_cls=kind))
    for name, template, load, arch, architecture in (
        (GRAFT, GRAFT, load_graft, GRAFT, "QwenMergeGraftForConditionalGeneration"),
        (MERGE, TEMPLATE, load_merge, "qwen2_vl", "Qwen2_5_VL_MergeForConditionalGeneration"),
    ):
        meta = {"is_multimodal": True, "tags": ["vision"], "requires": ["transformers>=4.52"]}
        register_model(ModelMeta(name, [], template, load, model_arch=arch, architectures=[architecture], **meta))
