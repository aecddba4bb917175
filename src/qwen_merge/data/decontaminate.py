"""Training rows that are in an evaluation set: `qwen-merge data convert ... --decontaminate MathVista_MINI.tsv ...`

A model that was trained on a benchmark's pictures or questions scores what it remembers. `Index` reads evaluation sets
as VLMEvalKit stores them (TSV with `question` and base64 `image`) and says of a picture or a question whether it is one
of them. What counts as the same:

Pictures: perceptual hashes (`imagehash.phash`) of 64 bits that differ in at most `distance` bits (default 4), which
survives resizing and JPEG. 64 bits cannot tell apart pictures of one kind, such as charts with equal axes: measured on
bar charts drawn at random, one pair in ten thousand is within 4 bits, so a benchmark of 2,500 charts would claim every
fifth chart of a training set. A hash of 256 bits confirms (at most 24 bits apart; copies were 0 to 24, different
charts 32 and more), unless one picture's shorter side is under 64 pixels, where it no longer survives JPEG. A picture
of one flat colour has no perceptual hash worth the name: it is found by its bytes.

Questions: a run of tokens (words; characters for scripts without spaces; case, width and punctuation do not matter) of
the evaluation question that occurs in the row's question: 13 words or 20 characters, which are about as long, or four
fifths of a shorter question. Questions under 8 words or 12 characters are not looked for: "What is the title of this
book?" is asked of many pictures, and the picture decides. For the same reason phrases (7 words or 10 characters) that
more than `common` evaluation items share are cut out of the questions first: instructions such as "answer with the
option's letter" stand in front of whole benchmarks and of the training sets made like them. An item is a text with its
picture, so that a question that is repeated for its options' order counts once.

    index = Index.read([Path("MathVista_MINI.tsv")])
    index.picture_hit(encoded_bytes)   # "MathVista_MINI.tsv row 17, 2 of 64 bits apart", or None
    index.question_hit("What ...?")    # "MathVista_MINI.tsv row 17", or None
"""

import base64
import binascii
import csv
import hashlib
import io
import json
import math
import re
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from qwen_merge.data.journal import write_whole
from qwen_merge.errors import UserError

DISTANCE = 4  # bits of 64
FINE_DISTANCE = 24  # bits of 256
FINE_SIDE = 64  # pixels; under this the 256-bit hash is not asked
FLAT = 0.5  # standard deviation of the grey values, 0 to 255
COMMON = 3  # evaluation items
SMALL, FLAT_ONE = 1, 2

# (a full run, the shortest question that is looked for), in tokens
WORDS = (13, 8)
CHARACTERS = (20, 12)
SHARE = 0.8  # of a question shorter than a full run

# Scripts written without spaces: one token a character. Kana, CJK and its extensions; Thai, Lao, Myanmar, Khmer.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_ONE_CHARACTER = re.compile(f"[{_UNSPACED}]")
_IMAGE_TAG = re.compile(r"<image(?: \d+)?>")  # ours, and MMMU's "<image 1>"
_REFERENCE = 64  # characters: VLMEvalKit takes an `image` up to this length for the index of another row

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_MAX_TOKENS = 1 << 16  # of one text; more are not looked at


class Look:
    """What is compared of a picture.

    `exact`: of its bytes; `coarse`: 64 bits, None for a flat picture; `fine`: 32 bytes, computed when asked for (most
    pictures are near no other); `small`: too small for `fine`.

    Raises:
        Exception: the bytes do not decode; PIL's decoders raise nearly anything.
    """

    def __init__(self, data: bytes) -> None:
        self.exact = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                self.small = min(image.size) < FINE_SIDE
                self._grey = _grey(image)
        self.coarse: int | None = None
        shrunk = self._grey.resize((32, 32), Image.Resampling.LANCZOS)  # as phash does, which then has nothing to do
        if np.asarray(shrunk).std() >= FLAT:
            self.coarse = int.from_bytes(np.packbits(imagehash.phash(shrunk).hash).tobytes(), "big")

    @property
    def fine(self) -> bytes:
        if self.coarse is None:
            return bytes(32)
        return np.packbits(imagehash.phash(self._grey, hash_size=16).hash).tobytes()

    @classmethod
    def at(cls, data: bytes) -> "Look | None":
        """Look at encoded bytes; None if they do not decode."""
        try:
            return cls(data)
        except Exception:
            return None


