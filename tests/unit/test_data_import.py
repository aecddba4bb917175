"""A user's own sets: JSON with image, video and conversations, shares, and what is refused.

.venv/bin/python -m pytest tests/unit/test_data_import.py
"""

import difflib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from clips import trim, write_clip
from own_sets import make_pictures, row, turns, write_sets
from qwen_merge import cli
from qwen_merge.data import json_rows, own_import
from qwen_merge.data.frames import FrameOptions, chosen
from qwen_merge.data.manifest import Manifest, manifest_path
from qwen_merge.data.own_rows import NO_IMPORT, expanded
from qwen_merge.data.own_units import drawn
from qwen_merge.errors import UserError
from worker_processes import until

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    make_pictures(tmp_path / "pictures", ["a.png", "b.png", "c.png"])
    return tmp_path


def run(folder: Path, *arguments: object) -> int:
    registry = () if "--sets" in arguments else ("--sets", folder / "sets.yaml")
    return cli.main(list(map(str, ["data", "import", "--output", folder / "data", *registry, *arguments])))


def rows_of(folder: Path, name: str) -> list[dict]:
    return [
        row for path in sorted((folder / "data" / name).glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def numbers(folder: Path, name: str) -> list[int]:
    return [int(row["messages"][1]["content"].split()[-1].rstrip(".")) for row in rows_of(folder, name)]


SOUND = [
    row(0, "<image>\nWhat is it?", image="a.png"),
    row(1, "First <image>, then <image>: which?", image=["b.png", "a.png"]),
    row(2, "Who wrote it?"),
    {"image": ["c.png"], "conversations": turns("Look.", "I do.", "At <image>?", "A shape."), "width": 3},
]


@pytest.mark.parametrize("lines", [False, True], ids=["JSON", "JSONL"])
def test_rows_become_records_with_the_bytes_of_their_pictures(folder, lines):
    absolute = row(4, "<image>?", image=str(folder / "pictures/b.png"))
    write_sets(folder, {"mine": [*SOUND, absolute]}, lines=lines)
    assert run(folder, "mine") == 0
    found = rows_of(folder, "mine")
    assert found[1]["messages"] == [
        {"role": "user", "content": "First <image>, then <image>: which?"},
        {"role": "assistant", "content": "It is number 1."},
    ]
    pictures = [[(folder / "pictures" / name).read_bytes() for name in names] for names in ("a", "ba", "", "c", "b")
                for names in [[f"{letter}.png" for letter in names]]]  # fmt: skip
    assert [[image["bytes"] for image in row["images"]] for row in found] == pictures
    assert len(found[3]["messages"]) == 4
    info = json.loads((folder / "data/dataset_info.json").read_text())
    assert info["mine"]["file_name"] == "mine"
    manifest = Manifest.read(manifest_path(folder / "data", "mine"))
    assert (manifest.counts.rows_in, manifest.counts.rows_out, manifest.counts.drops) == (5, 5, {})
    assert manifest.extra["pictures"] == {"PNG RGB": 5}


def test_without_data_path_paths_begin_at_the_annotations(folder):
    registry = write_sets(folder / "pictures", {"mine": SOUND[:1]}, data_path=None)
    assert run(folder, "mine", "--sets", registry) == 0
    assert len(rows_of(folder, "mine")) == 1


def test_the_registry_may_be_json(folder):
    write_sets(folder, {"mine": SOUND})
    entry = {"mine": {"annotation_path": str(folder / "mine.json"), "data_path": str(folder / "pictures")}}
    (folder / "sets.json").write_text(json.dumps(entry))
    assert run(folder, "mine", "--sets", folder / "sets.json") == 0


def test_the_tracked_list_of_sets_grows_by_the_new_entries_alone(folder):
    """Its other lines stay, so that `git diff` shows a user what is theirs."""
    info = folder / "data/dataset_info.json"
    info.parent.mkdir()
    before = (REPOSITORY / "data/dataset_info.json").read_text()
    info.write_text(before)
    write_sets(folder, {"mine": SOUND, "größe": SOUND})
    assert run(folder, "mine%50", "größe") == 0
    changes = [line[0] for line in difflib.ndiff(before.splitlines(), info.read_text().splitlines())]
    assert Counter(changes) == {" ": len(before.splitlines()), "+": 2 * 6}
    content = json.loads(info.read_text())
    assert list(content)[-2:] == ["mine%50", "größe"]
    own = json.loads(before)
    assert {name: content[name] for name in own} == own
    assert content["mine%50"] == next(iter(own.values())) | {"file_name": "mine%50"}
    assert '"größe": {' in info.read_text()


# Shares


@pytest.mark.parametrize(("share", "wanted"), [("50", 100), ("12.5", 25), ("100", 200), ("0.5", 1), ("33", 66)])
def test_a_share_is_exact_and_the_same_for_a_seed(folder, share, wanted):
    write_sets(folder, {"mine": [row(number, "Which?") for number in range(200)]})
    name = f"mine%{share}"
    assert run(folder, name) == 0
    first = numbers(folder, name)
    assert len(first) == wanted == len(set(first))
    assert first == sorted(first)
    assert run(folder, name, "--overwrite") == 0
    assert numbers(folder, name) == first
    assert run(folder, name, "--overwrite", "--seed", "1") == 0
    assert (numbers(folder, name) != first) == (0 < wanted < 200)
    drops = Manifest.read(manifest_path(folder / "data", name)).counts.drops
    assert sum(drop["rows"] for drop in drops.values()) == 200 - wanted


def test_every_row_has_the_same_chance():
    found = Counter()
    for seed in range(4000):
        taken = list(drawn(8, 2, seed, "mine"))
        assert sum(taken) == 2
        found.update(number for number, yes in enumerate(taken) if yes)
    assert min(found.values()) > 900
    assert max(found.values()) < 1100
    assert list(drawn(3, 3, 0, "")) == [True] * 3


def test_sets_and_their_shares_stand_side_by_side(folder):
    write_sets(folder, {"mine": [row(number, "Which?") for number in range(20)], "other": SOUND})
    assert run(folder, "mine%50,other") == 0
    assert run(folder, "mine%10") == 0
    info = json.loads((folder / "data/dataset_info.json").read_text())
    assert list(info) == ["mine%50", "other", "mine%10"]
    assert [len(rows_of(folder, name)) for name in info] == [10, 4, 2]
    assert not set(numbers(folder, "mine%10")) - set(range(20))


def test_a_finished_set_is_not_made_again_and_other_annotations_are_noticed(folder, capsys):
    write_sets(folder, {"mine": SOUND})
    assert run(folder, "mine") == 0
    assert run(folder, "mine") == 0
    assert "finished already" in capsys.readouterr().err
    write_sets(folder, {"mine": SOUND[:2]})
    assert run(folder, "mine") == 2
    assert "digest of annotation_path" in capsys.readouterr().err
    assert len(rows_of(folder, "mine")) == 4
    assert run(folder, "mine", "--overwrite") == 0
    assert len(rows_of(folder, "mine")) == 2


# What is wrong is told together, and nothing is written


WRONG = [
    (row(1, "<image>", image=["a.png"] * 2), "<image> tags and files of 'image' differ in number", "1 tags, 2 files"),
    (row(2, "No tag", image="a.png"), "<image> tags and files of 'image' differ in number", "0 tags, 1 files"),
    (row(3, "<image>?"), "<image> tags and files of 'image' differ in number", "1 tags, 0 files"),
    (row(4, "<video>?", image="a.png"), "<image> tags and files of 'image' differ in number", "0 tags, 1 files"),
    (row(5, "<video>?"), "<video> tags and files of 'video' differ in number", "1 tags, 0 files"),
    (row(6, "<image>?", image="z.png"), "a file is missing", "z.png"),
    (row(6, "<image>?", image="A" * 5000), "a file is missing", "AAA"),  # a picture in base64, say
    (row(7, "<image>?", image="../mine.png"), "a file is missing", "mine.png"),
    ({"conversations": turns("Hm?", "An <image>")}, "<image> in an answer", "An <image>"),
    ({"conversations": turns("Hm?", "A <|im_end|>")}, "special token of the model in the text", "<|im_end|>"),
    ({"conversations": turns("Hm?", "A <|image_pad|>")}, "special token of the model in the text", "<|image_pad|>"),
    ({"conversations": turns("Hm?")}, "turns do not alternate human, gpt", "human"),
    ({"conversations": turns("Hm?", " ")}, "an empty turn", "Hm?"),
    ({"conversations": [{"role": "user", "content": "Hm?"}]}, "a turn is not text", "user"),
    ({"image": "a.png"}, "no conversation", "None"),
    (
        {"messages": [{"role": "user", "content": "Hm?"}], "images": ["a.png"]},
        NO_IMPORT,
        "Hm?",
    ),
    ({"image": 3, "conversations": turns("Hm?", "No.")}, "'image' is neither a path nor a list of paths", "3"),
    ({"conversations": turns("<audio>Hm?", "No.")}, "video or audio tag", "<audio>"),
    (["a row"], "a row is no JSON object", "a row"),
]  # fmt: skip


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_written(folder, capsys):
    write_sets(folder, {"mine": [*SOUND, *(bad for bad, *_ in WRONG)], "other": [row(0, "<image>", image="no.png")]})
    (folder / "torn.json").write_text('[{"conversations": [}]')
    registry = (folder / "sets.yaml").read_text() + "torn: {annotation_path: torn.json}\n"
    (folder / "sets.yaml").write_text(registry)
    assert run(folder, "mine%50", "other", "torn") == 2
    said = capsys.readouterr().err
    for reason, count in Counter(reason for _, reason, _ in WRONG).items():
        assert f"mine%50: {count} rows: {reason}" in said
    assert "1 tags, 2 files" in said
    assert "row 4 (id n1)" in said
    assert "other: 1 rows: a file is missing, such as row 0 (id n0)" in said
    assert "torn: " in said
    assert "row 0 is no JSON" in said
    assert not (folder / "data").exists()


@pytest.mark.parametrize(("bad", "reason", "example"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_row_is_dropped_and_counted_when_asked(folder, capsys, bad, reason, example):
    write_sets(folder, {"mine": [*SOUND, bad]})
    assert run(folder, "mine") == 2
    said = capsys.readouterr().err
    assert f"mine: 1 rows: {reason}" in said
    assert example in said
    assert run(folder, "mine", "--drop") == 0
    counts = Manifest.read(manifest_path(folder / "data", "mine")).counts
    assert (counts.rows_in, counts.rows_out) == (5, 4)
    assert {name: drop["rows"] for name, drop in counts.drops.items()} == {reason: 1}
    assert len(rows_of(folder, "mine")) == 4


def test_pictures_that_do_not_decode_are_told_together_and_their_sets_not_written(folder, capsys):
    whole = (folder / "pictures/a.png").read_bytes()
    (folder / "pictures/torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "pictures/clip.mp4").write_bytes(b"no clip")
    bad = [row(7, "<image>", image="torn.png"), row(8, "<video>", video="clip.mp4")]
    write_sets(folder, {"mine": [*SOUND, *bad], "sound": SOUND, "other": bad[:1]})
    assert run(folder, "mine", "sound", "other") == 2
    said = capsys.readouterr().err
    assert "mine: 1 rows: picture does not decode, such as row 4 (id n7)" in said
    assert "mine: 1 rows: video does not decode, such as row 5 (id n8)" in said
    assert "other: 1 rows: picture does not decode" in said
    assert "give --resume --drop to leave them out" in said
    assert [path.name for path in (folder / "data").iterdir() if path.name[0] != "." and path.is_dir()] == ["sound"]
    assert list(json.loads((folder / "data/dataset_info.json").read_text())) == ["sound"]
    assert run(folder, "mine") == 2
    assert "half done" in capsys.readouterr().err
    (folder / "pictures/torn.png").write_bytes(whole)  # mended
    assert run(folder, "other", "--resume") == 0
    assert run(folder, "mine", "--resume") == 2  # the control: the clip is not
    assert "video does not decode" in capsys.readouterr().err
    assert run(folder, "mine", "--resume", "--drop") == 0
    assert Manifest.read(manifest_path(folder / "data", "mine")).counts.drops.keys() == {"video does not decode"}


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        (["mine", "its"], {}, "its is not in"),
        (["mine%0"], {}, "'mine%0': expected a name, or a name and a share of up to 100"),
        (["mine%101"], {}, "share of up to 100"),
        (["mine%x"], {}, "share of up to 100"),
        (["mine%50", "mine"], {}, "mine is named twice"),
        (["mine"], {"mine": {"data_path": "pictures"}}, "mine: expected annotation_path"),
        (["mine"], {"mine": {"annotation_path": "no.json"}}, "no.json is no file"),
        (["mine"], {"mine": {"annotation_path": "mine.json", "data_path": "no"}}, "no is no folder"),
        (["mine"], {"mine": {"annotation_path": "mine.json", "path": "no"}}, "mine: unknown key 'path'"),
        (["mine"], {"mine": {"annotation_path": 3}}, "annotation_path is 3; expected a path"),
        (["mine"], {"mine%50": {}}, "an entry for each set"),
        ([".."], {"..": {"annotation_path": "mine.json"}}, "no dot at its beginning"),
        (["x"], {"dataset_info.json": {"annotation_path": "mine.json"}}, "dataset_info.json is taken"),
        ([","], {}, "no set is named"),
    ],
)
def test_wrong_names_and_entries(folder, capsys, names, content, message):
    registry = write_sets(folder, {"mine": SOUND})
    if content:
        registry.write_text(json.dumps(content))
    assert run(folder, *names) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "data").exists()


def test_a_name_that_another_set_has_is_refused(folder, capsys):
    """A training would read the other one: what is enlisted stays as it is."""
    write_sets(folder, {"mine": SOUND})
    (folder / "data").mkdir()
    enlisted = {"mine": {"file_name": "converted/mine"}}
    (folder / "data/dataset_info.json").write_text(json.dumps(enlisted))
    assert run(folder, "mine") == 2
    assert "has another set of the name mine, in 'converted/mine'" in capsys.readouterr().err
    assert [path.name for path in (folder / "data").iterdir()] == ["dataset_info.json"]
    assert run(folder, "mine%50") == 0  # the control: a name of its own
    assert json.loads((folder / "data/dataset_info.json").read_text())["mine%50"]["file_name"] == "mine%50"
    assert run(folder, "mine%50", "--overwrite") == 0


def test_several_wrong_names_are_told_together(folder, capsys):
    write_sets(folder, {"mine": SOUND})
    assert run(folder, "its", "mine%0", "ours%5") == 2
    said = capsys.readouterr().err
    assert "its is not in" in said
    assert "'mine%0'" in said
    assert "ours is not in" in said


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([], ["mine"], "mine.json has no row"),
        (SOUND, ["mine%20"], "mine%20: 20 percent of 4 rows are less than one row. Take more, at least 25"),
        ([row(0, "<image>")], ["mine", "--drop"], "mine: none of its 1 rows can be used (1: <image> tags and files"),
        ([row(0, "<image>", image="torn.png")], ["mine", "--drop"], "mine: none of the 1 rows can be used (1: picture"),
    ],
)
def test_a_set_without_rows_is_an_error(folder, capsys, rows, arguments, message):
    """LLaMA-Factory loads no set without rows, and what ends well has written one."""
    (folder / "pictures/torn.png").write_bytes(b"torn")
    write_sets(folder, {"mine": rows})
    assert run(folder, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("data/**/*.parquet"))
    assert not (folder / "data/dataset_info.json").exists()
    write_sets(folder, {"mine": SOUND})  # the control, and nothing stands in its way
    assert run(folder, "mine%25", "--drop") == 0
    assert len(rows_of(folder, "mine%25")) == 1


