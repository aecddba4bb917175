"""Questions as pictures: everything of the question is there, readable, and the same in every process.

Most proofs measure pixels. Each has a control: the way the original drew, or the rule switched off, for which the
opposite must hold.
"""

import dataclasses
import hashlib
import io
import math
import pickle
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="the extra `data` is not installed")
pytest.importorskip("fontTools", reason="the extra `data` is not installed")

from PIL import Image, ImageChops, ImageDraw

from qwen_merge.data.render import fonts
from qwen_merge.data.render.colours import MIN_CONTRAST, contrast, pick
from qwen_merge.data.render.fonts import STYLES, load
from qwen_merge.data.render.layout import Line, lay_out
from qwen_merge.data.render.render import MIN_TEXT, TRAINING_PIXELS, CannotDraw, Rendered, _draw, _glyphs, _look, render
from qwen_merge.data.render.text import NO_END, NO_START, clean_lines, kind
from qwen_merge.errors import UserError

CHINESE = (
    "小明有三个苹果，他给了小红一个，又从商店买了五个苹果回来。请问：他现在一共有几个苹果呢？（提示：先列式，再计算。）"
)
ENGLISH = "Give three tips for staying healthy. Don’t repeat “the usual advice” — sleep, diet — without a reason…"
MIXED = "请解释 Python 的 “list comprehension” 和 “生成器表达式” 有什么区别？[x**2 for x in range(10)]——哪个更省内存？"
FORMULA = (
    r"已知 $f(x)=\frac{1}{2}x^2-a\ln x\ (a\in\mathbb{R})$，∑x_i² ≥ 0，∀x∈ℝ: √(x²)=|x|, ∫₀^∞ e^{−x²}dx = √π⁄2，求 α。"
)
CODE = "What does this print?\n\n```python\ndef f(n):\n\tif n < 2:\n\t\treturn n  # 递归终止\n```\n请回答。"
MARKS = "x\u0302 = x\u0304 ± 1.96, X\u0302, decomposed e\u0301, Tiê\u0301ng Viê\u0323t"
VARIED = [
    CHINESE,
    ENGLISH,
    MIXED,
    FORMULA,
    CODE,
    MARKS,
    "1+1=?",
    "Привет, мир! Γειά σου. 한국어 かな カナ",
    "1. a\n   - b\n\n| c |",
]
LONG = "\n".join([CHINESE * 4, ENGLISH * 4, "Antidisestablishmentarianism" * 8, CHINESE + "尾"])
BY_NAME = {style.name: style for style in STYLES}
SANS, SERIF, TIMES = BY_NAME["Noto Sans CJK SC"], BY_NAME["Noto Serif CJK SC"], BY_NAME["STIX General"]


def picture(rendered: Rendered) -> Image.Image:
    image = Image.open(io.BytesIO(rendered.png))
    image.load()
    return image


def rgb(colour: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(colour[1:]))


def ink(image: Image.Image) -> Image.Image:
    """255 where a pixel is not the paper's colour, which the corner has."""
    paper = Image.new("RGB", image.size, image.getpixel((0, 0)))
    return ImageChops.difference(image.convert("RGB"), paper).convert("L").point(lambda value: 255 if value else 0)


def touches_edge(image: Image.Image) -> bool:
    left, top, right, bottom = ink(image).getbbox()
    return left == 0 or top == 0 or right == image.width or bottom == image.height


def unspaced(text: str) -> str:
    return "".join(character for character in text if kind(character) in ("letter", "mark"))


def originals_picture(text: str) -> Image.Image:
    """As the original: whatever the question, one sentence; and a canvas of 600 × 400 whatever its length."""
    image = Image.new("RGB", (600, 400), "white")
    ImageDraw.Draw(image).text((20, 20), "This is a sample sentence.", "black", load()["noto-sans"].at(24))
    return image


# What is drawn


def test_different_questions_are_different_pictures():
    questions = [f"{question}{number}" for number in range(4) for question in VARIED]
    assert len({render(question).png for question in questions}) == len(questions)
    # Not by their colours only: the ink itself differs.
    assert len({ink(picture(render(question))).tobytes() for question in questions}) == len(questions)
    # Control: the original's constant sentence is one picture for all of them.
    assert len({originals_picture(question).tobytes() for question in questions}) == 1


