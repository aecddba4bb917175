"""Planted leaks are found, and what only looks like one is not."""

import base64
import csv
import io
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwen_merge.data.decontaminate import Index, Look, run_length, tokens
from qwen_merge.errors import UserError

LONG = (
    "A water tank is filled by two pipes in six and nine hours respectively and emptied by a third one in "
    "twelve hours; how long does it take to fill it when all three of them are open?"
)
SHORT = "Which of the four islands lies furthest from the harbour?"  # 10 words
GENERIC = "What is the title of this book?"  # 7 words
CHINESE = "如图所示，在三角形ABC中，点D是边BC的中点，若AB等于六厘米，AC等于八厘米，求线段AD长度的取值范围。"
HINT = "Hint: Please answer the question requiring an integer answer and provide the final value at the end."
OTHERS = [
    "How many red apples are on the table next to the window of the kitchen?",
    "Describe the weather in this photograph of a mountain lake taken in autumn.",
    "图中的城市里有多少座桥横跨在河流之上，请逐一数出并说明它们各自的名称和建造年代。",
    "A train leaves the station at nine and another at ten; how far apart are they at noon if both drive at 80 km/h?",
]


def photograph(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Smooth coloured areas with some detail, as a photograph has."""
    generator = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells, weight in ((4, 0.55), (12, 0.3), (40, 0.15)):
        grid = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(grid.resize(size, Image.Resampling.BICUBIC), dtype=float) * weight
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def chart(seed: int) -> Image.Image:
    """Five bars between equal axes: pictures of one kind, which 64 bits alone confuse."""
    generator = random.Random(seed)
    image = Image.new("RGB", (500, 400), "white")
    draw = ImageDraw.Draw(image)
    draw.line([(50, 20), (50, 350), (480, 350)], fill="black", width=2)
    for bar in range(5):
        draw.rectangle([80 + 80 * bar, 350 - generator.randint(30, 300), 130 + 80 * bar, 350], fill="steelblue")
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def copied(image: Image.Image, scale: float, quality: int) -> bytes:
    size = (round(image.width * scale), round(image.height * scale))
    return encoded(image.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=quality)


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_tsv(path, rows: list[dict]):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("evaluation")
    rows = [
        {"index": 10, "question": LONG, "image": text64(encoded(photograph(1)))},
        {"index": 11, "question": SHORT, "image": "10"},  # the picture of row 10
        {"index": 12, "question": GENERIC, "image": text64(encoded(photograph(2), "JPEG", quality=95))},
        {"index": 13, "question": CHINESE, "image": repr([text64(encoded(photograph(3))), text64(encoded(chart(0)))])},
        {"index": 14, "question": 'He said "no"\tand left', "image": text64(b"this is not a picture" * 10)},
        {"index": 15, "question": "flat", "image": text64(encoded(Image.new("RGB", (90, 90), "white")))},
        *(
            {"index": 20 + n, "question": f"{HINT} {question}", "image": text64(encoded(chart(100 + n)))}
            for n, question in enumerate(OTHERS)
        ),
    ]
    first = write_tsv(folder / "Bench.tsv", rows)
    second = write_tsv(
        folder / "Text.tsv", [{"index": "a1", "question": "Which planet has rings made of ice and dust?"}]
    )
    return Index.read([first, second])


@pytest.mark.parametrize(("scale", "quality"), [(1.0, 90), (0.5, 75), (2.0, 60), (0.4, 30)])
@pytest.mark.parametrize(("seed", "row"), [(1, 10), (2, 12), (3, 13)])
def test_a_copy_of_an_evaluation_picture_is_hit(index, seed, row, scale, quality):
    hit = index.picture_hit(copied(photograph(seed), scale, quality))
    assert hit is not None
    assert hit.startswith(f"Bench.tsv row {row}, ")


def test_another_picture_is_not_hit(index):
    assert [index.picture_hit(encoded(photograph(seed))) for seed in range(50, 90)] == [None] * 40


def test_charts_of_one_kind_are_told_apart(tmp_path):
    """The control is the same index without the second hash: it confuses some of them."""
    shown, others = range(200), range(1000, 1300)
    rows = [{"index": seed, "image": text64(encoded(chart(seed)))} for seed in shown]
    index = Index.read([write_tsv(tmp_path / "Charts.tsv", rows)])
    assert [seed for seed in others if index.picture_hit(encoded(chart(seed)))] == []
    for seed in (0, 7, 199):
        assert index.picture_hit(copied(chart(seed), 0.5, 60)).startswith(f"Charts.tsv row {seed}, ")
    index.flags = index.flags | 1  # as if all were too small for the second hash
    assert [seed for seed in others if index.picture_hit(encoded(chart(seed)))] != []


def test_blank_pictures_are_only_the_same_when_their_bytes_are(index):
    assert index.picture_hit(encoded(Image.new("RGB", (90, 90), "white"))) == "Bench.tsv row 15, the same file"
    assert index.picture_hit(encoded(Image.new("RGB", (80, 80), "white"))) is None
    assert index.picture_hit(encoded(Image.new("RGB", (90, 90), "black"))) is None


def test_modes_of_one_picture_look_alike():
    picture = photograph(5)
    plain = Look.at(encoded(picture))
    rgba = picture.convert("RGBA")
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    for other in (
        encoded(rgba),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture.quantize(256)),
        encoded(deep),
    ):
        look = Look.at(other)
        assert (look.coarse ^ plain.coarse).bit_count() <= 4
    hole = rgba.copy()
    hole.putalpha(0)
    assert Look.at(encoded(hole)).coarse is None  # nothing of it is seen: flat white
    assert Look.at(b"no picture") is None


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (LONG, "Bench.tsv row 10"),
        (f"<image>\n{LONG.upper()}\nAnswer with a number.", "Bench.tsv row 10"),
        ("Say how: " + " ".join(LONG.split()[5:19]), "Bench.tsv row 10"),  # 14 words from its middle
        (SHORT, "Bench.tsv row 11"),
        ("Look! which  of the four islands, lies furthest from the port?", "Bench.tsv row 11"),  # 8 of 10 words
        (CHINESE, "Bench.tsv row 13"),
        ("问题：" + CHINESE[5:35] + "？请简要回答。", "Bench.tsv row 13"),
        ("WHICH PLANET HAS RINGS MADE OF ICE AND DUST", "Text.tsv row a1"),
    ],
)
def test_a_question_of_an_evaluation_set_is_hit(index, text, row):
    assert index.question_hit(text) == row


@pytest.mark.parametrize(
    "text",
    [
        "",
        GENERIC,  # asked of many pictures
        " ".join(LONG.split()[5:17]),  # 12 words of a long question
        "Which of the four islands is nearest to the harbour?",  # 5 words in a row
        "Two pipes fill a tank in four and five hours; how long does it take when both are open?",
        "如图所示，在四边形ABCD中，对角线AC与BD相交于点O，求证四边形ABCD是平行四边形。",
        f"{HINT} How many sides has this polygon?",  # the hint stands before four evaluation questions
        "请描述这张图片的内容。",
    ],
)
def test_an_unrelated_question_is_not_hit(index, text):
    assert index.question_hit(text) is None


def test_a_run_is_evidence_until_too_many_items_share_it(tmp_path):
    rows = [{"index": n, "question": f"{HINT} {question}"} for n, question in enumerate(OTHERS[:3])]
    path = write_tsv(tmp_path / "Three.tsv", rows)
    assert Index.read([path]).question_hit(HINT) == "Three.tsv row 0"
    assert Index.read([path], common=2).question_hit(HINT) is None
    # The same item again, as VLMEvalKit stores it for another order of the options, is no further item.
    again = [{**row, "index": 100 + row["index"]} for row in rows for _ in range(3)]
    assert Index.read([write_tsv(tmp_path / "Twelve.tsv", rows + again)]).question_hit(HINT) == "Twelve.tsv row 0"


def test_a_question_repeated_for_many_pictures_is_not_evidence(tmp_path):
    def read(count: int) -> Index:
        rows = [{"index": n, "question": SHORT, "image": text64(encoded(photograph(n)))} for n in range(count)]
        return Index.read([write_tsv(tmp_path / f"{count}.tsv", rows)])

    assert read(3).question_hit(SHORT) == "3.tsv row 0"
    assert read(4).question_hit(SHORT) is None


def test_tokens_and_run_lengths():
    assert tokens("<image>\nＡ cat's  3.5 kg_x") == ["a", "cat", "s", "3", "5", "kg", "x"]
    assert tokens("这是cat，ok") == ["这", "是", "cat", "ok"]
    assert tokens("วันนี้")[0] == "ว"
    assert [run_length(["word"] * n) for n in (7, 8, 10, 16, 17, 100)] == [None, 7, 8, 13, 13, 13]
    assert [run_length(["字"] * n) for n in (11, 12, 24, 25, 100)] == [None, 10, 20, 20, 20]


def test_summary_and_saved_index(index, tmp_path):
    assert index.summary == {
        "Bench.tsv": {
            "rows": 10,
            "pictures": 9,
            "pictures that do not decode": 1,
            "questions": 7,
            "questions too short": 3,
        },
        "Text.tsv": {
            "rows": 1,
            "pictures": 0,
            "pictures that do not decode": 0,
            "questions": 1,
            "questions too short": 0,
        },
    }
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    assert (again.names, again.summary, again.distance) == (index.names, index.summary, index.distance)
    assert again.picture_hit(copied(photograph(1), 0.5, 75)) == index.picture_hit(copied(photograph(1), 0.5, 75))
    assert again.question_hit(CHINESE) == "Bench.tsv row 13"
    assert [path.name for path in tmp_path.iterdir()] == ["index.npz"]
    whole = (tmp_path / "index.npz").read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 255
    for torn in (b"", whole[:100], whole[:-1], bytes(len(whole)), bytes(changed)):
        (tmp_path / "index.npz").write_bytes(torn)
        with pytest.raises(ValueError):  # noqa: PT011  (whatever numpy or zip says of it)
            Index.load(tmp_path / "index.npz")


def test_files_that_are_no_evaluation_sets_are_refused_together(tmp_path):
    (tmp_path / "a.tsv").write_text("number\tname\n1\tx\n")
    (tmp_path / "b.tsv").write_bytes(b"")
    (tmp_path / "d.tsv").write_bytes(b"question\n\xff\xfe\n")
    with pytest.raises(UserError) as error:
        Index.read([tmp_path / name for name in ("a.tsv", "b.tsv", "c.tsv", "d.tsv")])
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    assert "its first line has number, name" in lines[1]
    assert "its first line has nothing" in lines[2]
    assert "c.tsv: No such file" in lines[3]
    assert "d.tsv" in lines[4]


def test_files_that_keep_nothing_out_are_refused_together(tmp_path):
    """Control: one good picture, or one question of some length, is enough."""
    header = {"index": 1, "question": "", "image": ""}
    broken = text64(b"this is not a picture" * 10)
    files = {
        "no rows.tsv": [],
        "no pictures.tsv": [{**header, "image": broken}, {**header, "question": LONG, "image": broken}],
        "short.tsv": [{**header, "question": GENERIC}],
        "empty.tsv": [header],
        "one picture.tsv": [{**header, "image": broken}, {**header, "image": text64(encoded(photograph(1)))}],
        "one question.tsv": [{**header, "question": GENERIC}, {**header, "question": SHORT}],
    }
    paths = {name: write_tsv(tmp_path / name, rows or [header]) for name, rows in files.items()}
    paths["no rows.tsv"].write_text("index\tquestion\timage\n")
    with pytest.raises(UserError) as error:
        Index.read(list(paths.values()))
    lines = str(error.value).splitlines()[1:]
    assert [line.split(": ", 1)[1] for line in lines] == [
        "it has no row",
        "none of its 2 pictures decodes",
        "it has no picture, and none of its 1 questions is long enough to look for",
        "it has no picture, and none of its 1 questions is long enough to look for",
    ]
    assert [name in line for name, line in zip(paths, lines, strict=False)] == [True] * 4
    assert Index.read([paths["one picture.tsv"], paths["one question.tsv"]]).question_hit(SHORT)


def test_a_list_of_pictures_is_not_evaluated(tmp_path):
    trap = tmp_path / "ran"
    code = f"[__import__('pathlib').Path('{trap}').touch(), 'x', '{text64(encoded(photograph(9)))}']"
    index = Index.read([write_tsv(tmp_path / "Trap.tsv", [{"index": 1, "question": "q", "image": code}])])
    assert not trap.exists()
    assert index.picture_hit(encoded(photograph(9))) == "Trap.tsv row 1, the same file"
