"""From a plan to files: which tensor goes to which shard, under the names and with the index transformers expects."""

import json
import re
from dataclasses import dataclass

from qwen_merge.errors import UserError
from qwen_merge.merger.plan import PlannedTensor
from qwen_merge.merger.safetensors_file import ITEM_BYTES, encode_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """One output file: its first bytes, its tensors in the order of their bytes, its length."""

    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    nbytes: int


def parse_size(text: str) -> int:
    """Bytes of "5GB" (decimal, as in transformers), "4GiB", "300MB" or a plain number.

    Raises:
        UserError: anything else, and zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or float(match[1]) * unit < 1:
        raise UserError(f"--max-shard-size is {text!r}; expected a number and a unit, such as 5GB, 4GiB or 300MB")
    return int(float(match[1]) * unit)


def split_shards(tensors: list[PlannedTensor], max_shard_bytes: int) -> list[Shard]:
    """Fill shards in order; a tensor larger than the limit gets a shard of its own.

    Inside a shard wider dtypes come first, so that every tensor starts at a multiple of its item size.
    """
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    shards = []
    for number, group in enumerate(groups, start=1):
        ordered = sorted(group, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
        name = SINGLE_NAME if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, nbytes = encode_header((tensor.name, tensor.dtype, tensor.shape) for tensor in ordered)
        shards.append(Shard(name, header, tuple(ordered), nbytes))
    return shards


def index_json(shards: list[Shard]) -> str | None:
    """The index of several shards; None for a single file, which needs none."""
    if len(shards) == 1:
        return None
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"