@pytest.mark.parametrize("character", "中鑫A9α≤∑℃한かñ。")
def test_the_ink_is_the_glyphs(character: str):
    """The picture of one character holds exactly the pixels its face blackens, and not the box for a missing glyph."""
    for seed in range(4):
        drawn = render(character, seed)
        mask = ink(picture(drawn))
        line = lay_out(character, BY_NAME[drawn.font], drawn.text_size, 500)[0]
        face = line.runs[0].face
        left, top, right, bottom = mask.getbbox()

        def alone(text: str, face=face, size: int = drawn.text_size) -> Image.Image:
            canvas = Image.new("L", (200, 200))
            ImageDraw.Draw(canvas).text((50, 100), text, fill=255, font=face.at(size), anchor="ls")
            steps = canvas.point(lambda value: 255 if value > 8 else 0)  # below that, smoothing rounds to paper
            return steps.crop(steps.getbbox())

        assert mask.crop((left, top, right, bottom)).tobytes() == alone(character).tobytes()
        assert alone(character).tobytes() != alone("\U0010fffe").tobytes()


def test_every_character_is_laid_out_and_nothing_is_cut():
    for text in [*VARIED, LONG]:
        drawn = render(text, 1)
        image, style, size = picture(drawn), BY_NAME[drawn.font], drawn.text_size
        assert (image.size, image.mode) == ((drawn.width, drawn.height), "RGB")
        margin = _look(text, 1, frozenset(load())).margin
        left, top, right, bottom = ink(image).getbbox()
        assert min(left, top, image.width - right, image.height - bottom) >= margin
        lines = lay_out(text, style, size, 440)
        assert unspaced("".join(line.text for line in lines)) == unspaced("".join(clean_lines(text)))
        assert all(line.width <= 440 for line in lines)
    # Control: the same text on the original's fixed canvas reaches the edge and goes on beyond it.
    image = picture(render(LONG, 1))
    assert image.height > 400
    assert touches_edge(image.crop((0, 0, image.width, 400)))


def test_a_long_text_has_the_ink_of_every_line():
    """Ink of the whole = ink of its lines, each drawn alone; the last, with the text's last character, among them."""
    look = _look(LONG, 7, frozenset(load()))

    def total(mask: Image.Image) -> int:
        return sum(value * count for value, count in enumerate(mask.histogram()))

    lines = lay_out(LONG, look.style, look.size, look.width - 2 * look.margin)
    whole, alone = _draw(lines, look), [total(_draw([line], look)) for line in lines]
    assert lines[-1].text.endswith("尾")
    assert min(alone) > 0
    assert total(whole) == sum(alone)
    assert render(LONG, 7).height == whole.height
    assert total(whole.crop((0, 0, 600, 400))) < sum(alone)  # control: the original's canvas


def test_every_style_stands_on_the_same_baseline():
    """So runs of different faces on one line do, too."""
    for style in STYLES:
        look = dataclasses.replace(_look("H", 0, frozenset(load())), style=style, size=24, margin=20)
        plain, descending = (_draw(lay_out(text, style, 24, 400), look) for text in ("H", "g"))
        assert plain.getbbox()[3] == 20 + 24
        assert descending.getbbox()[3] > 20 + 24  # control: what hangs below it


def test_ink_that_leaves_its_line_makes_the_picture_larger():
    plain, stacked = render("q", 3), render("q" + "\u0302" * 12, 3)
    assert not touches_edge(picture(stacked))
    ratio = stacked.text_size / plain.text_size  # another text, another size by lot
    assert stacked.height > plain.height * ratio * 1.3
    assert len(lay_out("q" + "\u0302" * 12, SANS, 24, 500)[0].runs[0].text) == 13


# Readable


def test_contrast_on_the_pixels():
    ratios, papers, inks = [], set(), set()
    for number in range(40):
        drawn = render(f"{CHINESE[:20]} {number} What is it?", number)
        image = picture(drawn)
        colours = {colour for _, colour in image.getcolors(1 << 20)}
        paper = image.getpixel((0, 0))
        assert paper == rgb(drawn.background)
        assert rgb(drawn.foreground) in colours  # strokes reach the full ink, smoothing or not
        ratios.append(contrast(rgb(drawn.foreground), paper))
        assert math.isclose(ratios[-1], drawn.contrast)
        papers.add(paper)
        inks.add(drawn.foreground)
    assert min(ratios) >= MIN_CONTRAST
    assert len(papers) > 35
    assert len(inks) > 35
    # Control: colours by lot without the rule fail it.
    rng = random.Random(0)
    free = [contrast(*(tuple(int(rng.random() * 256) for _ in range(3)) for _ in range(2))) for _ in range(40)]
    assert min(free) < MIN_CONTRAST


