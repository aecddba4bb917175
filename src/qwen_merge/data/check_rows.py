"""One row as LLaMA-Factory sees it: would it be dropped, would it stop the run, how many tokens does it become.

    qwen-merge data check STAGE.yaml

LLaMA-Factory's own converter, template and encoder are called on the row. One thing of theirs is left out: a picture's
pixels are resized but not turned into patches, only counted, which saves most of the time; the first pictures of every
process go through the real image processor too, and a difference is an error.
"""

import copy
import functools
import io
import json
import warnings
from dataclasses import dataclass, field
from typing import Any

from qwen_merge.data import check_recipe

CONTROLS = 4  # rows a process encodes twice, the second time with the real image processor

# Reasons. The first group's rows are left out by LLaMA-Factory with a warning; the second's end the run.
NO_TURNS = "no messages"
NOT_ALTERNATING = "roles do not alternate"
ODD = "no answer at the end: an odd number of messages"
LEFT_OUT = (NO_TURNS, NOT_ALTERNATING, ODD)
NO_TEXT = "a message without text"
TAGS = "<image> tags and pictures differ in number"
OTHER_MEDIA = "a <video> or <audio> tag"
UNDECODABLE = "a picture does not decode"
CUT_PICTURE = "cutoff_len cuts a picture away"
PICTURE_TOKEN = "the text holds the picture's own token"
REFUSED = "LLaMA-Factory refuses the row"


@dataclass
class Picture:
    """As stored: `width` x `height` pixels, `format` and `mode` as Pillow names them, `bytes` of the file."""

    width: int
    height: int
    format: str
    mode: str
    bytes: int


@dataclass
class Row:
    """What was measured. Token counts are None without a tokenizer or when `problems` kept the row from it.

    `tokens`: in training, after the cut at cutoff_len; `full`: before it; `trained`: of `tokens`, those with loss;
    `picture_tokens`: of `full`. `problems`: (reason, what was seen).
    """

    characters: int = 0
    pictures: list[Picture] = field(default_factory=list)
    tokens: int | None = None
    full: int | None = None
    trained: int | None = None
    picture_tokens: int | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)


