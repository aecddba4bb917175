"""Floating-point conversion of raw bytes, for `--dtype`: numpy only, chunk by chunk, rounding as torch does.

numpy has no bfloat16; its bits are the upper half of a float32, so it is read by a shift and written by rounding to
nearest even.
"""

import numpy as np

from qwen_merge.errors import UserError

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def to_float32(data: bytes | bytearray | memoryview, dtype: str) -> np.ndarray:
    """Values of `data`, raw elements of `dtype`, as float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.frombuffer(data, _NUMPY[dtype]).astype(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> bytes:
    """Raw elements of `dtype`, rounded to nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).tobytes()
    with np.errstate(over="ignore"):
        return values.astype(_NUMPY[dtype]).tobytes()


def convert(data: bytes | bytearray | memoryview, source: str, target: str, name: str) -> bytes:
    """Convert raw elements of one dtype to another. `name` is the tensor's, for the error.

    Raises:
        UserError: a finite value does not fit the target (float16 ends at 65504).
    """
    values = to_float32(data, source)
    converted = from_float32(values, target)
    overflowed = np.isfinite(values) & ~np.isfinite(to_float32(converted, target))
    if overflowed.any():
        raise UserError(
            f"tensor {name} holds {values[overflowed][0]:g}, which {target} cannot represent. "
            "Use --dtype bfloat16 or float32, or keep the source's dtype."
        )
    return converted