def test_contrast_is_wcags():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((255, 255, 255), (118, 118, 118)) == pytest.approx(4.54, abs=0.005)  # WCAG's own well-known pair
    assert contrast((255, 255, 255), (119, 119, 119)) < MIN_CONTRAST
    rng = random.Random(1)
    assert min(contrast(*pick(rng)) for _ in range(2000)) >= MIN_CONTRAST


def test_looks_vary_around_the_originals():
    drawn = [render(f"第{number}题：1+1=?") for number in range(60)]
    assert len({one.font for one in drawn}) >= 6
    assert len({one.text_size for one in drawn}) >= 5
    assert all(480 <= one.width <= 720 for one in drawn)
    assert sum(one.width for one in drawn) / 60 == pytest.approx(600, abs=30)
    assert sum(one.text_size for one in drawn) / 60 == pytest.approx(24, abs=2)
    assert not any("Bold" in one.font for one in drawn)  # no bold ideographs are at hand
    assert any("Bold" in render(f"Question {number}?").font for number in range(40))


def test_training_does_not_shrink_letters_beyond_reading():
    long = CHINESE * 16
    drawn = render(long)
    factor = math.sqrt(TRAINING_PIXELS / (drawn.width * drawn.height))
    assert factor < 1
    assert drawn.training_text_size == pytest.approx(drawn.text_size * factor)
    assert drawn.training_text_size >= MIN_TEXT
    for longer in (CHINESE * 60, CHINESE * 10_000):
        with pytest.raises(CannotDraw) as refused:
            render(longer)
        assert refused.value.reason == "too long to be read"
    # Control: the rule, not the renderer, stops it.
    everything = render(CHINESE * 60, min_text=0)
    assert everything.training_text_size < MIN_TEXT
    assert not touches_edge(picture(everything))
    assert everything.height > 3000


def test_smoothing_survives_training():
    """LLaMA-Factory resizes before it converts to RGB: a palette picture would be resized without smoothing."""
    image = picture(render(CHINESE))
    half = (image.width // 2, image.height // 2)
    assert len(image.resize(half).getcolors(1 << 20)) > len(image.getcolors(1 << 20))
    palette = image.quantize(16)
    assert len(palette.resize(half).getcolors(1 << 20)) <= 16  # control


# The same bytes


PROGRAM = """
import hashlib, sys
from qwen_merge.data.render.render import render
import ast
for text in ast.literal_eval(sys.stdin.read()):
    print(hashlib.sha256(render(text, 5).png).hexdigest(), hashlib.sha256(text.encode()).hexdigest())
loaded = {"mplfonts", "matplotlib", "torch", "numpy"} & set(sys.modules)
assert not loaded, loaded
"""


def test_two_processes_and_this_one_draw_the_same_bytes():
    """In another order and with another hash seed: neither caches nor sets leave a trace. And no package whose files
    are used is imported."""

    def elsewhere(texts: list[str], hash_seed: str) -> list[str]:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=ascii(texts),
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(path for path in sys.path if path)},
        )
        return sorted(result.stdout.splitlines())

    here = sorted(
        f"{hashlib.sha256(render(text, 5).png).hexdigest()} {hashlib.sha256(text.encode()).hexdigest()}"
        for text in VARIED
    )
    assert elsewhere(VARIED, "1") == elsewhere(VARIED[::-1], "2") == here
    assert all(render(text, 5).png == render(text, 5).png for text in VARIED)


def test_the_seed_and_every_character_count():
    looks = {render(ENGLISH, seed).png for seed in range(8)}
    assert len(looks) == 8
    assert len({(one.font, one.background) for one in (render(f"same length {n}") for n in range(8))}) > 4


# Lines


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def test_latin_breaks_at_spaces_and_hyphens_only():
    lines = texts(lay_out(ENGLISH * 3 + " state-of-the-art " * 9, TIMES, 24, 300))
    words = set((ENGLISH * 3 + " state-of-the-art " * 9).replace("-", "- ").split())
    assert len(lines) > 10
    for line in lines:
        assert not line.startswith(" ")
        assert not line.endswith(" ")
        assert set(line.replace("-", "- ").split()) <= words
    # Control: cut by width alone, words are halved.
    joined = " ".join((ENGLISH * 3).split())
    assert not all(set(joined[at : at + 25].split()) <= words for at in range(0, len(joined), 25))