# Videos


@pytest.mark.parametrize(
    ("frames", "seconds", "wanted"),
    [
        (100, 2.0, [0, 33, 66, 99]),  # two a second
        (100, 1.0, [0, 33, 66, 99]),  # at least four
        (1000, 60.0, [round(number * 999 / 7) for number in range(8)]),  # at most eight
        (3, 60.0, [0, 1, 2]),  # never more than there are
        (1, 0.0, [0]),
    ],
)
def test_which_frames_are_taken(frames, seconds, wanted):
    assert chosen(frames, seconds, FrameOptions()) == wanted


def test_a_video_becomes_its_frames_where_its_tag_was(folder):
    write_clip(folder / "pictures/clip.mp4", frames=30, rate=10.0, size=(84, 56))
    question = "<image>\nLike this? <video>\nAnd <image>?"
    write_sets(folder, {"mine": [row(0, question, image=["a.png", "b.png"], video="clip.mp4")]})
    bounds = ("--video-min-pixels", "16*28*28", "--video-max-pixels", "64*28*28", "--video-fps", "1")
    assert run(folder, "mine", *bounds, "--video-min-frames", "2") == 0
    (found,) = rows_of(folder, "mine")
    assert found["messages"][0]["content"] == "<image>\nLike this? <image><image><image>\nAnd <image>?"
    images = [Image.open(io.BytesIO(image["bytes"])) for image in found["images"]]
    assert [image.format for image in images] == ["PNG", "JPEG", "JPEG", "JPEG", "PNG"]
    for image in images[1:4]:
        assert image.width * image.height == pytest.approx(16 * 28 * 28, rel=0.02)
        assert image.width / image.height == pytest.approx(84 / 56, rel=0.02)
    reds = [image.convert("RGB").resize((1, 1)).getpixel((0, 0))[2] for image in images[1:4]]
    assert reds == sorted(reds)
    assert reds[2] - reds[0] > 150
    manifest = Manifest.read(manifest_path(folder / "data", "mine"))
    assert manifest.extra["frames of videos"] == 3


