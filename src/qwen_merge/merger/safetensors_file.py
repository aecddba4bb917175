"""Headers of safetensors files: which tensor lies at which bytes.

The format: 8 bytes with the header's length N (little endian), N bytes of JSON, then the tensors without gaps. The
safetensors library gives tensors; a merge needs only where their bytes are, so it reads the header itself. Everything
that a broken download can do to a file is found here, before anything is written.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qwen_merge.errors import UserError

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the library's own limit; a larger one means that this is no safetensors file


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are: [start, end) of `file`, row major, little endian."""

    dtype: str  # safetensors' name: "BF16", "F16", "F32", ...
    shape: tuple[int, ...]
    file: str  # name inside its checkpoint
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file in the order of their bytes.

    Raises:
        UserError: the file is cut short, is longer than it says, or is not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise UserError(f"{path} ({size:,} bytes) is not a safetensors file. Copy or download it again.")
        if 8 + length > size:
            raise UserError(_cut_short(path, size, f"its header alone is {8 + length:,}"))
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(entry, path, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: the safetensors header cannot be read ({error}). Copy or download it again."
        ) from None

    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 8 + length
    for name, tensor in tensors.items():
        expected = math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0)
        if tensor.dtype in ITEM_BYTES and tensor.nbytes != expected:
            raise UserError(
                f"{path}: tensor {name} of shape {list(tensor.shape)} and dtype {tensor.dtype} takes {expected:,} "
                f"bytes, the header says {tensor.nbytes:,}. Copy or download the file again."
            )
        if tensor.start != position:
            raise UserError(
                f"{path}: tensor {name} starts at byte {tensor.start:,}, the one before it ends at {position:,}. "
                "Copy or download the file again."
            )
        position = tensor.end
    if position > size:
        raise UserError(_cut_short(path, size, f"its header promises {position:,}"))
    if position < size:
        raise UserError(
            f"{path} has {size:,} bytes, its header accounts for {position:,}. Copy or download the file again."
        )
    return tensors


def _stored(entry: dict, path: Path, data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise TypeError(f"{entry} is no tensor's")
    return StoredTensor(dtype, shape, path.name, data_start + start, data_start + end)


def _cut_short(path: Path, size: int, promise: str) -> str:
    return f"{path} is cut short: it has {size:,} bytes, {promise}. Copy or download it again."


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """Return the bytes before the first tensor, and the length of the whole file.

    tensors: (name, dtype, shape) in the order of their bytes. The header is padded with spaces to a multiple of 8,
    as the library does, and marked `{"format": "pt"}`, without which transformers refuses a file.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + position
