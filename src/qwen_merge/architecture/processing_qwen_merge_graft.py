"""Pictures and texts for a graft: as many placeholders as the projector gives tokens.

A picture becomes patches row by row, whatever the tower: `pixel_values` (patches, channels * frames * side * side) and
`image_grid_thw` (pictures, 3), as Qwen's models have them, so that collators and servers treat all grafts alike.
"""

from typing import Any

import transformers
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_transforms import convert_to_rgb, resize
from transformers.image_utils import (
    ChannelDimension,
    get_image_size,
    infer_channel_dimension_format,
    to_numpy_array,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

AUTO_MAP = {
    "AutoImageProcessor": "processing_qwen_merge_graft.QwenMergeGraftImageProcessor",
    "AutoProcessor": "processing_qwen_merge_graft.QwenMergeGraftProcessor",
}


class QwenMergeGraftImageProcessor(Qwen2VLImageProcessor):
    """Qwen2-VL's image processor with rows of patches, or the tower's own one where pictures have one size.

    Args:
        merge_size: patches on the side of a token.
        factor: patches whose multiples the sides of a picture become.
        queries: tokens of a frame where they do not follow from its patches (resampler).
        tower_processor: the tower's own settings, `image_processor_type` among them; then every picture gets its size.
            None: any size from `min_pixels` to `max_pixels`, rounded to the factor.
    """

    def __init__(
        self, factor: int = 2, queries: int | None = None, tower_processor: dict[str, Any] | None = None, **kwargs
    ):
        super().__init__(**kwargs)
        self.factor, self.queries, self.tower_processor = factor, queries, tower_processor

    def tokens(self, grid) -> int:
        """How many tokens a picture of `grid` (frames, rows and columns of patches) has."""
        time, rows, columns = (int(number) for number in grid)
        return time * (self.queries or rows // self.merge_size * (columns // self.merge_size))

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """The grid of a picture of so many pixels, without the picture."""
        if self.tower_processor is not None:
            if not hasattr(self, "_grid"):  # the same for all
                one = self(images=[Image.new("RGB", (width, height))])
                self._grid = tuple(int(number) for number in one["image_grid_thw"][0])
            return self._grid
        rows, columns = self._target(height, width, self.size)
        return 1, rows // self.patch_size, columns // self.patch_size

    def _target(self, height: int, width: int, size: dict[str, int]) -> tuple[int, int]:
        bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        factor = self.patch_size * self.factor
        if min(height, width) < factor:  # transformers 4.57 would take it
            raise ValueError(f"height:{height} and width:{width} must be larger than factor:{factor}")
        return smart_resize(height, width, factor=factor, **bounds)

    def _preprocess(self, images, **kwargs):
        """One picture, or the frames of a video, to patches row by row and their grid."""
        kwargs["merge_size"] = 1  # rows, not squares
        if self.tower_processor is not None:
            side = self.patch_size
            pixels = [
                array[:, : array.shape[1] // side * side, : array.shape[2] // side * side]
                for array in self._of_the_tower(images)
            ]  # what is left of a patch the tower leaves out, too
            plain = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_convert_rgb": False}
            return super()._preprocess(pixels, **{**kwargs, **plain, "input_data_format": ChannelDimension.FIRST})
        images = images if isinstance(images, (list, tuple)) else [images]
        size = kwargs.get("size") or self.size
        resized = [self._resized(image, size) if kwargs.get("do_resize", True) else image for image in images]
        return super()._preprocess(resized, **{**kwargs, "do_resize": False})

    def _resized(self, image, size: dict[str, int]):
        array = to_numpy_array(convert_to_rgb(image))
        layout = ChannelDimension.LAST if hasattr(image, "convert") else infer_channel_dimension_format(array)
        height, width = get_image_size(array, channel_dim=layout)
        target = self._target(height, width, size)
        return resize(array, size=target, resample=self.resample, input_data_format=layout)

    def _of_the_tower(self, images):
        if not hasattr(self, "_own"):
            settings = dict(self.tower_processor or {})
            self._own = getattr(transformers, settings.pop("image_processor_type"))(**settings)
        images = images if isinstance(images, (list, tuple)) else [images]
        return list(self._own(images=[convert_to_rgb(image) for image in images], return_tensors="np")["pixel_values"])

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for made_when_needed in ("_own", "_grid"):
            output.pop(made_when_needed, None)
        return {**output, "auto_map": dict(AUTO_MAP)}


class QwenMergeGraftProcessor(ProcessorMixin):
    """Texts in which each `<|image_pad|>` stands for a picture, and the pictures in the same order."""

    attributes = ["image_processor", "tokenizer"]
    valid_kwargs = ["chat_template"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        **kwargs,
    ):
        self.image_token, self.video_token = image_token, video_token
        self.vision_start_token, self.vision_end_token = vision_start_token, vision_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token) if tokenizer is not None else None
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        return_tensors=None,
        min_pixels=None,
        max_pixels=None,
        **kwargs,
    ) -> BatchFeature:
        """`text` with placeholders and `images` -> input_ids, attention_mask, pixel_values, image_grid_thw.

        Raises:
            ValueError: not as many placeholders as pictures; videos or audio.
        """
        if videos is not None or audio is not None:
            raise ValueError("a graft's processor takes pictures and texts, no videos and no audio")
        pictures = {}
        if images is not None:
            bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
            bounds = {name: value for name, value in bounds.items() if value is not None}
            pictures = self.image_processor(images=images, return_tensors=return_tensors, **bounds)
        if text is None:
            return BatchFeature(dict(pictures), tensor_type=return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        grids = list(pictures.get("image_grid_thw", ()))
        found = sum(part.count(self.image_token) for part in texts)
        if found != len(grids):
            raise ValueError(f"the text has {found} {self.image_token} and there are {len(grids)} pictures")
        counts = iter([self.image_processor.tokens(grid) for grid in grids])
        expanded = []
        for part in texts:
            first, *rest = part.split(self.image_token)
            expanded.append(first + "".join(self.image_token * next(counts) + piece for piece in rest))
        tokens = self.tokenizer(expanded, return_tensors=return_tensors, **kwargs)
        return BatchFeature({**tokens, **pictures}, tensor_type=return_tensors)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def to_dict(self, **kwargs) -> dict[str, Any]:
        return {**super().to_dict(**kwargs), "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}

    @property
    def model_input_names(self):
        return [*self.tokenizer.model_input_names, "pixel_values", "image_grid_thw"]


__all__ = ["QwenMergeGraftImageProcessor", "QwenMergeGraftProcessor"]