def test_a_video_with_fewer_frames_than_it_announces_is_taken(folder):
    """Its frames are those of what is shown, from its first to its last."""
    import av

    whole = write_clip(folder / "pictures/whole.mp4", frames=48, rate=24.0)
    cut = trim(whole, folder / "pictures/cut.mp4", 7 / 24)
    with av.open(str(cut)) as video:  # the control: it is such a video
        announced, shown = video.streams.video[0].frames, list(video.decode(video=0))
    assert (announced, len(shown)) == (48, 41)
    write_sets(folder, {"mine": [row(0, "<video>?", video="cut.mp4")], "other": [row(0, "<video>?", video="no.mp4")]})
    assert run(folder, "mine", "--video-max-pixels", "84*56", "--video-min-pixels", "84*56") == 0
    (found,) = rows_of(folder, "mine")
    blues = [Image.open(io.BytesIO(image["bytes"])).getpixel((40, 30))[2] for image in found["images"]]
    expected = [shown[number].to_image().getpixel((40, 30))[2] for number in (0, 13, 27, 40)]
    assert blues == pytest.approx(expected, abs=4)
    assert min(b - a for a, b in pairwise(blues)) > 20
    # The control: of a video whose end was cut off, index and all, no frame comes.
    (folder / "pictures/no.mp4").write_bytes(whole.read_bytes()[:900])
    assert run(folder, "other") == 2


