"""The new projector layer: weight N(0, 0.02), bias 0, the same bytes for the same seed wherever it runs.

numpy's legacy generator over Philox is used because its stream is frozen by numpy's compatibility policy (NEP 19);
torch's differs between versions and devices. The seed is Philox's key.
"""

from collections.abc import Iterator
from math import prod

from qwen_merge.merger.plan import PlannedTensor

STANDARD_DEVIATION = 0.02
GENERATOR = "numpy RandomState(Philox(key=seed)).standard_normal"
CHUNK = 1 << 20  # elements


def initial_bytes(tensor: PlannedTensor, seed: int) -> Iterator[bytes]:
    """Raw bytes of a new tensor in its planned dtype, in chunks."""
    import numpy as np  # a quarter of a second on a cold start: paid when all else has been copied, not before

    from qwen_merge.merger.convert import from_float32

    elements = prod(tensor.shape)
    random = None if tensor.name.endswith(".bias") else np.random.RandomState(np.random.Philox(key=seed))
    for start in range(0, elements, CHUNK):
        count = min(CHUNK, elements - start)
        values = np.zeros(count) if random is None else random.standard_normal(count) * STANDARD_DEVIATION
        yield from_float32(values.astype(np.float32), tensor.dtype)
