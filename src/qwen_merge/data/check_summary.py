"""What is counted of a set: totals that add up over workers, histograms of fixed size, problems with examples.

    qwen-merge data check STAGE.yaml

Everything is a number or a short text, so a summary crosses processes as JSON and its size does not grow with the set.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from qwen_merge.data.check_rows import LEFT_OUT, Row
from qwen_merge.data.counts import Counts

STEPS = 8  # histogram bins an octave


@dataclass
class Histogram:
    """Counts by bins of an eighth of an octave; the extremes and the sum are exact. Values are at least 0."""

    bins: dict[int, int] = field(default_factory=dict)
    count: int = 0
    total: int = 0
    least: int | None = None
    most: int | None = None

    def add(self, value: int) -> None:
        place = math.floor(STEPS * math.log2(value)) if value > 0 else -1
        self.bins[place] = self.bins.get(place, 0) + 1
        self.count += 1
        self.total += value
        self.least = value if self.least is None else min(self.least, value)
        self.most = value if self.most is None else max(self.most, value)

    def merge(self, other: "Histogram") -> None:
        for place, count in other.bins.items():
            self.bins[place] = self.bins.get(place, 0) + count
        self.count += other.count
        self.total += other.total
        extremes = [value for value in (self.least, other.least) if value is not None]
        self.least = min(extremes, default=None)
        self.most = max([value for value in (self.most, other.most) if value is not None], default=None)

    def quantile(self, share: float) -> int | None:
        """The value below which `share` of the values lie, to a bin's width (9 %)."""
        if not self.count or self.least is None or self.most is None:
            return None
        left = share * self.count
        for place in sorted(self.bins):
            left -= self.bins[place]
            if left <= 0:
                middle = 0 if place < 0 else round(2 ** ((place + 0.5) / STEPS))
                return min(max(middle, self.least), self.most)
        return self.most

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "Histogram":
        return cls(**{**data, "bins": {int(place): count for place, count in data["bins"].items()}})


@dataclass
class Summary:
    """Of the rows read. `rows.rows_out`: rows that LLaMA-Factory keeps, each of which becomes a sample."""

    rows: Counts = field(default_factory=Counts)
    stops: Counts = field(default_factory=Counts)  # rows that would end the run; they are kept ones
    tokens: Histogram = field(default_factory=Histogram)  # after the cut
    full: Histogram = field(default_factory=Histogram)  # before it
    characters: Histogram = field(default_factory=Histogram)
    pixels: Histogram = field(default_factory=Histogram)  # a picture
    widths: Histogram = field(default_factory=Histogram)
    heights: Histogram = field(default_factory=Histogram)
    trained: int = 0
    picture_tokens: int = 0
    over: int = 0  # rows longer than cutoff_len
    picture_bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)  # "JPEG RGB": pictures

    def add(self, row: Row, where: str, cutoff: int | None) -> None:
        """Count one row; `where` names it in an example."""
        self.rows.rows_in += 1
        if row.problems and row.problems[0][0] in LEFT_OUT:
            self.rows.drop(row.problems[0][0], f"{where}: {row.problems[0][1]}")
            return
        self.rows.rows_out += 1
        for reason, seen in row.problems:
            self.stops.drop(reason, f"{where}: {seen}")
        self.characters.add(row.characters)
        for picture in row.pictures:
            self.pixels.add(picture.width * picture.height)
            self.widths.add(picture.width)
            self.heights.add(picture.height)
            self.picture_bytes += picture.bytes
            kind = f"{picture.format} {picture.mode}"
            self.formats[kind] = self.formats.get(kind, 0) + 1
        if row.tokens is not None and row.full is not None:
            self.tokens.add(row.tokens)
            self.full.add(row.full)
            self.trained += row.trained or 0
            self.picture_tokens += row.picture_tokens or 0
            self.over += cutoff is not None and row.full > cutoff

    def merge(self, other: "Summary") -> None:
        for entry in dataclasses.fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if isinstance(mine, int):
                setattr(self, entry.name, mine + theirs)
            elif isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                mine.merge(theirs)

    def to_json(self) -> dict:
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {key: value.to_json() if hasattr(value, "to_json") else value for key, value in values.items()}

    @classmethod
    def from_json(cls, data: dict) -> "Summary":
        values = dict(data)
        for entry in dataclasses.fields(cls):
            if entry.name in ("rows", "stops"):
                values[entry.name] = Counts.from_json(data[entry.name])
            elif isinstance(data[entry.name], dict) and "bins" in data[entry.name]:
                values[entry.name] = Histogram.from_json(data[entry.name])
        return cls(**values)
