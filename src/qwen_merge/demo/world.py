"""What there is to see: 84 x 84 pictures of coloured shapes, numbers, short words and sums, made by program.

A picture is 36 patches of 14 pixels, nine tokens after merging. A `Scene` says what is to be seen; its drawing adds
what a model must learn to overlook (place, size, shade, background).

Held out means: (1) scenes of another random stream (`Stream("held-out", seed)`; training streams have other names), so
that no drawing occurs twice, and (2) numbers that no training picture shows: every tenth number, chosen once for all
seeds (`HELD_OUT_NUMBERS`). Who reads those has learned digits and not a list of numbers.
"""

import io
import math
import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

SIDE = 84
COLUMN = 28  # pixels under one merged token
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (40, 80, 230),
    "yellow": (240, 205, 20),
    "purple": (150, 50, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
WORDS = ("sun", "sea", "dog", "cat", "bus", "map", "key", "box", "fox", "jam", "hat", "pen")
NUMBERS = range(100, 1000)
HELD_OUT_NUMBERS = frozenset(random.Random("held-out numbers").sample(NUMBERS, len(NUMBERS) // 10))
TRAINING_NUMBERS = tuple(sorted(set(NUMBERS) - HELD_OUT_NUMBERS))

KINDS = ("shape", "count", "number", "word", "sum")
SHOWN_MOST = ("shape", "shape", "number")  # the goals are about these, so pictures of them come more often


@dataclass(frozen=True)
class Scene:
    """What one picture shows: `count` equal shapes of one colour (kinds shape, count) or a written `text`."""

    kind: str
    colour: str
    shape: str = ""
    count: int = 1
    text: str = ""


class Stream:
    """A reproducible supply of scenes and drawings. Streams of different names share no drawing."""

    def __init__(self, name: str, seed: int = 0):
        self.held_out = name.startswith("held-out")
        self.random = random.Random(f"tiny world/{name}/{seed}")

    def scene(self, kind: str) -> Scene:
        pick = self.random
        # Yellow writing on a light background would be a test of eyesight.
        written = kind in ("number", "word", "sum")
        colour = pick.choice([colour for colour in COLOURS if not (written and colour == "yellow")])
        if kind == "shape":
            return Scene(kind, colour, pick.choice(SHAPES))
        if kind == "count":
            return Scene(kind, colour, pick.choice(SHAPES), pick.choice(list(COUNTS)))
        if kind == "number":
            numbers = sorted(HELD_OUT_NUMBERS) if self.held_out else TRAINING_NUMBERS
            return Scene(kind, colour, text=str(pick.choice(numbers)))
        if kind == "word":
            return Scene(kind, colour, text=pick.choice(WORDS))
        if kind == "sum":
            return Scene(kind, colour, text=f"{pick.randint(1, 9)}+{pick.randint(1, 9)}")
        raise ValueError(f"there is no kind of scene {kind!r}; there are {', '.join(KINDS)}")

    def drawing(self, scene: Scene) -> Image.Image:
        """The scene as an RGB picture of 84 x 84: place, size and shades are this stream's next random choices."""
        pick = self.random
        paper = pick.randint(222, 255)
        picture = Image.new("RGB", (SIDE, SIDE), tuple(min(255, paper + pick.randint(-6, 6)) for _ in range(3)))
        pen = ImageDraw.Draw(picture)
        shade = [max(0, min(255, value + pick.randint(-18, 18))) for value in COLOURS[scene.colour]]
        ink = (shade[0], shade[1], shade[2])
        if scene.text:
            self._write(pen, scene.text, ink)
        elif scene.kind == "shape":
            size = pick.randint(26, 60)
            left, top = pick.randint(0, SIDE - size), pick.randint(0, SIDE - size)
            draw_shape(pen, scene.shape, left, top, size, ink)
        else:
            cells = pick.sample([(0, 0), (0, 1), (1, 0), (1, 1)], scene.count)
            size = pick.randint(24, 34)
            for row, column in cells:
                left, top = (c * SIDE // 2 + pick.randint(0, SIDE // 2 - size) for c in (column, row))
                draw_shape(pen, scene.shape, left, top, size, ink)
        return picture

    def _write(self, pen: ImageDraw.ImageDraw, text: str, ink: tuple[int, int, int]) -> None:
        font = font_of(self.random.randint(26, 32))
        top = self.random.randint(16, SIDE - 46)
        for column, character in enumerate(text):
            centre = column * COLUMN + COLUMN // 2 + self.random.randint(-2, 2)
            place = (centre, top + self.random.randint(-2, 2))
            pen.text(place, character, fill=ink, font=font, anchor="mt", stroke_width=1, stroke_fill=ink)


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same glyphs on every machine, no font has to be installed."""
    return ImageFont.load_default(size=size)


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, left: int, top: int, size: int, ink: tuple[int, int, int]) -> None:
    right, bottom = left + size - 1, top + size - 1
    middle_x, middle_y, radius = (left + right) / 2, (top + bottom) / 2, (size - 1) / 2
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=ink)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=ink)
    elif shape == "triangle":
        pen.polygon(((middle_x, top), (right, bottom), (left, bottom)), fill=ink)
    elif shape == "cross":
        arm = size // 3
        pen.rectangle((left + arm, top, right - arm, bottom), fill=ink)
        pen.rectangle((left, top + arm, right, bottom - arm), fill=ink)
    elif shape == "star":
        corners = []
        for corner in range(10):
            reach, angle = (radius if corner % 2 == 0 else radius * 0.42), math.pi * (corner / 5 - 0.5)
            corners.append((middle_x + reach * math.cos(angle), middle_y + reach * math.sin(angle)))
        pen.polygon(corners, fill=ink)
    else:
        raise ValueError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")


def png(picture: Image.Image) -> bytes:
    """The bytes that go into a parquet file; weakly compressed, because thousands are written and read."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