def _grey(image: Image.Image) -> Image.Image:
    """8-bit grey of the first frame, transparency on white."""
    if image.mode[0] in "IF":
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8), "L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")


def tokens(text: str) -> list[str]:
    """What is compared of a text: words, and single characters of scripts without spaces, in one form and case."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", _IMAGE_TAG.sub(" ", text)).casefold())[:_MAX_TOKENS]


def run_length(found: list[str]) -> int | None:
    """How many tokens in a row are evidence for a question; None if it is too short to be."""
    full, shortest = _kind(found)
    return None if len(found) < shortest else min(full, math.ceil(SHARE * len(found)))


def _kind(found: list[str]) -> tuple[int, int]:
    single = sum(_ONE_CHARACTER.fullmatch(token) is not None for token in found)
    return CHARACTERS if 2 * single > len(found) else WORDS


def _shortest_run(kind: tuple[int, int]) -> int:
    return math.ceil(SHARE * kind[1])


@lru_cache(maxsize=1 << 16)
def _token_number(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode("utf-8", "replace"), digest_size=8).digest(), "big")


@lru_cache(maxsize=4)
def _powers(base: int, count: int) -> np.ndarray:
    return np.concatenate([np.ones(1, np.uint64), np.full(count - 1, base, np.uint64)]).cumprod(dtype=np.uint64)


class _Runs:
    """All runs of one text as 64-bit numbers, from one cumulative sum modulo 2**64."""

    def __init__(self, found: list[str]) -> None:
        self.count = len(found)
        size = 1 << max(8, self.count.bit_length())
        numbers = np.fromiter(map(_token_number, found), np.uint64, self.count)
        self.sums = np.zeros(self.count + 1, np.uint64)
        np.cumsum(numbers * _powers(_BASE, size)[: self.count], out=self.sums[1:])
        self.back = _powers(pow(_BASE, -1, 1 << 64), size)

    def of(self, length: int) -> np.ndarray:
        """One number for each run of `length` tokens, in order; the length is part of the number."""
        starts = self.count - length + 1
        if starts < 1:
            return np.zeros(0, np.uint64)
        return (self.sums[length:] - self.sums[:starts]) * self.back[:starts] + np.uint64(length)


@dataclass
class Index:
    """Evaluation items, ready to be compared with. Memory: some 60 bytes a picture, 12 a token of their questions."""

    distance: int
    names: list[str]  # of the items: "MathVista_MINI.tsv row 17"
    exact: np.ndarray  # (P,) uint64, pictures
    coarse: np.ndarray  # (P,) uint64
    fine: np.ndarray  # (P, 32) uint8
    flags: np.ndarray  # (P,) uint8: SMALL, FLAT_ONE
    picture_owner: np.ndarray  # (P,) int32 into names
    runs: np.ndarray  # (R,) uint64, sorted
    run_owner: np.ndarray  # (R,) int32 into names
    lengths: np.ndarray  # the lengths that occur in `runs`
    summary: dict[str, dict] = field(default_factory=dict)  # for a manifest: what was read from each file

    @classmethod
    def read(cls, paths: list[Path], distance: int = DISTANCE, common: int = COMMON) -> "Index":
        """Read evaluation sets, one row at a time.

        Raises:
            UserError: a file is missing, is not an evaluation TSV, or holds nothing to compare with; all such files are
                named.
        """
        builder = _Builder()
        problems = []
        for path in paths:
            try:
                builder.add(path)
            except (OSError, ValueError, csv.Error) as error:
                problems.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
        if problems:
            raise UserError.from_list(
                "evaluation sets must be TSV files as VLMEvalKit stores them, with a column `question` or `image` "
                "(base64). Take those files out of --decontaminate or download them anew:",
                problems,
            )
        return builder.index(distance, common)

    def picture_hit(self, data: bytes) -> str | None:
        """Which evaluation picture these encoded bytes show, if any; the nearest one, with its distance."""
        look = Look.at(data) if len(self.exact) else None
        if look is None:
            return None
        same = np.flatnonzero(self.exact == np.uint64(look.exact))
        if len(same):
            return f"{self.names[self.picture_owner[same[0]]]}, the same file"
        if look.coarse is None:
            return None
        apart = _ones(self.coarse ^ np.uint64(look.coarse))
        near = np.flatnonzero((apart <= self.distance) & (self.flags & FLAT_ONE == 0))
        if len(near) and not look.small:
            fine = np.unpackbits(np.bitwise_xor(self.fine[near], np.frombuffer(look.fine, np.uint8)), axis=1).sum(
                axis=1
            )
            near = near[(fine <= FINE_DISTANCE) | (self.flags[near] & SMALL != 0)]
        if not len(near):
            return None
        nearest = near[apart[near].argmin()]
        return f"{self.names[self.picture_owner[nearest]]}, {apart[nearest]} of 64 bits apart"

    def question_hit(self, text: str) -> str | None:
        """Which evaluation question this text contains a run of, if any; the first one in the text's order."""
        if not len(self.runs):
            return None
        found = _Runs(tokens(text))
        for length in self.lengths:
            runs = found.of(int(length))
            if not len(runs):
                break  # lengths rise
            places = np.minimum(np.searchsorted(self.runs, runs), len(self.runs) - 1)
            hits = np.flatnonzero(self.runs[places] == runs)
            if len(hits):
                return self.names[self.run_owner[places[hits[0]]]]
        return None

    def save(self, path: Path) -> None:
        """Write the index, complete or not at all, so that many workers need not hash the same pictures again."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        words = {"distance": self.distance, "names": self.names, "summary": self.summary}
        texts = np.frombuffer(json.dumps(words).encode(), np.uint8)
        write_whole(path, lambda file: np.savez(file, words=texts, **arrays))

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is torn or something else; OSError: it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(**json.loads(file["words"].tobytes()), **{name: file[name] for name in _ARRAYS})
        except (EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is no evaluation index: {error!r}") from error


_ARRAYS = ("exact", "coarse", "fine", "flags", "picture_owner", "runs", "run_owner", "lengths")


def _ones(bits: np.ndarray) -> np.ndarray:
    """How many bits are set in each uint64 (numpy before 2.0 has no function for it)."""
    pairs = bits - (bits >> np.uint64(1) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + (pairs >> np.uint64(2) & np.uint64(0x3333333333333333))
    eights = fours + (fours >> np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (eights * np.uint64(0x0101010101010101) >> np.uint64(56)).astype(np.int64)


class _Builder:
    def __init__(self) -> None:
        self.names: list[str] = []
        # each different picture: exact, coarse, fine, flags -> owner
        self.looks: dict[tuple[int, int, bytes, int], int] = {}
        self.items: dict[tuple[str, str], tuple[list[str], int]] = {}  # text, picture -> tokens, owner
        self.summary: dict[str, dict] = {}

    def add(self, path: Path) -> None:
        counts = {"rows": 0, "pictures": 0, "pictures that do not decode": 0, "questions": 0, "questions too short": 0}
        for row in _rows(path):
            counts["rows"] += 1
            owner = len(self.names)
            self.names.append(f"{path.name} row {row.get('index') or counts['rows'] - 1}")
            picture = row.get("image") or ""
            for data in _pictures(picture):
                look = Look.at(data) if data else None
                if look is None:
                    counts["pictures that do not decode"] += 1
                    continue
                counts["pictures"] += 1
                flags = (SMALL if look.small else 0) | (FLAT_ONE if look.coarse is None else 0)
                self.looks.setdefault((look.exact, look.coarse or 0, look.fine, flags), owner)
            found = tokens(row.get("question") or "")
            if found and run_length(found) is None:
                counts["questions too short"] += 1
            elif found:
                counts["questions"] += 1
                shown = hashlib.blake2b(self._picture_of(picture, path).encode(), digest_size=8).hexdigest()
                self.items.setdefault((" ".join(found), shown), (found, owner))
        self.summary[path.name] = counts
        if not counts["rows"]:
            raise ValueError("it has no row")
        if counts["pictures that do not decode"] and not counts["pictures"]:
            raise ValueError(f"none of its {counts['pictures that do not decode']:,} pictures decodes")
        if not counts["pictures"] and not counts["questions"]:
            raise ValueError(
                f"it has no picture, and none of its {counts['rows']:,} questions is long enough to look for"
            )

    @staticmethod
    def _picture_of(picture: str, path: Path) -> str:
        # A reference is to a row of the same file; which one, tells items apart as well as its picture would.
        return f"{path.name}:{picture}" if len(picture) <= _REFERENCE else picture

    def index(self, distance: int, common: int) -> Index:
        looks = list(self.looks)
        runs, owners, lengths = self._runs(common)
        return Index(
            distance=distance,
            names=self.names,
            exact=np.array([exact for exact, _, _, _ in looks], np.uint64),
            coarse=np.array([coarse for _, coarse, _, _ in looks], np.uint64),
            fine=np.frombuffer(b"".join(fine for _, _, fine, _ in looks), np.uint8).reshape(-1, 32),
            flags=np.array([flags for _, _, _, flags in looks], np.uint8),
            picture_owner=np.array([self.looks[look] for look in looks], np.int32),
            runs=runs,
            run_owner=owners,
            lengths=lengths,
            summary=self.summary,
        )

    def _runs(self, common: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The runs that are evidence, sorted, with the first item that has each, and their lengths."""
        texts = [(_Runs(found), found, owner) for found, owner in self.items.values()]
        phrases = {}
        for kind in (WORDS, CHARACTERS):
            numbers = [np.unique(text.of(_shortest_run(kind))) for text, _, _ in texts]
            distinct, times = np.unique(np.concatenate([*numbers, np.zeros(0, np.uint64)]), return_counts=True)
            phrases[kind] = distinct[times > common]
        runs, owners, lengths = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], set()
        for text, found, owner in texts:
            shortest = _shortest_run(_kind(found))
            for start, end in _outside(np.isin(text.of(shortest), phrases[_kind(found)]), shortest, len(found)):
                length = run_length(found[start:end])
                if length:
                    lengths.add(length)
                    runs.append(text.of(length)[start : end - length + 1])
                    owners.append(np.full(len(runs[-1]), owner, np.int32))
        distinct, first = np.unique(np.concatenate(runs), return_index=True)  # the first item that has each
        return distinct, np.concatenate(owners)[first], np.array(sorted(lengths), np.int64)


