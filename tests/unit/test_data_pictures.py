"""Which pictures are kept and why the others are not, and what LLaMA-Factory makes of the unusual ones.

.venv/bin/python -m pytest tests/unit/test_data_pictures.py
"""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from data_sources import broken_pictures, encoded, jpeg, large_png, noise, odd_pictures, png
from qwen_merge.data.pictures import Picture, PictureError, check

ODD = odd_pictures()


def picture(width: int, height: int, kind: str, mode: str, **more: bool) -> Picture:
    return Picture(width, height, kind, mode, **({"animated": False, "rotated": False} | more))


EXPECTED = {
    "cmyk": picture(40, 40, "JPEG", "CMYK"),
    "palette": picture(40, 40, "PNG", "P"),
    "transparent": picture(40, 40, "PNG", "RGBA"),
    "grey": picture(40, 40, "JPEG", "L"),
    "bilevel": picture(40, 40, "PNG", "1"),
    "sixteen_bit": picture(64, 64, "PNG", "I;16"),
    "animated": picture(40, 30, "GIF", "P", animated=True),
    "rotated": picture(60, 40, "JPEG", "RGB", rotated=True),
    "one_pixel": picture(1, 1, "PNG", "RGB"),
    "progressive": picture(200, 150, "JPEG", "RGB"),
    "webp": picture(40, 40, "WEBP", "RGB"),
    "two_views": picture(60, 40, "MPO", "RGB"),
}


@pytest.mark.parametrize("name", sorted(ODD))
def test_unusual_pictures_are_what_they_are(name):
    assert check(ODD[name]) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated", "picture does not decode"),
        ("damaged", "picture does not decode"),
        ("text", "picture does not decode"),
        ("empty", "picture is missing"),
        ("missing", "picture is missing"),
    ],
)
def test_broken_pictures_are_dropped(name, reason):
    with pytest.raises(PictureError) as error:
        check(broken_pictures()[name])
    assert error.value.reason == reason


def opened(data: bytes) -> bool:
    """Whether training can decode it."""
    try:
        Image.open(io.BytesIO(data)).convert("RGB")
    except Exception:
        return False
    return True


def kept(data: bytes) -> bool:
    try:
        check(data)
    except PictureError:
        return False
    return True


@pytest.mark.parametrize("kind", ["baseline", "progressive", "grey", "cmyk", "png", "webp", "gif"])
def test_a_picture_cut_or_damaged_anywhere_is_judged_as_training_would(kind):
    """JPEG is decoded at an eighth of its size here: what the full decoding refuses must be refused all the same."""
    data = {
        "baseline": jpeg(120, 90, 1),
        "progressive": jpeg(120, 90, 2, progressive=True),
        "grey": encoded(noise(120, 90, 3, "L"), "JPEG"),
        "cmyk": encoded(noise(120, 90, 4, "CMYK"), "JPEG"),
        "png": png(60, 40, 5),
        "webp": encoded(noise(60, 40, 6), "WEBP"),
        "gif": odd_pictures()["animated"],
    }[kind]
    rng = np.random.default_rng(0)
    cut = [data[: int(end)] for end in np.linspace(1, len(data) - 1, 60)]
    damaged = []
    for place in rng.integers(0, len(data), 120):
        damaged.append(data[:place] + bytes([data[place] ^ int(rng.integers(1, 256))]) + data[place + 1 :])
    judged = [(kept(each), opened(each)) for each in [data, *cut, *damaged]]
    assert judged[0] == (True, True)
    assert [number for number, (ours, theirs) in enumerate(judged) if ours != theirs] == []
    assert not all(theirs for _, theirs in judged)  # the damage does matter


def test_control_lenient_decoding_would_keep_a_truncated_picture(monkeypatch):
    assert not kept(broken_pictures()["truncated"])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert kept(broken_pictures()["truncated"])


def test_sixty_megapixels_are_too_many_for_synthdog_only():
    data = large_png(10_000, 6_000)
    assert check(data) == picture(10_000, 6_000, "PNG", "1")
    with pytest.raises(PictureError) as error:
        check(data, max_pixels=50_000_000)
    assert (error.value.reason, error.value.detail) == ("picture over 50,000,000 pixels", "10000 x 6000")


@pytest.mark.parametrize(("width", "height"), [(13_379, 13_379), (20_000, 20_000)])
def test_more_than_pil_opens_is_told_from_the_header(width, height):
    """Nothing is decoded: the picture has no pixels in it at all."""
    data = large_png(width, 1)
    header = data[:20] + height.to_bytes(4, "big") + data[24:29]
    data = header + zlib.crc32(header[12:]).to_bytes(4, "big") + data[33:]
    with pytest.raises(PictureError, match="picture over 178,956,970 pixels"):
        check(data)


def test_formats_that_start_other_programs_are_refused():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"  # control: PIL would take it
    with pytest.raises(PictureError, match="does not decode"):
        check(postscript)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["qwen2_vl"])
def test_what_llamafactory_makes_of_them(template):
    """Kept pictures get through its plug-in; one that is too thin does not, and is dropped here."""
    from llamafactory.data.mm_plugin import get_mm_plugin

    plugin = get_mm_plugin(template, image_token="<|image_pad|>", video_token="<|video_pad|>")

    def trained(data: bytes) -> Image.Image:
        stored = [{"bytes": data, "path": None}]
        return plugin._regularize_images(stored, image_max_pixels=262_144, image_min_pixels=1_024)["images"][0]

    for data in ODD.values():
        image = trained(data)
        assert image.mode == "RGB"
        assert min(image.size) >= 28
    assert trained(ODD["one_pixel"]).getpixel((0, 0)) == (255, 0, 0)
    assert trained(ODD["rotated"]).size == (60, 40)  # not turned
    assert np.asarray(trained(ODD["sixteen_bit"])).mean() > 250  # clipped to white
    first = Image.open(io.BytesIO(ODD["animated"])).convert("RGB").getpixel((0, 0))
    assert trained(ODD["animated"]).getpixel((0, 0)) == first

    thin = large_png(300_000, 1)
    with pytest.raises(ValueError, match="height and width must be > 0"):
        trained(thin)
    with pytest.raises(PictureError, match="picture is too thin to be shrunk"):
        check(thin)
    assert check(large_png(262_144, 1)).width == 262_144
    assert trained(large_png(262_144, 1)).size[1] >= 28
