"""Pictures, videos and texts for a graft: as many placeholders as the projector gives tokens.

A picture becomes patches row by row, whatever the tower: `pixel_values` (patches, channels * frames * side * side) and
`image_grid_thw` (pictures, 3), as Qwen's models have them, so that collators and servers treat all grafts alike. Videos
likewise, `pixel_values_videos` and `video_grid_thw`, for the towers of Qwen's VLMs.
"""

from typing import Any

import numpy
import transformers
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
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
            None: any size from `min_pixels` to `max_pixels`, rounded to the factor, at least one token.
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
                time, rows, columns = (int(number) for number in one["image_grid_thw"][0])
                self._grid = time, rows, columns
            return self._grid
        rows, columns = self._target(height, width, self.size)
        return 1, rows // self.patch_size, columns // self.patch_size

    def _target(self, height: int, width: int, size: dict[str, int]) -> tuple[int, int]:
        bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        factor = self.patch_size * self.factor
        height, width = max(height, factor), max(width, factor)  # a short side is made as long, as in training
        height, width = (max(factor, side) for side in smart_resize(height, width, factor=factor, **bounds))
        if min(height, width) == factor and height * width > bounds["max_pixels"]:
            # Of a long picture the short side was rounded down to nothing; transformers 4.57 leaves the other as it is.
            longest = max(factor, bounds["max_pixels"] // factor // factor * factor)
            return min(height, longest), min(width, longest)
        return height, width

    def of_videos(self, videos, return_tensors=None, **bounds) -> BatchFeature:
        """Videos, each its frames -> `pixel_values_videos` (patches, ...) and `video_grid_thw` (videos, 3).

        bounds: `min_pixels` and `max_pixels` of a frame.

        Raises:
            ValueError: the tower takes pictures.
        """
        if self.temporal_patch_size == 1:
            raise ValueError("this graft's tower takes pictures and no videos: give a video's frames as images")
        names = (
            "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
            "patch_size", "temporal_patch_size", "do_convert_rgb",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        edges = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
        values["size"] = {edge: bounds.get(name) or self.size[edge] for edge, name in edges.items()}
        made = [self._preprocess(list(frames), **values, data_format=ChannelDimension.FIRST) for frames in videos]
        patches, grids = zip(*made, strict=True)
        features = {"pixel_values_videos": numpy.concatenate(patches), "video_grid_thw": numpy.array(grids)}
        return BatchFeature(features, tensor_type=return_tensors)

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
        array, layout = _array(image)
        height, width = get_image_size(array, channel_dim=layout)
        target = self._target(height, width, size)
        return resize(array, size=target, resample=self.resample, input_data_format=layout)

    def _of_the_tower(self, images):
        if not hasattr(self, "_own"):
            settings = dict(self.tower_processor or {})
            self._own = image_processor_class(settings.pop("image_processor_type"))(**settings)
        images = images if isinstance(images, (list, tuple)) else [images]
        arrays = [_array(image) for image in images]
        made = [self._own(array, return_tensors="np", input_data_format=layout) for array, layout in arrays]
        return [pixels for one in made for pixels in one["pixel_values"]]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for made_when_needed in ("_own", "_grid"):
            output.pop(made_when_needed, None)
        return {**output, "auto_map": dict(AUTO_MAP)}


def image_processor_class(name: Any) -> type[BaseImageProcessor]:
    """One of transformers' slow image processors, which give arrays.

    Raises:
        ValueError: another thing that transformers has under that name. A checkpoint's file says it, and some of them
            load and run what they are told.
    """
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.endswith("ImageProcessor") else None
    if not (isinstance(kind, type) and issubclass(kind, BaseImageProcessor)):
        raise ValueError(
            f"image_processor_type is {name!r}; expected one of transformers' image processors, such as "
            "SiglipImageProcessor"
        )
    return kind


def _array(image) -> tuple[numpy.ndarray, ChannelDimension]:
    """A picture's pixels, and where its channels are: of a picture 3 pixels high the shape does not say it."""
    array = to_numpy_array(convert_to_rgb(image))
    return array, ChannelDimension.LAST if hasattr(image, "convert") else infer_channel_dimension_format(array)


class QwenMergeGraftProcessor(ProcessorMixin):
    """Texts in which each `<|image_pad|>` stands for a picture, and the pictures in the same order; videos likewise.

    timestamps: a video is written frame by frame, each behind its time (Qwen3-VL), instead of as one row of tokens.
    """

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
        timestamps=False,
        **kwargs,
    ):
        self.timestamps = timestamps
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
        fps=2.0,
        **kwargs,
    ) -> BatchFeature:
        """`text` with placeholders, `images` and `videos` -> input_ids, attention_mask, pixel_values, image_grid_thw,
        pixel_values_videos, video_grid_thw, second_per_grid_ts (seconds of a patch of frames).

        videos: one or several, each its frames: a list of pictures, or an array (frames, ...). fps: how many of these
        frames are a second, of all videos or of each.

        Raises:
            ValueError: not as many placeholders as pictures or videos; videos for a tower of pictures; audio.
        """
        if audio is not None:
            raise ValueError("a graft's processor takes pictures, videos and texts, no audio")
        seen = {}
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        bounds = {name: value for name, value in bounds.items() if value is not None}
        check_places(text, images, self.image_token)
        if not _none(images):
            if isinstance(images, (list, tuple)):
                images = [own for own in images if not _none(own)]
            seen.update(self.image_processor(images=images, return_tensors=return_tensors, **bounds))
        videos = None if _none(videos) else videos
        if videos is not None:
            videos = one_by_one(videos)
            seen.update(self.image_processor.of_videos(videos, return_tensors, **bounds))
            rates = list(fps) if isinstance(fps, (list, tuple)) else [fps] * len(videos)
            seen["second_per_grid_ts"] = [self.image_processor.temporal_patch_size / rate for rate in rates]
        if text is None:
            return BatchFeature(seen, tensor_type=return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        pictures = [self.image_token * self.image_processor.tokens(grid) for grid in seen.get("image_grid_thw", ())]
        texts = expanded(texts, self.image_token, pictures, "pictures")
        if self.timestamps and videos is not None:  # each frame gets a beginning and an end of its own
            whole = f"{self.vision_start_token}{self.video_token}{self.vision_end_token}"
            texts = [part.replace(whole, self.video_token) for part in texts]
        written = []
        if videos is not None:
            shown = zip(seen["video_grid_thw"], map(len, videos), rates, strict=True)
            written = [self._written(*video) for video in shown]
        texts = expanded(texts, self.video_token, written, "videos")
        tokens = self.tokenizer(texts, return_tensors=return_tensors, **kwargs)
        return BatchFeature({**tokens, **seen}, tensor_type=return_tensors)

    def _written(self, grid, frames: int, rate: float) -> str:
        """What stands for a video of so many frames, `rate` of them a second."""
        if not self.timestamps:
            return self.video_token * self.image_processor.tokens(grid)
        time, rows, columns = (int(number) for number in grid)
        length, parts = self.image_processor.temporal_patch_size, []
        tokens = self.video_token * self.image_processor.tokens((1, rows, columns))
        for first in range(0, time * length, length):
            last = min(first + length, frames) - 1  # the last frame fills the last patch
            seconds = (first / rate + last / rate) / 2
            parts.append(f"<{seconds:.1f} seconds>{self.vision_start_token}{tokens}{self.vision_end_token}")
        return "".join(parts)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def to_dict(self, **kwargs) -> dict[str, Any]:
        return {**super().to_dict(**kwargs), "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}

    @property
    def model_input_names(self):
        videos = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        return [*self.tokenizer.model_input_names, "pixel_values", "image_grid_thw", *videos]


def _none(media) -> bool:
    """Whether no picture or video is given."""
    return media is None or (isinstance(media, (list, tuple)) and all(_none(item) for item in media))


def check_places(texts, images, token: str) -> None:
    """Of pictures in a list for each text.

    Raises:
        ValueError: one has not as many places as its list has pictures, and they would go to another text.
    """
    texts = [texts] if isinstance(texts, str) else texts
    lists = isinstance(images, (list, tuple)) and images and all(isinstance(own, (list, tuple)) for own in images)
    if texts is None or not lists or len(texts) != len(images):
        return
    for number, (text, own) in enumerate(zip(texts, images, strict=True)):
        if text.count(token) != len(own):
            raise ValueError(f"text {number} has {text.count(token)} {token}, and its list {len(own)} pictures")


def one_by_one(videos) -> list:
    """Videos, each its frames: of one alone, of a list of them, and of a list for each conversation."""
    if hasattr(videos[0], "convert") or getattr(videos[0], "ndim", 0) == 3:
        return [videos]
    found: list = []
    for video in videos:
        several = isinstance(video, (list, tuple)) and (
            isinstance(video[0], (list, tuple)) or getattr(video[0], "ndim", 0) == 4
        )
        found.extend(video if several else [video])
    return found


def expanded(texts: list[str], token: str, written: list[str], what: str) -> list[str]:
    """`texts` with what is written for each picture, or video, in the place of its `token`.

    Raises:
        ValueError: not as many places.
    """
    found = sum(text.count(token) for text in texts)
    if found != len(written):
        raise ValueError(f"the text has {found} {token} and there are {len(written)} {what}")
    parts, each = [text.split(token) for text in texts], iter(written)
    return [first + "".join(next(each) + piece for piece in rest) for first, *rest in parts]


__all__ = ["QwenMergeGraftImageProcessor", "QwenMergeGraftProcessor"]
