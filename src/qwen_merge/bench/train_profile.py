"""What a GPU was busy with in the last steps of `qwen-merge bench train`, from PyTorch's profiler.

A collective runs beside the model's kernels or alone; only alone does it cost time. The union of intervals tells the
two apart, on every rank. Waiting for a slower rank happens within a collective, so it is counted there: what a rank has
to do is the time of its other kernels, and by that the ranks are compared.
"""

import json
from pathlib import Path

Intervals = list[tuple[float, float]]
ON_THE_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # the profiler's names


def united(intervals: Intervals) -> Intervals:
    """The same times as intervals that do not touch, in order."""
    merged: Intervals = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Intervals) -> float:
    return sum(end - begin for begin, end in united(intervals))


def shares(trace: Path) -> dict[str, float]:
    """Seconds of a trace: as a whole, of the model's own work, of collectives, of collectives with nothing beside them.

    Raises:
        ValueError: the trace holds nothing that ran on a GPU.
    """
    work: Intervals = []
    collectives: Intervals = []
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") in ON_THE_GPU:
            times = (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)  # microseconds
            (collectives if "nccl" in event["name"].lower() else work).append(times)
    busy = united(work + collectives)
    if not busy:
        raise ValueError(f"{trace} holds no kernels")
    return {
        "seconds": busy[-1][1] - busy[0][0],
        "work": length(work),
        "collectives": length(collectives),
        "exposed": length(busy) - length(work),
    }
