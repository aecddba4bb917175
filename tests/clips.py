"""A small video, written with the codec that is everywhere."""

from pathlib import Path


def write_clip(path: Path, frames: int, rate: float, size: tuple[int, int] = (84, 56)) -> Path:
    """`frames` pictures of `size` (width, height), each of another colour, shown `rate` a second."""
    import cv2
    import numpy

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    assert writer.isOpened()
    for number in range(frames):
        colour = (number * 255 // frames, 200 - number * 150 // frames, 90)
        writer.write(numpy.full((size[1], size[0], 3), colour, dtype=numpy.uint8))
    writer.release()
    return path