class Grids:
    """In place of the image processor: the grid of patches that each picture becomes, without the patches."""

    def __init__(self, real: Any):
        self.real = real
        self.counted = 0  # tokens of all pictures since it was last set to 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def _grid(self, image) -> tuple[int, int, int]:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        if hasattr(self.real, "grid"):  # a graft's
            return self.real.grid(image.height, image.width)
        patch, size = self.real.patch_size, self.real.size
        height, width = smart_resize(
            image.height,
            image.width,
            factor=patch * self.real.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return 1, height // patch, width // patch

    def __call__(self, images: list, return_tensors: str | None = None) -> dict:
        import numpy as np

        grids = [self._grid(image) for image in images]
        if hasattr(self.real, "tokens"):
            self.counted += sum(map(self.real.tokens, grids))
        else:
            self.counted += sum(t * h * w for t, h, w in grids) // self.real.merge_size**2
        return {"image_grid_thw": np.array(grids)}


class Encoder:
    """A stage's tokenizer, processor and template, ready to count rows.

    Raises:
        UserError: as check_recipe.load.
    """

    def __init__(self, arguments: check_recipe.Arguments):
        from llamafactory.data.processor import SupervisedDatasetProcessor

        self.tokenizer, processor, self.template = check_recipe.load(arguments)
        self.cutoff = arguments.data.cutoff_len
        whole = copy.copy(arguments.data)
        whole.cutoff_len = 2**31
        counting = copy.copy(processor)
        self.grids = counting.image_processor = Grids(processor.image_processor)
        make = functools.partial(SupervisedDatasetProcessor, template=self.template, tokenizer=self.tokenizer)
        self.whole = make(processor=counting, data_args=whole)
        self.cut = make(processor=counting, data_args=arguments.data)
        self.real = make(processor=processor, data_args=arguments.data)
        self.spelling = self.template.mm_plugin.image_token
        if hasattr(processor.image_processor, "tokens"):  # a graft, whose processor says
            self.spelling = processor.image_token
        self.picture_token = self.tokenizer.convert_tokens_to_ids(self.spelling)
        self.controls = CONTROLS

    def count(self, row: Row, prompt: list, response: list, system: str, tools: str, images: list) -> None:
        """Fill the token counts of `row`. The messages are LLaMA-Factory's, `images` are decoded pictures."""
        from llamafactory.extras.constants import IGNORE_INDEX

        self.grids.counted = 0
        try:
            ids, labels = self.whole._encode_data_example(prompt, response, system, tools, images, [], [])
        except Exception as error:  # whatever its formatters and plug-in stumble over; training would end there
            row.problems.append((REFUSED, f"{type(error).__name__}: {error}"))
            return
        row.full, row.picture_tokens = len(ids), self.grids.counted
        if ids.count(self.picture_token) != row.picture_tokens:
            row.problems.append((PICTURE_TOKEN, self.spelling))
        elif len(ids) > self.cutoff:
            ids, labels = self.cut._encode_data_example(prompt, response, system, tools, images, [], [])
            if ids.count(self.picture_token) != row.picture_tokens:
                seen = f"{ids.count(self.picture_token)} of its {row.picture_tokens} tokens are left"
                row.problems.append((CUT_PICTURE, f"{seen}, so the model would stop"))
        row.tokens, row.trained = len(ids), len(labels) - labels.count(IGNORE_INDEX)
        if images and self.controls:
            self.controls -= 1
            if self.real._encode_data_example(prompt, response, system, tools, images, [], []) != (ids, labels):
                raise RuntimeError("the count of picture tokens differs from the image processor's; this is a bug")


class Reader:
    """Measures rows of one set; `encoder` None: everything but tokens."""

    def __init__(self, attributes: Any, arguments: check_recipe.Arguments | None, encoder: Encoder | None):
        from llamafactory.data.converter import get_dataset_converter
        from llamafactory.hparams import DataArguments

        data = arguments.data if arguments else DataArguments()
        self.attributes, self.encoder = attributes, encoder
        self.convert = get_dataset_converter(attributes.formatting, attributes, data)

    def measure(self, example: dict) -> Row:
        """A row of the parquet file, as `to_pylist` gives it."""
        row = Row()
        if not self._turns_are_sound(example, row):
            return row
        aligned = self.convert(example)
        prompt, response = aligned["_prompt"], aligned["_response"]
        texts = [message["content"] for message in prompt + response]
        row.characters = sum(map(len, texts))
        given = aligned["_images"] or []
        images = [image for number, value in enumerate(given) if (image := self._decode(value, number, row))]
        tags = sum(text.count("<image>") for text in texts)
        if tags != len(given):
            row.problems.append((TAGS, f"{tags} tags, {len(given)} pictures"))
        media = sum(text.count("<video>") + text.count("<audio>") for text in texts)
        if media and not (aligned["_videos"] or aligned["_audios"]):
            row.problems.append((OTHER_MEDIA, next(text for text in texts if "<video>" in text or "<audio>" in text)))
        if aligned["_videos"] or aligned["_audios"]:
            row.problems.append((REFUSED, "videos and sounds are not checked"))
        if not row.problems and self.encoder:
            self.encoder.count(row, prompt, response, aligned["_system"], aligned["_tools"], images)
        return row

    def _turns_are_sound(self, example: dict, row: Row) -> bool:
        """Whether LLaMA-Factory keeps the row and can read its texts. Names why not."""
        if self.attributes.formatting != "sharegpt":
            return True
        tags, messages = self.attributes, example[self.attributes.messages]
        if not messages:
            row.problems.append((NO_TURNS, "the list is empty") if messages is not None else (NO_TEXT, "null"))
            return False
        seen = " ".join(str(message[tags.role_tag]) for message in messages[:12])
        turns = messages[1:] if tags.system_tag and messages[0][tags.role_tag] == tags.system_tag else messages
        asks, answers = (tags.user_tag, tags.observation_tag), (tags.assistant_tag, tags.function_tag)
        if any(turn[tags.role_tag] not in (asks, answers)[index % 2] for index, turn in enumerate(turns)):
            row.problems.append((NOT_ALTERNATING, seen))
        elif len(turns) % 2 or not turns:
            row.problems.append((ODD, seen))
        elif any(not isinstance(turn[tags.content_tag], str) for turn in messages):
            row.problems.append((NO_TEXT, seen))
        return not row.problems

    def _decode(self, value: Any, number: int, row: Row) -> Any:
        """The decoded picture, or None with the reason in `row`."""
        from PIL import Image

        data = value.get("bytes") if isinstance(value, dict) else None
        path = value.get("path") if isinstance(value, dict) else value
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # large, but below Pillow's limit: training takes it too
                image = Image.open(io.BytesIO(data) if data is not None else str(path))
                image.load()
        except Exception as error:  # a broken picture raises whatever its decoder stumbles over
            row.problems.append((UNDECODABLE, f"picture {number + 1}: {type(error).__name__}: {error}"))
            return None
        size = len(data) if data is not None else 0
        row.pictures.append(Picture(image.width, image.height, image.format or "?", image.mode, size))
        return image


@functools.lru_cache(maxsize=1)
def _stage(config: str) -> tuple[check_recipe.Arguments | None, Encoder | None]:
    """A worker's own arguments and encoder, made once."""
    settings = json.loads(config)
    if settings["recipe"] is None:
        return None, None
    arguments, _ = check_recipe.parse(settings["recipe"])
    return arguments, Encoder(arguments) if arguments and settings["count"] else None


def reader_of(unit: dict) -> Reader:
    """The Reader of a unit: {"recipe": the recipe's dict or None, "count": bool, "attributes": of the set, ...}."""
    check_recipe.require_llamafactory()
    from llamafactory.data.parser import DatasetAttr

    arguments, encoder = _stage(json.dumps({"recipe": unit["recipe"], "count": unit["count"]}))
    return Reader(DatasetAttr(**unit["attributes"]), arguments, encoder)


def rows_of(path: str, columns: list[str], groups: list[int], wanted: list[int] | None = None):
    """Yield (number in the file, row) of some row groups, a few rows in memory at a time.

    `groups`: indices of row groups; `wanted`: ascending numbers of rows in the file, None for all.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        starts, start = [], 0
        for index in range(file.num_row_groups):
            starts.append(start)
            start += file.metadata.row_group(index).num_rows
        for group in groups:
            number = starts[group]
            end = number + file.metadata.row_group(group).num_rows
            chosen = None if wanted is None else [row for row in wanted if number <= row < end]
            if chosen == []:
                continue
            for batch in file.iter_batches(batch_size=16, row_groups=[group], columns=columns, use_threads=False):
                keep = range(number, number + len(batch)) if chosen is None else chosen
                for row in keep:
                    if number <= row < number + len(batch):
                        yield row, batch.slice(row - number, 1).to_pylist()[0]
                number += len(batch)