def _outside(common: np.ndarray, length: int, count: int) -> Iterator[tuple[int, int]]:
    """The stretches (from, to) of `count` tokens outside common phrases; `common`: per start of `length` tokens."""
    covered = np.zeros(count + 2, bool)
    covered[[0, -1]] = True
    for start in np.flatnonzero(common):
        covered[start + 1 : start + 1 + length] = True
    edges = np.flatnonzero(np.diff(covered.astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a TSV, as pandas reads it (quotes doubled inside quotes), without holding the file."""
    csv.field_size_limit(1 << 31)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        names = reader.fieldnames or []
        if not {"question", "image"} & set(names):
            raise ValueError(
                f"no column `question` or `image`; its first line has {', '.join(names)[:200] or 'nothing'}"
            )
        yield from reader


def _pictures(value: str) -> Iterable[bytes | None]:
    """The pictures of an `image` field: one, or a list of several as Python prints it; none for a reference.

    A list is taken apart by a pattern, not evaluated. None stands for what is not base64.
    """
    if len(value) <= _REFERENCE:
        return
    if value.startswith("["):
        texts = [single or double for single, double in re.findall(r"'([^']*)'|\"([^\"]*)\"", value)]
    else:
        texts = [value]
    for text in texts:
        if len(text) <= _REFERENCE:
            continue
        try:
            yield base64.b64decode(text.partition("base64,")[2] if text.startswith("data:") else text, validate=False)
        except (binascii.Error, ValueError):
            yield None