@pytest.mark.parametrize("pair", [("--video-min-frames", "9"), ("--video-max-pixels", "28*28")])
def test_bounds_that_cross_are_refused(folder, capsys, pair):
    write_sets(folder, {"mine": SOUND})
    assert run(folder, "mine", *pair) == 2
    assert "expected no more than that" in capsys.readouterr().err


def test_tags_are_counted_in_their_order():
    messages = [{"role": "user", "content": "<video><image>"}, {"role": "assistant", "content": "x"}]
    assert expanded(messages, [2, 1])[0]["content"] == "<image><image><image>"


# Reading JSON in pieces


TEXTS = [{"text": "x" * (number % 41), "more": [1, {"é": "]}, ["}]} for number in range(60)]


@pytest.mark.parametrize("piece", [1, 7, 2**20])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TEXTS),
        json.dumps(TEXTS, indent=1, ensure_ascii=False),
        "\ufeff \n" + json.dumps(TEXTS),
        "\n".join(map(json.dumps, TEXTS)),
        "\n\n" + "\n \n".join(map(json.dumps, TEXTS)) + "\n",
    ],
)
def test_rows_of_a_file_in_pieces(tmp_path, monkeypatch, piece, text):
    monkeypatch.setattr(json_rows, "PIECE", piece)
    (tmp_path / "rows").write_text(text, encoding="utf-8")
    assert list(json_rows.rows(tmp_path / "rows")) == list(enumerate(TEXTS))


