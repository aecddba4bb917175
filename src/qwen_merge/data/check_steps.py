"""Steps and samples of a training, by the arithmetic of transformers' Trainer and accelerate's sharded loader.

qwen-merge data check STAGE.yaml --world-size 16
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What the overlay of LLaMA-Factory packs itself, over a whole epoch.
PLANNED_TEMPLATES = ("qwen_merge_vl", "qwen_merge_vl_pt")


@dataclass(frozen=True)
class Steps:
    """`samples`: of the data; `global_batch`: samples a step; `per_epoch` and `total`: optimizer steps."""

    samples: int
    global_batch: int
    per_epoch: int
    total: int
    epochs: float


def steps(samples: int, batch: int, accumulation: int, world_size: int, epochs: float, max_steps: int = -1) -> Steps:
    """What `Total optimization steps` will be in the training's log.

    Each process gets ceil(ceil(samples / batch) / world_size) batches (the last ones are filled up from the first
    samples), and a rest of an accumulation is a step of its own.
    """
    batches = math.ceil(math.ceil(samples / batch) / world_size)
    per_epoch = max(batches // accumulation + (batches % accumulation > 0), 1)
    total = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
    seen = total / per_epoch if max_steps > 0 else epochs
    return Steps(samples, batch * accumulation * world_size, per_epoch, total, seen)


def packed_samples(lengths: Iterable[Sequence[int]], cutoff: int) -> int:
    """Samples that LLaMA-Factory's `packing` makes of rows, a sequence of lengths for each batch of its map."""
    from llamafactory.data.processor.processor_utils import greedy_knapsack

    return sum(len(greedy_knapsack([length for length in batch if length <= cutoff], cutoff)) for batch in lengths)


def planned_packs(lengths: Sequence[int], cutoff: int, group: int) -> int:
    """Packs that this kit's overlay plans of rows, with `group` of them taken at a time by all ranks.

    `cutoff`: as LLaMA-Factory has parsed it, one less than the recipe says.
    """
    import numpy as np
    from llamafactory.data.qwen_merge_plan import best_fit, divided

    return len(divided(best_fit(np.array(lengths, dtype=np.int64), cutoff + 1, 0), group))


def map_batches(rows: int, workers: int | None, batch: int) -> list[int]:
    """Sizes of the batches in which `datasets` maps `rows` rows: contiguous shards for the workers, then batches."""
    shards = max(1, min(workers or 1, rows))
    sizes = []
    for index in range(shards):
        shard = rows // shards + (index < rows % shards)
        sizes += [min(batch, shard - start) for start in range(0, shard, batch)]
    return sizes
