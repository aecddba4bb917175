"""A small video, written with the codec that is everywhere; and its beginning, cut off without encoding anew."""

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


def trim(source: Path, path: Path, seconds: float) -> Path:
    """The video without its first seconds, as `ffmpeg -ss … -c copy` does it: all frames are stored and announced, and
    an edit list shows the later ones."""
    import av

    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copy, offset = new.add_stream_from_template(stream), round(seconds / stream.time_base)
        for packet in old.demux(stream):
            if packet.dts is None:
                continue
            packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copy
            new.mux(packet)
    return path
