"""Ink and paper whose contrast a person, and so a model, can read.

The contrast ratio is WCAG 2.1's: 1 for equal colours, 21 for black on white; 4.5 is its level AA for text, and at
least one of black and white reaches it on any paper.
"""

import colorsys
import random

MIN_CONTRAST = 4.5
Colour = tuple[int, int, int]  # sRGB, 0 to 255


def luminance(colour: Colour) -> float:
    """Relative luminance, 0 (black) to 1 (white)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Colour, other: Colour) -> float:
    """WCAG's ratio of two colours, in either order."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def pick(rng: random.Random) -> tuple[Colour, Colour]:
    """Ink and paper: mostly dark on a light paper, some light on dark, some any colour on any other.

    The ratio is at least MIN_CONTRAST, of the very colours that are written. Only rng.random() is drawn from, whose
    sequence Python promises to keep.
    """
    manner = rng.random()
    if manner < 0.5:
        paper = _colour(rng, (0.0, 0.2), (0.9, 1.0))
    elif manner < 0.7:
        paper = _colour(rng, (0.0, 0.6), (0.05, 0.3))
    else:
        paper = _colour(rng, (0.0, 0.8), (0.15, 1.0))
    for _ in range(50):
        ink = _colour(rng, (0.0, 1.0), (0.0, 1.0))
        if contrast(ink, paper) >= MIN_CONTRAST:
            return ink, paper
    return max(((0, 0, 0), (255, 255, 255)), key=lambda ink: contrast(ink, paper)), paper


def web(colour: Colour) -> str:
    """As #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _colour(rng: random.Random, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    def between(bounds: tuple[float, float]) -> float:
        return bounds[0] + rng.random() * (bounds[1] - bounds[0])

    red, green, blue = colorsys.hsv_to_rgb(rng.random(), between(saturation), between(value))
    return round(red * 255), round(green * 255), round(blue * 255)
