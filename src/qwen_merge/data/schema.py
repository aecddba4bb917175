"""The record format: a conversation and its pictures, as LLaMA-Factory reads ShareGPT sets from parquet.

    qwen-merge data convert writes it, LLaMA-Factory reads it

`images` has the storage form of Hugging Face's `Image` (bytes and path) without its feature metadata in the file: with
that, LLaMA-Factory's loader decodes every picture and encodes it anew; without it the bytes come through untouched.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

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
    """Records as an Arrow table of SCHEMA; at most 2 GB of them (Arrow's 32-bit offsets)."""
    records = list(records)
    return pa.Table.from_arrays(
        [
            pa.array([record.messages for record in records], SCHEMA.field("messages").type),
            pa.array(
                [[{"bytes": data, "path": None} for data in record.images] for record in records],
                SCHEMA.field("images").type,
            ),
        ],
        schema=SCHEMA,
    )
