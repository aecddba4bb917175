"""Public sets as they are on the hub, written by program: ReCap, SynthDoG and OneVision rows, odd pictures among them.

    from data_sources import recap_rows, write_parquet, CONVERSATIONS

The parquet files carry `datasets`' own feature metadata, as files pushed to the hub do.
"""

import io
import itertools
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth random colours: compresses as a photograph does, and differs for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(width: int = 48, height: int = 32, seed: int = 0, **options) -> bytes:
    return encoded(noise(width, height, seed), "JPEG", **options)


def png(width: int = 48, height: int = 32, seed: int = 0) -> bytes:
    return encoded(noise(width, height, seed), "PNG")


def large_png(width: int, height: int) -> bytes:
    """A white 1-bit PNG of any size, made without its pixels in memory at once."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    compressor = zlib.compressobj(1)
    line = b"\0" + b"\xff" * ((width + 7) // 8)
    rows = b"".join(compressor.compress(line) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated_gif() -> bytes:
    frames = [noise(40, 30, seed).convert("P") for seed in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def sixteen_bit() -> bytes:
    return encoded(Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16), "PNG")


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    return encoded(noise(60, 40, 7), "JPEG", exif=exif)


def odd_pictures() -> dict[str, bytes]:
    """Those that are kept, byte for byte."""
    return {
        "cmyk": encoded(noise(40, 40, 1, "CMYK"), "JPEG"),
        "palette": encoded(noise(40, 40, 2).convert("P"), "PNG"),
        "transparent": encoded(noise(40, 40, 3, "RGBA"), "PNG"),
        "grey": encoded(noise(40, 40, 4, "L"), "JPEG"),
        "bilevel": encoded(noise(40, 40, 5, "1"), "PNG"),
        "sixteen_bit": sixteen_bit(),
        "animated": animated_gif(),
        "rotated": rotated(),
        "one_pixel": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "progressive": jpeg(200, 150, 6, progressive=True),
        "webp": encoded(noise(40, 40, 8), "WEBP"),
        "two_views": encoded(noise(60, 40, 11), "MPO", save_all=True, append_images=[noise(60, 40, 12)]),
    }


def broken_pictures() -> dict[str, bytes | None]:
    """Those that are dropped as undecodable, or missing."""
    whole = jpeg(200, 150, 9)
    damaged = bytearray(png(64, 64, 10))
    damaged[len(damaged) // 2] ^= 0xFF  # the checksum of its pixels is wrong from here on
    return {
        "truncated": whole[: len(whole) // 2],
        "damaged": bytes(damaged),
        "text": b"<html>404 Not Found</html>",
        "empty": b"",
        "missing": None,
    }


def turns(*texts: str) -> list[dict[str, str]]:
    """Texts as human, gpt, human, …"""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def recap_row(number: int, picture: bytes | None, conversation: list | None = None) -> dict:
    if conversation is None:
        conversation = turns(f"<image>\nPlease describe picture {number}.", f"Caption of picture {number}.")
    return {"id": f"{number:09d}", "image": picture, "conversations": conversation, "data_source": "recap"}


def recap_features():
    from datasets import Features, Image, Value

    return Features(
        {
            "id": Value("string"),
            "image": Image(),
            "conversations": [{"from": Value("string"), "value": Value("string")}],
            "data_source": Value("string"),
        }
    )


def synthdog_features():
    from datasets import Features, Image, Value

    return Features({"image": Image(), "ground_truth": Value("string")})


def page(text: str) -> str:
    """SynthDoG's ground_truth."""
    return json.dumps({"gt_parse": {"text_sequence": text}}, ensure_ascii=False)


def _table(rows: list[dict], features):
    """Pictures as bytes go in as they are: a `Dataset` built from them would try to open them."""
    import pyarrow as pa

    prepared = []
    for row in rows:
        image = row["image"]
        prepared.append(row | {"image": None if image is None else {"bytes": image, "path": None}})
    return pa.Table.from_pylist(prepared, schema=features.arrow_schema)


def write_parquet(path: Path, rows: list[dict], features, row_group_size: int = 100) -> Path:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(_table(rows, features), path, row_group_size=row_group_size)
    return path


def write_arrow(path: Path, rows: list[dict], features) -> Path:
    """As `save_to_disk` writes it."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    table = _table(rows, features)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


def write_tar(path: Path, rows: Iterable[dict], endings: tuple[str, ...] = ("jpg",)) -> Path:
    """A WebDataset shard: KEY.jpg and KEY.json, the pictures' `endings` in turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for row, ending in zip(rows, itertools.cycle(endings), strict=False):
            text = {name: value for name, value in row.items() if name != "image"}
            for suffix, data in ((ending, row["image"]), ("json", json.dumps(text).encode())):
                entry = tarfile.TarInfo(f"{row['id']}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def write_recap(folder: Path, rows: int, files: int = 1, width: int = 48, height: int = 32, pictures: int = 50) -> Path:
    """Many good ReCap rows over `files` parquet files; `pictures` different ones are used again and again."""
    different = [jpeg(width, height, seed) for seed in range(pictures)]
    features = recap_features()
    for file in range(files):
        part = range(file * rows // files, (file + 1) * rows // files)
        made = [recap_row(number, different[number % pictures]) for number in part]
        write_parquet(folder / f"train-{file:05d}-of-{files:05d}.parquet", made, features)
    return folder