def test_punctuation_neither_begins_nor_ends_a_line_wrongly():
    text = "“你好”，他说。“这是《红楼梦》（又名《石头记》）、《西游记》！”……——真的吗？！" * 8
    for width in range(200, 420, 20):
        lines = texts(lay_out(text, SERIF, 20, width))
        assert "".join(lines) == text
        assert not any(line[0] in NO_START or line[-1] in NO_END for line in lines)
    # Control: cut by width alone, some line begins with a comma or the like.
    assert any(text[at] in NO_START for at in range(0, len(text), 15))


def test_a_word_longer_than_a_line_is_broken_after_a_sign():
    url = "https://example.org/wiki/Special:Search?search=deep+learning&some_very_long_name=with_a_long_value"
    lines = texts(lay_out(url, SANS, 24, 400))
    assert "".join(lines) == url
    assert len(lines) > 2
    assert all(line[-1] in "/?&_=+:" for line in lines[:-1])
    solid = lay_out("a" * 500, SANS, 24, 400)
    assert "".join(texts(solid)) == "a" * 500
    assert all(350 < line.width <= 400 for line in solid[:-1])
    assert len(lay_out("中", SANS, 24, 5)) == 1  # wider than the line: alone on it, not for ever on none


def test_code_is_monospaced_and_keeps_its_columns():
    for style in STYLES:
        lines = lay_out("ii\n```\nii\n    WW\n\tx = 'ii'  # 中\n```\nWW", style, 24, 600)
        assert [line.code for line in lines] == [False, True, True, True, True, True, False]
        one = lines[2].width / 2
        assert lines[3].width == 6 * one
        assert lines[4].text.startswith("    x")
        assert lines[3].runs[0].text.startswith("    W")
        if style is SERIF:  # control: outside the fence the same letters differ in width
            assert lines[0].width != lines[6].width
    unclosed = lay_out("a\n~~~\nb\n```\nc", SERIF, 24, 600)
    assert [line.code for line in unclosed] == [False, True, True, True, True]
    assert not lay_out("``` not a fence ```", SERIF, 24, 600)[0].code


def test_tabs_line_ends_and_blank_lines():
    assert clean_lines("a\tb\n中\tc\r\nd\re\u2028f\x0bg") == ["a   b", "中  c", "d", "e", "f", "g"]
    assert clean_lines("\n \na  \n\n\n\n\nb\n\n") == ["a", "", "", "b"]
    assert clean_lines("e\u0301 \u1112\u1161\u11ab") == ["é 한"]  # composed, so that one glyph draws it


def test_invisible_characters_leave_no_trace():
    plain = lay_out("zero width", SANS, 24, 600)
    assert lay_out("ze\u200bro\x00\x07 \ufeffwi\u00addth\u200e\ufe0f", SANS, 24, 600) == plain
    fixed = texts(lay_out("aaaa bbbb\u00a0cccc", SANS, 24, 130))
    assert fixed == ["aaaa", "bbbb\u00a0cccc"]
    assert texts(lay_out("aaaa bbbb cccc", SANS, 24, 130)) == ["aaaa bbbb", "cccc"]  # control


# Faces


def faces_of(text: str, style: fonts.Style = SANS) -> dict[str, str]:
    return {
        character: run.face.name
        for line in lay_out(text, style, 24, 2000)
        for run in line.runs
        for character in run.text
    }


def test_quotation_marks_are_as_wide_as_their_neighbours():
    assert faces_of("don’t say “you”")["“"] == "dejavu-sans"  # the CJK face's would be an em wide
    chinese = faces_of("他说“你好”。")
    assert chinese["“"] == chinese["”"] == "noto-sans"
    assert faces_of("a——那是")["—"] == faces_of("“那是")["“"] == "noto-sans"
    assert faces_of("a—b那是", TIMES)["—"] == "stix"
    both = lay_out("“你好” 和 “list” don’t", TIMES, 24, 2000)[0]
    assert [(run.text, run.face.name) for run in both.runs] == [
        ("“你好”", "noto-serif"),
        (" ", "stix"),
        ("和", "noto-serif"),
        (" “list” don’t", "stix"),
    ]


def test_every_face_in_a_run_has_its_characters():
    for style in STYLES:
        for text in VARIED:
            for line in lay_out(text, style, 24, 500):
                for run in line.runs:
                    assert all(run.face.covered[ord(character)] for character in run.text)
    assert not load()["dejavu-sans"].covered[ord("中")]  # control: coverage is read, not assumed
    assert faces_of("中a", BY_NAME["DejaVu Sans"]) == {"中": "noto-sans", "a": "dejavu-sans"}


