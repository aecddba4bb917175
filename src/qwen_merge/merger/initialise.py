"""New tensors: weights N(0, 0.02), biases 0, norms 1; the same bytes for the same seed wherever it runs.

numpy's legacy generator over Philox is used because its stream is frozen by numpy's compatibility policy (NEP 19);
torch's differs between versions and devices. The seed is the lower half of Philox's key, a tensor's stream the upper.
"""

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from qwen_merge.merger.plan import PlannedTensor

if TYPE_CHECKING:
    import numpy as np

ROW_NOISE = 0.01  # of new rows of a copied matrix, as a share of the spread of its values
STANDARD_DEVIATION = 0.02
GENERATOR = "numpy RandomState(Philox(key=seed)).standard_normal"
CHUNK = 1 << 20  # elements


def initial_bytes(tensor: PlannedTensor, seed: int) -> Iterator[bytes]:
    """Raw bytes of a new tensor in its planned dtype, in chunks."""
    import numpy as np  # a quarter of a second on a cold start: paid when all else has been copied, not before

    from qwen_merge.merger.convert import from_float32

    elements = prod(tensor.shape)
    constant = 1.0 if tensor.stream is None else 0.0 if tensor.name.endswith("bias") else None
    random = np.random.RandomState(np.random.Philox(key=seed | (tensor.stream or 0) << 64))
    for start in range(0, elements, CHUNK):
        count = min(CHUNK, elements - start)
        values = random.standard_normal(count) * STANDARD_DEVIATION if constant is None else np.full(count, constant)
        yield from_float32(values.astype(np.float32), tensor.dtype)


def initial_rows(mean: "np.ndarray", spread: float, count: int, tensor: PlannedTensor, seed: int) -> bytes:
    """Raw bytes of `count` new rows: each the mean of the others, with a little of its own.

    At the mean a new token is about as likely as all others are on average, and draws no attention in a text; equal
    rows could never be told apart by a head.
    """
    import numpy as np

    from qwen_merge.merger.convert import from_float32

    random = np.random.RandomState(np.random.Philox(key=seed | (tensor.stream or 0) << 64))
    values = mean + random.standard_normal((count, len(mean))) * (spread * ROW_NOISE)
    return from_float32(values.astype(np.float32), tensor.dtype)
