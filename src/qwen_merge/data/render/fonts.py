"""The fonts a question is drawn with: where they come from, what each covers, how wide its glyphs are.

Fonts are taken from installed packages, asked for by name: `mplfonts` (Noto Sans, Serif and Mono CJK and Source Han
Mono, all under the SIL Open Font License; its SimHei has no free licence and is never touched) and `matplotlib`
(DejaVu, STIX). Neither package is imported. Debian's `fonts-noto-cjk` and `fonts-dejavu-core` are the alternative for
machines without pip, only when named: `qwen-merge data text2image convert` and `render(text, fonts="debian")`.

Pillow's basic layout is used everywhere. It shapes nothing, so complex scripts are refused (see text.py), but it gives
the same bytes whether or not a machine has libraqm and FriBiDi, and it is faster.
"""

import functools
import hashlib
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from qwen_merge.errors import UserError

# name: (package, file, name of the face inside the file; only a collection needs it)
SOURCES: dict[str, dict[str, tuple[str, str, str]]] = {
    "mplfonts": {
        "noto-sans": ("mplfonts", "NotoSansCJKsc-Regular.otf", ""),
        "noto-serif": ("mplfonts", "NotoSerifCJKsc-Regular.otf", ""),
        "noto-mono": ("mplfonts", "NotoSansMonoCJKsc-Regular.otf", ""),
        "source-mono": ("mplfonts", "SourceHanMonoSC-Regular.otf", ""),
        "dejavu-sans": ("matplotlib", "DejaVuSans.ttf", ""),
        "dejavu-sans-bold": ("matplotlib", "DejaVuSans-Bold.ttf", ""),
        "dejavu-serif": ("matplotlib", "DejaVuSerif.ttf", ""),
        "dejavu-serif-bold": ("matplotlib", "DejaVuSerif-Bold.ttf", ""),
        "dejavu-mono": ("matplotlib", "DejaVuSansMono.ttf", ""),
        "stix": ("matplotlib", "STIXGeneral.ttf", ""),
    },
    "debian": {
        "noto-sans": ("fonts-noto-cjk", "NotoSansCJK-Regular.ttc", "Noto Sans CJK SC"),
        "noto-serif": ("fonts-noto-cjk", "NotoSerifCJK-Regular.ttc", "Noto Serif CJK SC"),
        "noto-mono": ("fonts-noto-cjk", "NotoSansCJK-Regular.ttc", "Noto Sans Mono CJK SC"),
        "dejavu-sans": ("fonts-dejavu-core", "DejaVuSans.ttf", ""),
        "dejavu-sans-bold": ("fonts-dejavu-core", "DejaVuSans-Bold.ttf", ""),
        "dejavu-serif": ("fonts-dejavu-core", "DejaVuSerif.ttf", ""),
        "dejavu-serif-bold": ("fonts-dejavu-core", "DejaVuSerif-Bold.ttf", ""),
        "dejavu-mono": ("fonts-dejavu-core", "DejaVuSansMono.ttf", ""),
    },
}
CJK = {"noto-sans", "noto-serif", "noto-mono", "source-mono"}


@dataclass(frozen=True)
class Style:
    """Which face draws what. `narrow`: letters and digits; `wide`: CJK; `others`: asked in turn for what both lack."""

    name: str
    narrow: str
    wide: str
    others: tuple[str, ...]
    code: tuple[str, str]  # narrow and wide face of fenced blocks
    weight: int = 2  # how often it is taken
    cjk: bool = True  # whether it suits a text with CJK in it: no bold CJK face is at hand


_SANS = ("dejavu-sans", "stix", "dejavu-serif")
_SERIF = ("stix", "dejavu-serif", "dejavu-sans")
_MONO = ("dejavu-mono", "dejavu-sans", "stix", "dejavu-serif")
STYLES = (
    Style("Noto Sans CJK SC", "noto-sans", "noto-sans", _SANS, ("noto-mono", "noto-mono"), weight=4),
    Style("Noto Serif CJK SC", "noto-serif", "noto-serif", _SERIF, ("noto-mono", "noto-mono"), weight=4),
    Style("DejaVu Sans", "dejavu-sans", "noto-sans", _SANS, ("dejavu-mono", "noto-mono")),
    Style("DejaVu Serif", "dejavu-serif", "noto-serif", _SERIF, ("dejavu-mono", "noto-mono")),
    Style("STIX General", "stix", "noto-serif", _SERIF, ("dejavu-mono", "noto-mono")),
    Style("Noto Sans Mono CJK SC", "noto-mono", "noto-mono", _MONO, ("noto-mono", "noto-mono"), weight=1),
    Style("Source Han Mono SC", "source-mono", "source-mono", _MONO, ("source-mono", "source-mono"), weight=1),
    Style("DejaVu Sans Mono", "dejavu-mono", "noto-mono", _MONO, ("dejavu-mono", "noto-mono"), weight=1),
    Style("DejaVu Sans Bold", "dejavu-sans-bold", "noto-sans", _SANS, ("dejavu-mono", "noto-mono"), cjk=False),
    Style("DejaVu Serif Bold", "dejavu-serif-bold", "noto-serif", _SERIF, ("dejavu-mono", "noto-mono"), cjk=False),
)