@pytest.mark.parametrize("text", ["[", "[{}", "[{},", "[{} {}]", "[{}]x", '[{}, {"b"]', "{}\n{", "{} {}", "[{},]"])
def test_what_is_no_json_is_an_error(tmp_path, text):
    (tmp_path / "rows").write_text(text)
    with pytest.raises(UserError, match=r"no JSON|expected one array"):
        list(json_rows.rows(tmp_path / "rows"))


def test_memory_does_not_grow_with_the_annotations(tmp_path):
    def peak(rows: int) -> int:
        text = json.dumps([row(0, "x" * 500)] * rows)
        (tmp_path / "rows").write_text(text)
        del text
        tracemalloc.start()
        assert sum(1 for _ in json_rows.rows(tmp_path / "rows")) == rows
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    size = os.path.getsize
    small = peak(4_000), size(tmp_path / "rows")
    large = peak(40_000), size(tmp_path / "rows")
    assert large[1] > 9 * small[1]
    assert large[0] < 1.2 * small[0]
    assert large[0] < large[1] / 2


# Killed, and more than one worker


def content(folder: Path) -> dict[str, str]:
    """File to sha256, of everything but hidden folders."""
    files = [path for path in folder.rglob("*") if path.is_file() and "/." not in str(path.relative_to(folder.parent))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


PARTS = 36


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Sets of 36 parts, 11 rows each with --shard-mb 1; of the second the first and the last row cannot be used."""
    folder, dice = tmp_path_factory.mktemp("many"), random.Random(7)
    (folder / "pictures").mkdir()
    for number in range(20):  # noise: a PNG of 90,000 bytes
        Image.frombytes("RGB", (200, 150), dice.randbytes(90_000)).save(folder / f"pictures/{number}.png")
    rows = [row(number, "<image>?", image=f"{number % 20}.png") for number in range(11 * PARTS)]
    (folder / "pictures/torn.png").write_bytes((folder / "pictures/0.png").read_bytes()[:80_000])
    Image.new("RGB", (300_000, 1)).save(folder / "pictures/thin.png")
    torn, thin = (row(number, "<image>?", image=f"{name}.png") for number, name in enumerate(("torn", "thin")))
    write_sets(folder, {"mine": rows, "broken": [torn, *rows[:-1], thin]})
    assert run(folder, "mine", "broken", "--drop", "--shard-mb", "1", "--output", folder / "reference") == 0
    return folder


def units_done(output: Path) -> int:
    journal = output / ".mine.working/journal.jsonl"
    return journal.read_bytes().count(b'"imported"') if journal.is_file() else 0


def set_of(output: Path, name: str) -> dict[str, str]:
    return {file: digest for file, digest in content(output).items() if file.startswith(name)}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_import_that_was_killed_goes_on_and_gives_the_same_bytes(many, tmp_path, capsys, workers):
    arguments = ["mine", "--sets", many / "sets.yaml", "--output", tmp_path, "--shard-mb", "1", "--workers", workers]
    command = list(map(str, ["data", "import", *arguments]))
    killed = subprocess.Popen(
        [sys.executable, "-m", "qwen_merge.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
    )
    until(lambda: units_done(tmp_path), 60, "a part was done", killed)
    killed.kill()
    killed.wait()
    killed.stdout.close()
    before = units_done(tmp_path)
    assert 0 < before < PARTS
    assert content(tmp_path) == {}  # nothing that a training would take for the set
    (line, *_) = (tmp_path / ".mine.working/journal.jsonl").read_text().splitlines()
    assert json.loads(line)["planned"] == PARTS
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".mine.working/shards").glob("*.parquet")}
    assert cli.main(command) == 2
    assert "half done" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert f"mine: {before} of {PARTS} parts were imported before" in capsys.readouterr().err
    expected = set_of(many / "reference", "mine")
    assert len(expected) == PARTS + 1  # and the manifest
    assert set_of(tmp_path, "mine") == expected
    kept = [name for name, time in shards.items() if (tmp_path / "mine" / name).stat().st_mtime_ns == time]
    assert len(kept) >= before  # not written again


def test_control_of_another_draw_the_bytes_are_others(many, tmp_path):
    for seed in ("0", "1"):
        assert run(many, "mine%25", "--seed", seed, "--output", tmp_path / seed) == 0
    first, second = (set_of(tmp_path / seed, "mine") for seed in ("0", "1"))
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


def test_all_that_cannot_be_opened_is_told_at_once_and_the_rest_is_kept(many, tmp_path, capsys):
    arguments = ("broken", "--shard-mb", "1", "--output", tmp_path)
    assert run(many, *arguments) == 2
    said = capsys.readouterr().err
    assert "broken: 1 rows: picture does not decode, such as row 0" in said
    assert f"broken: 1 rows: picture is too thin to be shrunk, such as row {11 * PARTS}" in said
    shards = tmp_path / ".broken.working/shards"
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.parquet")}
    assert len(before) == PARTS
    assert not (tmp_path / "dataset_info.json").exists()
    assert run(many, *arguments, "--resume", "--drop") == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "broken").iterdir()}
    again = {name for name in before if before[name] != after[name]}
    assert again == {"part-00000-000.parquet", f"part-{PARTS - 1:05d}-000.parquet"}  # they may have been mended
    assert set_of(tmp_path, "broken") == set_of(many / "reference", "broken")


def test_an_import_that_was_stopped_before_its_first_part_goes_on(folder, monkeypatch):
    from qwen_merge.data import own_units

    write_sets(folder, {"mine": SOUND})
    check, seen = own_units.pictures.check, []

    def stopped(data, *more):
        seen.append(data)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return check(data, *more)

    monkeypatch.setattr(own_units.pictures, "check", stopped)
    assert run(folder, "mine") == 130
    assert not (folder / "data/mine").exists()
    assert not (folder / "data/dataset_info.json").exists()
    assert run(folder, "mine", "--resume") == 0
    assert len(rows_of(folder, "mine")) == 4
    assert [path.name for path in (folder / "data").iterdir() if path.is_dir()] == ["mine"]


def test_an_import_goes_on_with_its_own_pictures_from_another_folder(folder, monkeypatch):
    """What was planned names its files whole: another folder may have others under the same names."""
    write_sets(folder, {"mine": SOUND})
    assert run(folder, "mine", "--output", folder / "reference") == 0
    run_units, elsewhere = own_import.run_units, folder / "elsewhere"
    monkeypatch.setattr(own_import, "run_units", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.chdir(folder)
    assert run(Path(), "mine", "--output", folder / "out") == 130
    monkeypatch.setattr(own_import, "run_units", run_units)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    make_pictures(elsewhere / "pictures", ["c.png", "b.png", "a.png"])
    assert run(Path(".."), "mine", "--output", folder / "out", "--resume") == 0
    assert set_of(folder / "out", "mine") == set_of(folder / "reference", "mine")


# Each answer a row of its own


def test_each_answer_becomes_a_row_with_the_turns_and_pictures_before_it(folder, capsys):
    three = {
        "image": ["b.png", "a.png"],
        "conversations": turns("Hello.", "Hello!", "<image> or <image>?", "Two.", "Sure?", "Yes."),
    }
    write_sets(folder, {"mine": [SOUND[0], three]})
    assert run(folder, "mine", "--turns", "each") == 0
    assert "get no loss" not in capsys.readouterr().err
    found = rows_of(folder, "mine")
    assert [len(row["messages"]) for row in found] == [2, 2, 4, 6]
    assert [row["messages"][-1]["content"] for row in found[1:]] == ["Hello!", "Two.", "Yes."]
    assert [len(row["images"]) for row in found] == [1, 0, 2, 2]
    pictures = [(folder / "pictures" / name).read_bytes() for name in ("b.png", "a.png")]
    assert [image["bytes"] for image in found[3]["images"]] == pictures
    manifest = Manifest.read(manifest_path(folder / "data", "mine"))
    assert (manifest.counts.rows_in, manifest.counts.rows_out, manifest.options["turns"]) == (4, 4, "each")
    # The control: as a whole, which says what is lost.
    assert run(folder, "mine", "--overwrite") == 0
    assert "2 answers will get no loss" in capsys.readouterr().err
    assert [len(row["messages"]) for row in rows_of(folder, "mine")] == [2, 6]
    assert run(folder, "mine", "--turns", "each") == 2  # of other rows
    assert '--turns: "whole" before, "each" now' in capsys.readouterr().err
