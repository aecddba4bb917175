"""A video as pictures: frames taken evenly, within bounds of number and size: `qwen-merge data import`.

Every graft takes them, also one whose tower knows pictures only; what a frame's time was is not told.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qwen_merge.data.conversations import Dropped
from qwen_merge.errors import UserError

QUALITY = 95  # of JPEG; a frame has been through a lossy codec already


@dataclass(frozen=True)
class FrameOptions:
    """fps: frames a second that are taken, at least `min_frames` and at most `max_frames` of a video (and never more
    than it has), each of `min_pixels` to `max_pixels`."""

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 8
    min_pixels: int = 256 * 28 * 28
    max_pixels: int = 1024 * 28 * 28


def chosen(frames: int, seconds: float, options: FrameOptions) -> list[int]:
    """Numbers of the frames that are taken of a video of so many frames and seconds, from the first to the last."""
    wanted = min(max(round(seconds * options.fps), options.min_frames), options.max_frames, frames)
    return [round(number * (frames - 1) / max(wanted - 1, 1)) for number in range(wanted)]


def frames_of(path: Path, options: FrameOptions) -> list[bytes]:
    """The frames that are taken, as JPEG.

    Raises:
        Dropped: it is no video that decodes.
        UserError: PyAV is missing.
    """
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV, which LLaMA-Factory decodes with, too: pip install 'av<16'") from None
    try:
        with av.open(str(path)) as video:
            stream = video.streams.video[0]
            count = stream.frames or sum(1 for _ in video.decode(stream))
            if stream.duration and stream.time_base:
                seconds = float(stream.duration * stream.time_base)
            else:
                seconds = count / float(stream.average_rate or FrameOptions.fps)
        found, count = _taken(path, chosen(count, seconds, options), options)
        if found is None and count:
            # The container's number is of what is stored; of that an edit list may show less, or the end be cut off.
            found, count = _taken(path, chosen(count, seconds, options), options)
    except (av.FFmpegError, OSError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise Dropped("video does not decode", f"{path}: {type(error).__name__}: {error}"[:160]) from None
    if not found:
        raise Dropped("video does not decode", f"{path}: no frame of it")
    return found


def _taken(path: Path, numbers: list[int], options: FrameOptions) -> tuple[list[bytes] | None, int]:
    """The frames of these numbers, None where there are too few; and how many were decoded for it."""
    import av

    wanted, found, decoded = set(numbers), [], 0
    with av.open(str(path)) as video:
        for number, frame in enumerate(video.decode(video=0)):
            decoded += 1
            if number in wanted:
                found.append(_encoded(frame.to_image(), options))
            if len(found) == len(wanted):
                return found, decoded
    return None, decoded


def _encoded(image: Image.Image, options: FrameOptions) -> bytes:
    pixels = image.width * image.height
    factor = math.sqrt(min(max(pixels, options.min_pixels), options.max_pixels) / pixels)
    if factor != 1:
        image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
