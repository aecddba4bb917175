"""How fast a video runs in the frames that a vLLM server keeps of it.

The server takes frames evenly from a video and forgets how long it lasted: unless the request says so
(`mm_processor_kwargs.fps`), each pair of frames counts as one second, whether the video is a minute or an hour long. So
whoever sends a video measures it: `qwen-merge chat --endpoint` and evaluations of a served model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SERVER_FRAMES = 32  # the most that vLLM 0.9.1 keeps of a video; no option of its changes that
SLOWEST, FASTEST = 0.001, 240.0  # what this kit's servers take (`overlays/vllm/chat.py`)
ASSUMED = 2.0  # frames a second, where nothing is said


def frame_rate(video: str | Path) -> float | None:
    """Frames a second among those that a server keeps; None where the file cannot be measured."""
    try:
        import cv2  # the library that the server counts frames with
    except ImportError:
        return None
    capture = cv2.VideoCapture(str(video))
    try:
        frames, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    finally:
        capture.release()
    if frames < 1 or rate <= 0:
        return None
    return min(max(rate * min(1.0, SERVER_FRAMES / frames), SLOWEST), FASTEST)


def processor_options(videos: Sequence[str | Path]) -> dict[str, Any]:
    """What a request's `mm_processor_kwargs` should say about its videos, in their order; empty if nothing is known.

    One number where all run alike: vLLM's cache of media may hold some of a list's videos and not others.
    """
    rates = [frame_rate(video) for video in videos]
    if all(rate is None for rate in rates):
        return {}
    known = [rate or ASSUMED for rate in rates]
    return {"fps": known[0] if len(set(known)) == 1 else known}