@dataclass
class Face:
    """One face of one font file. Everything costly about it is read once a process."""

    name: str
    path: str
    index: int
    cjk: bool
    _sizes: dict[int, ImageFont.FreeTypeFont] = field(default_factory=dict)
    _advances: dict[tuple[str, int], int] = field(default_factory=dict)
    _inks: dict[tuple[str, int], Any] = field(default_factory=dict)

    @functools.cached_property
    def covered(self) -> bytes:
        """1 at each code point it has a glyph for, else 0."""
        from fontTools.ttLib import TTFont

        with TTFont(self.path, fontNumber=self.index, lazy=True) as font:
            # Numbers for names: 65,000 strings a font, which reading the CFF table would make, are 30 MB for nothing.
            font.setGlyphOrder(range(font["maxp"].numGlyphs))
            glyphs = font.getBestCmap()
        table = bytearray(sys.maxunicode + 1)
        for code, glyph in glyphs.items():
            table[code] = glyph != 0  # glyph 0 is the box that stands for a missing one
        return bytes(table)

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The face with an em of `size` pixels."""
        font = self._sizes.get(size)
        if font is None:
            font = ImageFont.truetype(self.path, size, self.index, layout_engine=ImageFont.Layout.BASIC)
            self._sizes[size] = font
        return font

    def advance(self, character: str, size: int) -> int:
        """Pixels from this character's origin to the next one's."""
        if self.cjk and (0x4E00 <= ord(character) < 0xA000 or 0x3400 <= ord(character) < 0x4DC0):
            return size  # ideographs: not kept for each of tens of thousands and each size
        key = (character, size)
        width = self._advances.get(key)
        if width is None:
            width = self._advances[key] = round(self.at(size).getlength(character))
        return width

    def spreads(self, character: str) -> bool:
        """Whether a CJK face draws it over a whole em, which suits CJK alone: a curly quote, a mathematical sign."""
        return self.cjk and self.advance(character, 24) >= 24

    def length(self, text: str, size: int) -> int:
        """Pixels that the characters take together."""
        if self.cjk:  # these faces hold no kerning that the basic layout reads, so their advances simply add up
            return sum(self.advance(character, size) for character in text)
        return round(self.at(size).getlength(text))

    def ink(self, character: str, size: int) -> tuple[int, int, int, int] | None:
        """Left, top, right, bottom of what it blackens, from its origin; None for nothing. (Pillow's own box of a mark
        takes in the origin.)"""
        key = (character, size)
        if key not in self._inks:
            canvas = Image.new("L", (6 * size, 6 * size))
            ImageDraw.Draw(canvas).text((3 * size, 3 * size), character, fill=255, font=self.at(size), anchor="ls")
            box = canvas.getbbox()
            self._inks[key] = box and tuple(edge - 3 * size for edge in box)
        return self._inks[key]


@functools.cache
def load(source: str = "mplfonts") -> dict[str, Face]:
    """Name to face, found once a process.

    Raises:
        UserError: no such source, or packages or files of it are missing: all of them, and what to install.
    """
    if source not in SOURCES:
        raise UserError(f"fonts are taken from {' or '.join(SOURCES)}, not from {source!r}.")
    wanted = SOURCES[source]
    files: dict[str, dict[str, Path]] = {}
    problems = []
    for package in dict.fromkeys(package for package, _, _ in wanted.values()):
        try:
            files[package] = _of_debian(package) if source == "debian" else _of_pip(package)
        except LookupError as error:
            problems.append(str(error))
            continue
        missing = [file for owner, file, _ in wanted.values() if owner == package and file not in files[package]]
        problems += [f"the installed {package} has no {file}: reinstall it" for file in dict.fromkeys(missing)]
    if problems:
        install = "apt-get install" if source == "debian" else "pip install"
        packages = " ".join(dict.fromkeys(package for package, _, _ in wanted.values()))
        title = f"fonts to draw questions with are missing. Run: {install} {packages}"
        raise UserError.from_list(title, list(dict.fromkeys(problems)))
    return {
        name: Face(name, str(path), _index(path, inside), name in CJK)
        for name, (package, file, inside) in wanted.items()
        for path in (files[package][file],)
    }


def describe(source: str = "mplfonts") -> dict[str, str]:
    """Face to file name and sha256, for a manifest: other files draw other bytes."""
    return {
        name: f"{Path(face.path).name} {hashlib.sha256(Path(face.path).read_bytes()).hexdigest()}"
        for name, face in load(source).items()
    }


def _of_pip(package: str) -> dict[str, Path]:
    """File name to path, as the installed package's own list of files has it."""
    try:
        listed = metadata.distribution(package).files
    except metadata.PackageNotFoundError:
        raise LookupError(f"the Python package {package} is not installed") from None
    found = {file.name: Path(str(file.locate())) for file in listed or () if file.suffix in (".otf", ".ttf")}
    return {name: path for name, path in found.items() if path.is_file()}


def _of_debian(package: str) -> dict[str, Path]:
    """File name to path, as dpkg lists them."""
    try:
        listed = subprocess.run(["dpkg-query", "-L", package], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise LookupError("dpkg-query is not there: this is no Debian or Ubuntu") from None
    except subprocess.CalledProcessError:
        raise LookupError(f"the Debian package {package} is not installed") from None
    paths = [Path(line) for line in listed.splitlines() if line.endswith((".ttc", ".ttf", ".otf"))]
    return {path.name: path for path in paths if path.is_file()}


def _index(path: Path, inside: str) -> int:
    """Which face of a collection has that name."""
    if not inside:
        return 0
    from fontTools.ttLib import TTCollection

    with TTCollection(str(path), lazy=True) as collection:
        names = [font["name"].getDebugName(4) for font in collection.fonts]
    matches = [index for index, name in enumerate(names) if name in (inside, f"{inside} Regular")]
    if not matches:
        raise UserError(f"{path} holds the faces {', '.join(map(str, names))}; expected {inside} among them.")
    return matches[0]
