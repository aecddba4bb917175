"""A picture that will be trained on is one that decodes; its bytes stay as they are.

    qwen-merge data convert looks at every picture with check()

What training makes of unusual ones (LLaMA-Factory 0.9.3: PIL opens the bytes, shrinks over the pixel cap, enlarges
sides under 28, converts to RGB), and so what happens to them here:

- Truncated or broken anywhere: dropped. PIL's "load truncated images" stays off, as it is in training.
- CMYK, palette, grey, transparency: kept; PIL converts them to RGB.
- 16-bit: kept. PIL clips 16-bit grey at 255, so most of it trains as white; 16-bit colour is reduced to 8 bits.
- Animated: kept; the first frame is what training sees, and only that is decoded here.
- Rotated by EXIF: kept. Training does not turn it; the manifest says how many there are.
- 1 pixel: kept, it is enlarged. So thin that shrinking it leaves a side of 0: dropped, it would stop the training.
- More pixels than PIL opens (178,956,970; SynthDoG: 50 million, as published): dropped, from the size in its header.
- Formats outside FORMATS: dropped. PIL would hand some to other programs (PostScript to Ghostscript).
"""

import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from qwen_merge.data.sets import OPENABLE_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "TGA")
TRAINING_PIXELS = 262_144  # image_max_pixels of every recipe
_ORIENTATION = 0x0112
_PLAIN_MODES = ("RGB", "L", "P", "RGBA", "CMYK", "1", "LA")  # PIL is known to convert these to RGB


@dataclass(frozen=True)
class Picture:
    """Pixels as stored (not turned by EXIF); `format` and `mode` as PIL names them."""

    width: int
    height: int
    format: str
    mode: str
    animated: bool
    rotated: bool  # EXIF asks for turning or mirroring


class PictureError(Exception):
    """`reason`: a fixed text, to count by; `detail`: what was seen in this picture."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def check(data: bytes | None, max_pixels: int = OPENABLE_PIXELS) -> Picture:
    """Decode a picture's encoded bytes in full and say what it is.

    Raises:
        PictureError: there are no bytes, they do not decode, or training could not use the picture.
    """
    if not data:
        raise PictureError("picture is missing", "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _checked(image, max_pixels)
    except PictureError:
        raise
    except Image.DecompressionBombError:  # raised from the header; only above OPENABLE_PIXELS
        raise PictureError(_too_large(max_pixels), "more than PIL opens") from None
    except UnidentifiedImageError:  # whose own message has an address in memory
        raise PictureError(
            "picture does not decode", f"no picture: {len(data)} bytes that begin {data[:12]!r}"
        ) from None
    except (
        Exception
    ) as error:  # PIL's decoders raise nearly anything on bad bytes, and bad bytes are what is looked for
        raise PictureError("picture does not decode", f"{type(error).__name__}: {error}"[:120]) from None


def _checked(image: Image.Image, max_pixels: int) -> Picture:
    width, height = image.size
    picture = Picture(
        width,
        height,
        image.format or "",
        image.mode,
        image.format in ("GIF", "WEBP", "PNG") and _has_more_frames(image),
        "exif" in image.info and image.getexif().get(_ORIENTATION, 1) not in (0, 1),
    )
    if width * height > max_pixels:
        raise PictureError(_too_large(max_pixels), f"{width} x {height}")
    pixels = width * height
    if pixels > TRAINING_PIXELS and int(min(width, height) * (TRAINING_PIXELS / pixels) ** 0.5) < 1:
        raise PictureError("picture is too thin to be shrunk", f"{width} x {height}")
    if image.format in ("JPEG", "MPO"):
        # Every byte is still read and entropy-decoded, which is where damage shows; the pixels come out at an eighth
        # of the size and without colour, in a third of the time.
        image.draft("L", (1, 1))
    image.load()
    if picture.mode not in _PLAIN_MODES:
        image.crop((0, 0, 1, 1)).convert("RGB")
    return picture


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damage behind the first frame, which nobody will look at
        return False


def _too_large(max_pixels: int) -> str:
    return f"picture over {max_pixels:,} pixels"
