"""Pictures in the templates `qwen_merge_vl` and `qwen_merge_vl_pt`: as many tokens as the checkpoint's processor says.

Put here by `qwen-merge overlay apply llamafactory`. For `qwen2_5_vl_merge` it is Qwen2-VL's plug-in. A graft's own image
processor says how many tokens a picture has (a resampler's do not follow from its patches), its processor how the
tokens around it are spelled, and its tower how small a picture may be.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from ..extras.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from .mm_plugin import Qwen2VLPlugin


if TYPE_CHECKING:
    from PIL import Image


class QwenMergePlugin(Qwen2VLPlugin):
    def spelling(self, processor: Any) -> tuple[str, str]:
        r"""What stands for a token of a picture, and for one of a video."""
        if not _of_a_graft(processor):
            return self.image_token, self.video_token
        return processor.image_token, processor.video_token

    @override
    def process_messages(self, messages, images, videos, audios, processor) -> list[dict[str, str]]:
        if not _of_a_graft(processor):
            return super().process_messages(messages, images, videos, audios, processor)
        self._validate_input(processor, images, videos, audios)
        self._validate_messages(messages, images, videos, audios)
        messages = deepcopy(messages)
        inputs = self._get_mm_inputs(images, videos, audios, processor) if self.expand_mm_tokens else {}
        names = ("image_grid_thw", "video_grid_thw")
        for name, placeholder, token in zip(names, (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER), self.spelling(processor)):
            grids = iter(inputs.get(name, []))
            for message in messages:
                first, *rest = message["content"].split(placeholder)
                for text in rest:
                    number = processor.image_processor.tokens(next(grids)) if self.expand_mm_tokens else 1
                    first += processor.vision_start_token + token * number + processor.vision_end_token + text
                message["content"] = first
        return messages

    @override
    def _get_mm_inputs(self, images, videos, audios, processor) -> dict[str, Any]:
        if images and _of_a_graft(processor):
            image_processor = processor.image_processor
            least = image_processor.patch_size * image_processor.factor
            bounds = {name: getattr(processor, name) for name in ("image_max_pixels", "image_min_pixels")}
            images = self._regularize_images(images, **bounds)["images"]
            inputs = image_processor([at_least(image, least) for image in images], return_tensors="pt")
            return {**inputs, **super()._get_mm_inputs([], videos, audios, processor)}
        return super()._get_mm_inputs(images, videos, audios, processor)


def _of_a_graft(processor: Any) -> bool:
    return callable(getattr(getattr(processor, "image_processor", None), "tokens", None))


def at_least(image: "Image.Image", side: int) -> "Image.Image":
    r"""The picture, a side of fewer than `side` pixels made as long; Qwen2-VL's plug-in does so for its own 28."""
    if min(image.size) >= side:
        return image
    return image.resize((max(image.width, side), max(image.height, side)))