def test_runs_begin_where_the_last_one_ended():
    """The sum of advances, which layout uses for CJK faces, is what Pillow then draws."""
    text = "中文，한국어カナ“A”b①…—Ωж"
    for name in fonts.CJK:
        face = load()[name]
        for size in (18, 22, 24, 30):
            known = "".join(character for character in text if face.covered[ord(character)])
            assert face.length(known, size) == face.at(size).getlength(known)
    line = lay_out(MIXED, TIMES, 24, 5000)[0]
    for before, after in zip(line.runs, line.runs[1:], strict=False):
        assert after.x == before.x + before.face.length(before.text, 24)


def test_marks_stand_over_the_middle_of_their_letter():
    for base in "xXl":
        run = lay_out(f"{base}\u0302", SANS, 24, 500)[0].runs[0]
        (x, y, letter), (mark_x, mark_y, mark) = _glyphs(run, 24)
        assert (x, y, letter, mark) == (0, 0, base, "\u0302")
        own, over = run.face.ink(base, 24), run.face.ink(mark, 24)
        assert over[3] + mark_y < own[1]  # clear of it, and of a capital as well
        assert abs((over[0] + over[2]) / 2 + mark_x - (own[0] + own[2]) / 2) <= 1


# What cannot be drawn


@pytest.mark.parametrize(
    ("text", "culprits"),
    [
        ("שלום", "שלום"),
        ("say مرحبا", "مرحبا"),
        ("नम", "नम"),
        ("สวัสดี", "สวัดี"),
        ("\u1112\u119e", "\u1112\u119e"),
        ("👍🏽", "👍🏽"),
        ("🇨🇳", "🇨🇳"),
        ("☺\u200d☺", "\u200d"),
        ("x\ue000", "\ue000"),
        ("x\ud800", "\ud800"),
        ("\u202eabc", "\u202e"),
        ("1\u20e3", "\u20e3"),
        ("\U00021a38", "\U00021a38"),
    ],
)
def test_what_cannot_be_drawn_is_named(text: str, culprits: str):
    with pytest.raises(CannotDraw) as refused:
        render(f"什么是 {text}?")
    assert refused.value.reason == "a character that cannot be drawn"
    assert set(refused.value.characters) == set(culprits)
    assert f"U+{ord(culprits[0]):04X}" in str(refused.value)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)  # it crosses processes
    render("什么是?")  # control


@pytest.mark.parametrize("text", ["", " \n\t\u3000", "\u200b\x00\ufeff"])
def test_a_text_without_ink_is_refused(text: str):
    with pytest.raises(CannotDraw, match="no text"):
        render(text)


# Where fonts come from


def test_only_free_fonts_of_named_packages():
    from fontTools.ttLib import TTFont

    for face in load().values():
        names = TTFont(face.path, fontNumber=face.index, lazy=True)["name"]
        terms = f"{names.getDebugName(0)} {names.getDebugName(13)}"
        assert any(known in terms for known in ("SIL Open Font License", "DejaVu changes are in public domain", "STIX"))
    assert not any("SimHei" in face.path for face in load().values())
    described = fonts.describe()
    file = Path(load()["stix"].path)
    assert described["stix"] == f"STIXGeneral.ttf {hashlib.sha256(file.read_bytes()).hexdigest()}"


def test_missing_packages_are_named(monkeypatch):
    real = metadata.distribution

    def without_mplfonts(name: str):
        if name == "mplfonts":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "distribution", without_mplfonts)
    with pytest.raises(UserError, match="pip install mplfonts matplotlib") as missing:
        fonts.load.__wrapped__()
    assert "the Python package mplfonts is not installed" in str(missing.value)
    assert "matplotlib is not installed" not in str(missing.value)
    monkeypatch.undo()
    assert len(fonts.load.__wrapped__()) == 10  # control


def test_missing_debian_packages_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="apt-get install fonts-noto-cjk fonts-dejavu-core"):
        fonts.load.__wrapped__("debian")
    with pytest.raises(UserError, match="not from 'windows'"):
        render("a", fonts="windows")


def test_debians_fonts_draw_everything_too():
    try:
        load("debian")
    except UserError as error:
        pytest.skip(str(error))
    for text in VARIED:
        drawn = render(text, 2, fonts="debian")
        assert not touches_edge(picture(drawn))
        assert drawn.contrast >= MIN_CONTRAST
    # Of the ten faces of the collection the simplified Chinese one, not the first.
    assert load("debian")["noto-sans"].at(20).getname()[0] == "Noto Sans CJK SC"
