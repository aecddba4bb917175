"""The record format: a conversation and its pictures, as LLaMA-Factory reads ShareGPT sets from parquet.

    qwen-merge data convert writes it, LLaMA-Factory reads it

`images` has the storage form of Hugging Face's `Image` (bytes and path) without its feature metadata in the file: with
that, LLaMA-Factory's loader decodes every picture and encodes it anew; without it the bytes come through untouched.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import pyarrow as pa

IMAGE_TAG = "<image>"
USER = "user"
ASSISTANT = "assistant"

SCHEMA = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)


@dataclass
class Record:
    """One sample: `messages` of {"role", "content"}, alternating user and assistant; `images` as encoded files.

    The number of `<image>` tags in the messages equals the number of images.
    """

    messages: list[dict[str, str]]
    images: list[bytes] = field(default_factory=list)

    @property
    def payload(self) -> int:
        """Bytes of text and pictures: what the record takes in a shard, but for a few bytes of lengths."""
        return sum(len(m["role"]) + len(m["content"].encode()) for m in self.messages) + sum(map(len, self.images))


def table(records: Iterable[Record]) -> pa.Table:
    """Records as an Arrow table of SCHEMA; at most 2 GB of them (Arrow's 32-bit offsets).

    Put together from buffers: `pa.array` of Python lists imports pandas, a second of a worker's start.
    """
    records = list(records)
    messages = [message for record in records for message in record.messages]
    pictures = [data for record in records for data in record.images]
    message, picture = SCHEMA.field("messages").type, SCHEMA.field("images").type
    role = _texts(pa.string(), [message["role"].encode() for message in messages])
    content = _texts(pa.string(), [message["content"].encode() for message in messages])
    path = pa.nulls(len(pictures), pa.string())
    return pa.Table.from_arrays(
        [
            _lists(message, [len(record.messages) for record in records], [role, content]),
            _lists(picture, [len(record.images) for record in records], [_texts(pa.binary(), pictures), path]),
        ],
        schema=SCHEMA,
    )


def _texts(kind: pa.DataType, values: list[bytes]) -> pa.Array:
    buffers = [None, _offsets(map(len, values)), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(kind, len(values), buffers)


def _lists(kind: pa.ListType, lengths: list[int], fields: list[pa.Array]) -> pa.Array:
    """Lists of structs with these fields."""
    structs = pa.Array.from_buffers(kind.value_type, len(fields[0]), [None], children=fields)
    return pa.Array.from_buffers(kind, len(lengths), [None, _offsets(lengths)], children=[structs])


def _offsets(lengths: Iterable[int]) -> pa.Buffer:
    return pa.py_buffer(array("i", accumulate(lengths, initial=0)))
