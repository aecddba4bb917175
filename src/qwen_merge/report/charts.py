"""Loss curves and histograms as inline SVG: sharp at any size, in print and in the dark, without a plotting library.

Colours are classes of the page's style sheet, and every text is escaped by whoever made it a number first: only
numbers and the page's own words are drawn here.
"""

import math
from collections.abc import Sequence

from qwen_merge.report.losses import Training, logarithmic, smoothed

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 210, 46, 24, 8, 16
RATE_HEIGHT = 64
POINTS = 600  # more than a curve of this width can show


def number(value: float) -> str:
    """Short, for an axis."""
    if value and (abs(value) < 0.001 or abs(value) >= 1e5):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 10 else f"{value:.0f}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each decade; only the ones where that would crowd the axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1.0, 2.0, 5.0) if len(decades) <= 3 else (1.0,)
    marks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Evenly fewer, the first and the last among them."""
    if len(points) <= POINTS:
        return list(points)
    return [points[round(index * (len(points) - 1) / (POINTS - 1))] for index in range(POINTS)]


class _Axes:
    """From steps and values to places in a frame whose top left corner is (LEFT, top)."""

    def __init__(self, points: Sequence[tuple[int, float]], top: float, height: float, log: bool):
        self.top, self.height, self.log = top, height, log
        steps, values = [step for step, _ in points], [value for _, value in points]
        self.first, self.last = steps[0], max(steps[-1], steps[0] + 1)
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            margin = abs(self.low) / 2 or 1.0
            self.low, self.high = self.low - (0 if log else margin), self.high + margin

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.top + (1 - share) * self.height

    def line(self, points: Sequence[tuple[int, float]], name: str) -> str:
        places = " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)
        if len(points) == 1:
            return f'<circle class="{name}" cx="{self.x(points[0][0]):.1f}" cy="{self.y(points[0][1]):.1f}" r="2.5"/>'
        return f'<polyline class="{name}" points="{places}"/>'

    def marks(self, values: Sequence[float]) -> str:
        """Grid lines with their values; where two would overlap, the first stays."""
        parts, taken = [], math.inf
        for value in values:
            y = self.y(value)
            if taken - y >= 12:
                taken = y
                parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
                parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
        return "".join(parts)

    def steps(self) -> str:
        y = self.top + self.height + 14
        marks = [mark for mark in ticks(self.first, self.last) if mark == int(mark)]
        return "".join(
            f'<text x="{self.x(mark):.1f}" y="{y:.1f}" text-anchor="middle">{mark:.0f}</text>' for mark in marks
        )


def loss_chart(training: Training) -> str:
    """Raw losses thin, smoothed bold, the learning rate below on the same steps."""
    values = [loss for _, loss in training.losses]
    log = logarithmic(values)
    axes = _Axes(training.losses, TOP, HEIGHT - TOP - BOTTOM, log)
    bold = list(zip((step for step, _ in training.losses), smoothed(values), strict=True))
    parts = [
        axes.marks(log_ticks(axes.low, axes.high) if log else ticks(axes.low, axes.high)),
        axes.line(thinned(training.losses), "raw"),
        axes.line(thinned(bold), "smooth"),
        axes.steps(),
    ]
    height = HEIGHT
    if training.rates:
        rate = _Axes(training.rates, HEIGHT + 6, RATE_HEIGHT - 12, log=False)
        rate.first, rate.last, rate.low = axes.first, axes.last, 0.0
        rate.high = max(rate.high, 1e-12)
        parts += [rate.marks([0.0, max(value for _, value in training.rates)]), rate.line(training.rates, "rate")]
        height += RATE_HEIGHT
    scale = "logarithmic" if log else "linear"
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="training loss, {scale}, and learning rate over steps">{"".join(parts)}</svg>'
    )


def bins(values: Sequence[int]) -> list[float]:
    """Edges of half octaves that cover all values: answers of 3 and of 8192 tokens both need room."""
    low = math.floor(2 * math.log2(max(min(values), 1)))
    high = math.floor(2 * math.log2(max(*values, 1))) + 1
    return [2 ** (half / 2) for half in range(low, high + 1)]


def histogram(closed: Sequence[int], unclosed: Sequence[int], edges: Sequence[float]) -> str:
    """Answers by length; those whose thought never ended on top, in another colour. `edges`: shared by all runs."""
    height, width = 84, 300
    count = len(edges) - 1
    stacks = [_counted(values, edges) for values in (closed, unclosed)]
    most = max(1, *(sum(pair) for pair in zip(*stacks, strict=True)))
    step = width / count
    parts = []
    for index in range(count):
        bottom = float(height - 16)
        for stack, name in zip(stacks, ("bar", "bar open"), strict=True):
            tall = stack[index] / most * (height - 22)
            if tall:
                bottom -= tall
                parts.append(
                    f'<rect class="{name}" x="{index * step + 0.5:.1f}" y="{bottom:.1f}" '
                    f'width="{max(step - 1, 1):.1f}" height="{tall:.1f}"/>'
                )
    octaves = [index for index, edge in enumerate(edges) if abs(math.log2(edge) - round(math.log2(edge))) < 0.01]
    for index in octaves[:: math.ceil(len(octaves) / 6)]:
        anchor = "start" if index == 0 else "end" if index == count else "middle"
        parts.append(f'<text x="{index * step:.1f}" y="{height - 4}" text-anchor="{anchor}">{edges[index]:.0f}</text>')
    return (
        f'<svg class="histogram" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="number of answers by length in tokens">{"".join(parts)}</svg>'
    )


def _counted(values: Sequence[int], edges: Sequence[float]) -> list[int]:
    counts = [0] * (len(edges) - 1)
    start = round(2 * math.log2(edges[0]))
    for value in values:
        counts[min(max(math.floor(2 * math.log2(max(value, 1))) - start, 0), len(counts) - 1)] += 1
    return counts
