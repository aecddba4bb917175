"""Converting ReCap, SynthDoG and OneVision: row by row what comes out, and where every other row went.

.venv/bin/python -m pytest tests/unit/test_data_convert.py
"""

import base64
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_sources import (
    broken_pictures,
    jpeg,
    large_png,
    noise,
    odd_pictures,
    page,
    png,
    recap_features,
    recap_row,
    synthdog_features,
    turns,
    write_arrow,
    write_parquet,
    write_recap,
    write_tar,
)
from qwen_merge import cli
from qwen_merge.data import conversations, sample
from qwen_merge.data import convert as converting
from qwen_merge.data.conversations import Dropped
from qwen_merge.data.convert import Options
from qwen_merge.data.manifest import Manifest
from qwen_merge.data.sets import SETS
from qwen_merge.data.sources import Source
from qwen_merge.data.workspace import Workspace
from qwen_merge.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CAPTION = turns("<image>\nWhat is it?", "A picture.")


def convert(name: str, source: Path, output: Path, *options: str, code: int = 0) -> Manifest | None:
    arguments = ["data", "convert", name, "--input", str(source), "--output", str(output), *options]
    assert cli.main(arguments) == code
    path = output / f"{SETS[name].file_name}.manifest.json" if name in SETS else output
    return Manifest.read(path) if path.is_file() else None


def rows(output: Path, name: str) -> list[tuple]:
    """All rows of a set in the shards' order, as (role and text of each turn, pictures)."""
    found = []
    for path in sorted((output / SETS[name].file_name).iterdir()):
        for row in pq.read_table(path).to_pylist():
            assert {image["path"] for image in row["images"]} <= {None}
            messages = [(message["role"], message["content"]) for message in row["messages"]]
            found.append((messages, [image["bytes"] for image in row["images"]]))
    return found


def dialogue(*texts: str) -> list[tuple[str, str]]:
    return [(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


# Conversations: what comes in, and either what goes out or why nothing does

SHORT = [("user", "<image>\nq"), ("assistant", "a")]
CASES: dict[str, tuple[object, list | str]] = {
    "as it should be": (turns("<image>\nq", "a"), SHORT),
    "tag missing": (turns("q", "a"), SHORT),
    "tag at the end": (turns("q <image>", "a"), dialogue("q <image>", "a")),
    "tag in a later question": (turns("q", "a", "<image> r", "b"), dialogue("q", "a", "<image> r", "b")),
    "several turns, no tag": (turns("q", "a", "r", "b"), dialogue("<image>\nq", "a", "r", "b")),
    "only the picture": (turns("<image>", "a"), dialogue("<image>", "a")),
    "empty question": (turns("", "a"), dialogue("<image>", "a")),
    "spaces are kept": (turns("<image>\n q ", " a\n"), dialogue("<image>\n q ", " a\n")),
    "two tags": (turns("<image><image> q", "a"), "more than one <image>"),
    "two tags in two turns": (turns("<image> q", "a", "<image> r", "b"), "more than one <image>"),
    "tag in an answer": (turns("q", "a <image>"), "<image> in an answer"),
    "video": (turns("<image><video> q", "a"), "video or audio tag"),
    "audio": (turns("<image> q", "a <audio>"), "video or audio tag"),
    "thoughts": (turns("<image> q", "<think>t</think> a"), "think tag"),
    "end of thoughts": (turns("<image> q", "a</think>"), "think tag"),
    "special token": (turns("<image> q", "a<|im_end|>"), "special token of the model in the text"),
    "picture token": (
        turns("<|vision_start|><|image_pad|><|vision_end|> q", "a"),
        "special token of the model in the text",
    ),
    "odd number": (turns("<image> q", "a", "r"), "turns do not alternate human, gpt"),
    "gpt first": (
        [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}],
        "turns do not alternate human, gpt",
    ),
    "human twice": ([{"from": "human", "value": "q"}] * 2, "turns do not alternate human, gpt"),
    "system": ([{"from": "system", "value": "s"}, *CAPTION], "a turn is of neither human nor gpt"),
    "no role": ([{"from": None, "value": "q"}, {"from": "gpt", "value": "a"}], "a turn is not text"),
    "no text": ([{"from": "human", "value": None}, {"from": "gpt", "value": "a"}], "a turn is not text"),
    "empty answer": (turns("<image> q", " \n"), "an empty turn"),
    "empty later question": (turns("<image> q", "a", "", "b"), "an empty turn"),
    "no turns": ([], "no conversation"),
    "nothing": (None, "no conversation"),
}


@pytest.mark.parametrize("case", CASES)
def test_conversations(case):
    given, expected = CASES[case]
    if isinstance(expected, str):
        with pytest.raises(Dropped) as error:
            conversations.conversation(given)
        assert error.value.reason == expected
    else:
        made = conversations.conversation(given)
        assert [(message["role"], message["content"]) for message in made] == expected


def test_half_a_character_is_no_text():
    with pytest.raises(Dropped, match="text is not Unicode"):
        conversations.conversation(turns("<image> q", "a \ud83d"))


def test_recap_row_by_row(tmp_path, capsys):
    """Every conversation with a good picture, every picture with a good conversation; all accounted for."""
    source_rows, expected, reasons = [], [], {}
    good = jpeg()
    everything = [
        *((given, good, wanted) for given, wanted in CASES.values()),
        *((CAPTION, data, SHORT_CAPTION) for data in odd_pictures().values()),
        *((CAPTION, data, "picture is missing" if not data else UNDECODABLE) for data in broken_pictures().values()),
        (CAPTION, large_png(10_000, 6_000), SHORT_CAPTION),  # 60 megapixels: only SynthDoG's limit is lower
    ]
    for number, (given, data, wanted) in enumerate(everything):
        source_rows.append(recap_row(number, data, given if given is not None else []))
        if isinstance(wanted, str):
            reasons.setdefault("no picture" if data is None else wanted, []).append(number)
        else:
            expected.append((wanted, [data]))
    for part in range(3):
        write_parquet(tmp_path / f"in/train-{part}.parquet", source_rows[part * 16 : (part + 1) * 16], recap_features())
    assert len(source_rows) <= 48

    manifest = convert("LLaVA_ReCap_558K", tmp_path / "in", tmp_path / "out")
    assert rows(tmp_path / "out", "LLaVA_ReCap_558K") == expected
    counts = manifest.counts
    assert (counts.rows_in, counts.rows_out) == (len(source_rows), len(expected))
    assert {reason: entry["rows"] for reason, entry in counts.drops.items()} == {
        reason: len(numbers) for reason, numbers in reasons.items()
    }
    for reason, entry in counts.drops.items():
        places = [f"unit {n // 16} row {n % 16} id {n:09d}" for n in reasons[reason][:3]]
        assert [example[: len(place)] for example, place in zip(entry["examples"], places, strict=True)] == places
    assert manifest.extra["pictures"]["animated (training sees the first frame)"] == 1
    assert manifest.extra["pictures"]["rotated by EXIF (training does not turn them)"] == 1
    assert manifest.extra["pictures"]["16-bit grey (training clips them to white)"] == 1
    assert f"{len(source_rows)} rows in, {len(expected)} out" in capsys.readouterr().err
    for shard in manifest.shards:
        data = (tmp_path / "out/LLaVA_ReCap_558K" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


SHORT_CAPTION = dialogue("<image>\nWhat is it?", "A picture.")
UNDECODABLE = "picture does not decode"


def test_onevision_row_by_row(tmp_path):
    """Several turns, no picture, two pictures, no `<image>`; named by its configuration, in a folder of its own."""
    import pyarrow as pa

    first, second = png(seed=1), jpeg(seed=2)
    several = turns("<image>\nq", "a", "r", "b", "s", "c")
    given = [([first], several), ([], CAPTION), ([first, second], CAPTION), ([second], turns("q", "a"))]
    stored = [{"images": [{"bytes": data, "path": "p"} for data in images], "conversations": c} for images, c in given]
    (tmp_path / "copy/geo170k(qa)").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(stored), tmp_path / "copy/geo170k(qa)/train-00000.parquet")
    made = [recap_row(0, first, several), recap_row(1, None), recap_row(2, second, turns("q", "a"))]
    write_parquet(tmp_path / "copy/geo3k/train.parquet", made, recap_features())

    arguments = ["data", "convert", "geo170k(qa)", "geo3k", "--input", str(tmp_path / "copy")]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    expected = [(dialogue("<image>\nq", "a", "r", "b", "s", "c"), [first]), (SHORT, [second])]
    for name, dropped in (("geo170k_qa", {"no picture": 1, "more than one picture": 1}), ("geo3k", {"no picture": 1})):
        assert rows(tmp_path / "out", name) == expected
        manifest = Manifest.read(tmp_path / f"out/llavaonevision_converted/{name}.manifest.json")
        assert {reason: entry["rows"] for reason, entry in manifest.counts.drops.items()} == dropped
    assert sorted(os.listdir(tmp_path / "out/llavaonevision_converted")) == [
        "geo170k_qa",
        "geo170k_qa.manifest.json",
        "geo3k",
        "geo3k.manifest.json",
    ]


def test_synthdog_row_by_row_and_nothing_is_evaluated(tmp_path):
    proof = tmp_path / "evaluated"
    code = f"__import__('pathlib').Path({str(proof)!r}).touch()"
    bad = "ground_truth is not JSON with gt_parse.text_sequence"
    good = jpeg(100, 80, 3)
    cases = [
        (page("one two"), good, "one two"),
        (page("中文 页"), good, "中文 页"),
        (page(code), good, code),  # text like any other
        (code, good, bad),
        (f"{{'gt_parse': {{'text_sequence': {code}}}}}", good, bad),  # Python, not JSON: what eval() would run
        ("{'gt_parse': {'text_sequence': 'single quotes'}}", good, bad),
        ('{"gt_parse": {"text_sequence": ["x"]}}', good, bad),
        ('{"gt_parse": []}', good, bad),
        ("[" * 100_000, good, bad),
        ("", good, bad),
        (None, good, bad),
        (page(""), good, "empty text"),
        (page(" \n"), good, "empty text"),
        (page("see <image> here"), good, "<image> in an answer"),
        ('{"gt_parse": {"text_sequence": "half \\ud83d"}}', good, "text is not Unicode"),
        (page("large"), large_png(10_000, 6_000), "picture over 50,000,000 pixels"),
        (page("cut"), good[:500], UNDECODABLE),
        (page("fifty"), large_png(10_000, 5_000), "fifty"),
    ]
    made = [{"image": data, "ground_truth": truth} for truth, data, _ in cases]
    write_parquet(tmp_path / "in/train-0.parquet", made, synthdog_features())
    for name in ("synthdog_en", "synthdog_zh"):
        manifest = convert(name, tmp_path / "in", tmp_path / "out")
        kept = [case for case in cases if case[2] not in {*manifest.counts.drops}]
        question = f"<image>\n{SETS[name].instruction}"
        assert rows(tmp_path / "out", name) == [(dialogue(question, text), [data]) for _, data, text in kept]
        assert [text for *_, text in kept] == ["one two", "中文 页", code, "fifty"]
        assert {reason: entry["rows"] for reason, entry in manifest.counts.drops.items()} == {
            bad: 8,
            "empty text": 2,
            "<image> in an answer": 1,
            "text is not Unicode": 1,
            "picture over 50,000,000 pixels": 1,
            UNDECODABLE: 1,
        }
    assert not proof.exists()
    eval(cases[4][0])  # control: it does run when evaluated
    assert proof.exists()


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_every_kind_of_copy_gives_the_same_set(tmp_path, kind):
    made = [recap_row(number, jpeg(seed=number)) for number in range(30)]
    if kind == "tar":
        write_tar(tmp_path / "in/a.tar", made)
    else:
        (write_parquet if kind == "parquet" else write_arrow)(tmp_path / f"in/a.{kind}", made, recap_features())
    convert("LLaVA_ReCap_CC3M", tmp_path / "in", tmp_path / "out")
    assert rows(tmp_path / "out", "LLaVA_ReCap_CC3M") == [
        (dialogue(f"<image>\nPlease describe picture {number}.", f"Caption of picture {number}."), [jpeg(seed=number)])
        for number in range(30)
    ]


# Sampling


def numbers(output: Path, name: str = "geo3k") -> list[int]:
    return [int(messages[0][1].split()[-1].rstrip(".")) for messages, _ in rows(output, name)]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    """1,000 rows in four files of unlike sizes; every tenth has no usable text."""
    folder = tmp_path_factory.mktemp("thousand")
    made = [recap_row(n, jpeg(seed=n % 7), None if n % 10 else turns("q")) for n in range(1000)]
    for file, (start, end) in enumerate([(0, 50), (50, 500), (500, 510), (510, 1000)]):
        write_parquet(folder / f"train-{file}.parquet", made[start:end], recap_features())
    return folder


def test_a_sample_is_uniform_seeded_and_accounted_for(tmp_path, thousand):
    drawn = {}
    for seed in range(6):
        output = tmp_path / str(seed)
        manifest = convert("geo3k", thousand, output, "--max-rows", "200", "--seed", str(seed))
        drawn[seed] = numbers(output)
        assert (manifest.seed, manifest.counts.rows_in, manifest.counts.rows_out) == (seed, 1000, 200)
        assert manifest.counts.drops["not in the sample"]["rows"] == 700
        assert manifest.counts.drops["turns do not alternate human, gpt"]["rows"] == 100
        assert drawn[seed] == sorted(drawn[seed])
        assert not [number for number in drawn[seed] if number % 10 == 0]
    assert len({tuple(each) for each in drawn.values()}) == 6
    # "The first N" has a mean of about 111; of 1,200 draws the mean lies within 500 ± 35 but for one time in 50,000.
    assert abs(np.mean([np.mean(each) for each in drawn.values()]) - 500) < 35
    convert("geo3k", thousand, tmp_path / "again", "--max-rows", "200", "--seed", "3")
    assert numbers(tmp_path / "again") == drawn[3]


def test_a_larger_sample_holds_the_smaller(tmp_path, thousand):
    for size in (50, 300):
        convert("geo3k", thousand, tmp_path / str(size), "--max-rows", str(size))
    assert set(numbers(tmp_path / "50")) < set(numbers(tmp_path / "300"))


def test_a_maximum_that_is_not_reached_changes_nothing(tmp_path, thousand):
    for name, options in {
        "all": ["--max-rows", "0"],
        "enough": ["--max-rows", "1000"],
        "more": ["--max-rows", "950"],
    }.items():
        convert("geo3k", thousand, tmp_path / name, *options)
    everything = [number for number in range(1000) if number % 10]
    assert numbers(tmp_path / "all") == numbers(tmp_path / "enough") == numbers(tmp_path / "more") == everything


def test_a_limit_takes_the_first_rows_for_trials(tmp_path, thousand):
    manifest = convert("geo3k", thousand, tmp_path, "--limit", "60")
    assert numbers(tmp_path) == [number for number in range(60) if number % 10]
    assert (manifest.options["limit"], manifest.counts.rows_in) == (60, 60)


def test_two_processes_give_the_same_bytes(tmp_path, thousand):
    for workers in ("1", "2"):
        convert("geo3k", thousand, tmp_path / workers, "--max-rows", "200", "--workers", workers, "--shard-mb", "1")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Resume


COMMAND = "import sys; from qwen_merge.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_killed_run_leaves_nothing_to_train_on_and_goes_on(tmp_path, capsys):
    source = write_recap(tmp_path / "in", 1200, files=12)
    command = ["data", "convert", "LLaVA_ReCap_558K", "--input", str(source), "--max-rows", "500"]
    assert cli.main([*command, "--output", str(tmp_path / "whole")]) == 0
    command += ["--output", str(tmp_path / "out")]
    journal = tmp_path / "out/.LLaVA_ReCap_558K.working/journal.jsonl"
    for wanted in ("drawn", "converted", "converted"):  # killed in the first pass, and twice in the second
        before = journal.read_text().count("\n") if journal.exists() else 0
        resume = ["--resume"] if before else []
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *command, *resume], stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None:
            lines = journal.read_text().splitlines() if journal.exists() else []
            if len(lines) > before + 1 and wanted in lines[-1]:
                os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        process.stderr.close()
        assert os.listdir(tmp_path / "out") == [".LLaVA_ReCap_558K.working"]

    capsys.readouterr()
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "half done" in error
    assert "--resume" in error
    assert "--overwrite" in error
    assert cli.main([*command, "--resume", "--seed", "7"]) == 2
    assert "--seed: 0 before, 7 now" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert "files were converted before" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupted(monkeypatch, module, name: str, unit: int, *arguments) -> None:
    """A conversion that ends, as if killed, when it comes to `unit` in the pass that `name` does."""
    work = getattr(module, name)

    def until(given: dict) -> dict:
        if given["unit"] == unit:
            raise UserError("killed")
        return work(given)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, until)
        convert(*arguments, code=2)


@pytest.mark.parametrize(
    ("module", "name", "unit"),
    [(sample, "draw_unit", 2), (converting, "convert_unit", 0), (converting, "convert_unit", 2)],
    ids=["in the first pass", "between the passes", "in the second pass"],
)
def test_a_file_that_was_drawn_from_may_not_change(tmp_path, capsys, monkeypatch, module, name, unit):
    source = write_recap(tmp_path / "in", 40, files=4)
    options = ("geo3k", source, tmp_path / "out", "--max-rows", "10")
    whole = convert("geo3k", source, tmp_path / "whole", "--max-rows", "10")
    interrupted(monkeypatch, module, name, unit, *options)
    first = source / "train-00001-of-00004.parquet"
    before = first.read_bytes()
    write_parquet(first, [recap_row(number, None) for number in range(10)], recap_features())  # no picture
    convert(*options, "--resume", code=2)
    assert f"1 files of --input were read and have changed since, such as {first.name}" in capsys.readouterr().err
    changed = convert("geo3k", source, tmp_path / "changed", "--max-rows", "10")
    assert changed.counts != whole.counts  # control: it is another sample
    first.write_bytes(before)
    convert(*options, "--resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_mended_file_that_makes_the_set_too_large_makes_it_a_sample(tmp_path, monkeypatch):
    """What was converted before, when all rows would have been taken, is done again."""
    source = write_recap(tmp_path / "in", 40, files=4)
    options = ("geo3k", source, tmp_path / "out", "--max-rows", "45")
    interrupted(monkeypatch, converting, "convert_unit", 3, *options)
    last = source / "train-00003-of-00004.parquet"
    write_parquet(last, [recap_row(number, jpeg(seed=number)) for number in range(30, 60)], recap_features())
    manifest = convert(*options, "--resume")
    assert manifest.counts.rows_out == 45
    assert manifest.counts.drops["not in the sample"]["rows"] == 15
    convert("geo3k", source, tmp_path / "whole", "--max-rows", "45")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("cut", [0, 60, -1], ids=["empty", "cut in its head", "cut at its end"])
@pytest.mark.parametrize(
    ("module", "name", "torn"),
    [
        (sample, "draw_unit", "sample/drawn-00001.npy"),
        (converting, "convert_unit", "sample/chosen-00001.npy"),
        (converting, "convert_unit", "sample/*.npy"),
        (converting, "convert_unit", "evaluation-index"),
    ],
)
def test_files_that_a_power_cut_has_torn_are_made_again(tmp_path, monkeypatch, module, name, torn, cut):
    source = write_recap(tmp_path / "in", 40, files=4)
    text = "How many of the seventeen green triangles on the left side touch the long blue line?"
    (tmp_path / "Bench.tsv").write_text(f"index\tquestion\n1\t{text}\n")
    write_parquet(
        source / "train-00000-of-00004.parquet",
        [recap_row(n, jpeg(seed=n), turns(text, "Two.") if n < 3 else None) for n in range(10)],
        recap_features(),
    )
    options = ("--max-rows", "10", "--decontaminate", str(tmp_path / "Bench.tsv"))
    whole = convert("geo3k", source, tmp_path / "whole", *options)
    assert whole.counts.drops["question is in an evaluation set"]["rows"] == 3
    interrupted(monkeypatch, module, name, 2, "geo3k", source, tmp_path / "out", *options)
    files = list((tmp_path / "out/llavaonevision_converted/.geo3k.working").glob(torn))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:cut])
    convert("geo3k", source, tmp_path / "out", *options, "--resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_the_journal_vouches_for_is_on_the_disk_before_the_journal_says_so(tmp_path, monkeypatch):
    """A rename may reach the disk before the file's bytes: each file is forced there, then its folder."""
    forced = []

    def fsync(descriptor: int, real=os.fsync) -> None:
        forced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    source = write_recap(tmp_path / "in", 20, files=2)
    (tmp_path / "Bench.tsv").write_text("index\tquestion\n1\tHow many red and green balls are on this table?\n")
    monkeypatch.setattr(os, "fsync", fsync)
    convert("geo3k", source, tmp_path / "out", "--max-rows", "5", "--decontaminate", str(tmp_path / "Bench.tsv"))
    for name in (".evaluation-index", ".drawn-00001.npy", ".chosen-00001.npy"):
        (place,) = [place for place, forced_name in enumerate(forced) if forced_name.startswith(name)]
        assert forced[place + 1] == (".geo3k.working" if "index" in name else "sample")
        assert "journal.jsonl" in forced[place:]


def test_units_whose_shards_are_gone_are_done_again(tmp_path):
    """A journal tells of three files; the shard of one is gone and that of another is cut."""
    source = write_recap(tmp_path / "in", 40, files=4)
    whole = convert("geo3k", source, tmp_path / "whole")
    last = (source / "train-00003-of-00004.parquet").read_bytes()
    (source / "train-00003-of-00004.parquet").write_bytes(last[:-500])
    convert("geo3k", source, tmp_path / "out", code=2)
    working = tmp_path / "out/llavaonevision_converted/.geo3k.working"
    (source / "train-00003-of-00004.parquet").write_bytes(last)
    assert sorted(os.listdir(working / "shards")) == [f"part-{unit:05d}-000.parquet" for unit in range(3)]
    (working / "shards/part-00000-000.parquet").unlink()
    os.truncate(working / "shards/part-00001-000.parquet", 100)
    kept = (working / "shards/part-00002-000.parquet").stat().st_ino
    assert convert("geo3k", source, tmp_path / "out", "--resume").shards == whole.shards
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    finished = tmp_path / "out/llavaonevision_converted/geo3k/part-00002-000.parquet"
    assert finished.stat().st_ino == kept  # control: the third was not done again


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_ends_a_conversion_with_a_message(tmp_path, workers):
    """A limit of the size of files stands for it; with room again, --resume ends with the same set."""
    source = write_recap(tmp_path / "in", 200, files=2)
    arguments = ["data", "convert", "geo3k", "--input", str(source), "--workers", workers, "--output"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY)); "
    limited = [sys.executable, "-c", limit + COMMAND, *arguments, str(tmp_path / "out")]
    refused = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "File too large. Make room" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert os.listdir(tmp_path / "out/llavaonevision_converted") == [".geo3k.working"]
    assert cli.main([*arguments, str(tmp_path / "out"), "--resume"]) == 0
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_restart_takes_the_hubs_commit_that_was_found_first(tmp_path):
    """Begun and killed before the first file; nothing asks the hub again, which is out of reach. The repository is a
    folder, which `datasets` reads as it reads the hub. Control: begun anew, the hub is asked."""
    source = write_recap(tmp_path / "repository/data", 1000, files=3)
    whole = convert("LLaVA_ReCap_CC12M", source, tmp_path / "local", "--max-rows", "100")
    options = Options(max_rows=100)
    entry = SETS["LLaVA_ReCap_CC12M"]
    with Workspace(tmp_path / "out", entry.file_name) as space:
        space.begin(options.to_json(entry, None))
        space.journal.append({"source": Source("hub", str(tmp_path / "repository")).to_json()})
    command = ["data", "convert", entry.name, "--output", str(tmp_path / "out"), "--max-rows", "100"]
    assert cli.main([*command, "--resume"]) == 0
    manifest = Manifest.read(tmp_path / "out/LLaVA_ReCap_CC12M.manifest.json")
    assert manifest.counts == whole.counts
    assert manifest.shards == whole.shards
    assert cli.main([*command, "--overwrite"]) == 2


def test_a_finished_set_is_not_done_again(tmp_path, capsys):
    source = write_recap(tmp_path / "in", 20)
    convert("geo3k", source, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for options in ([], ["--resume"], ["--workers", "2"]):
        convert("geo3k", source, tmp_path / "out", *options)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == stamps
    assert "finished already" in capsys.readouterr().err
    convert("geo3k", source, tmp_path / "out", "--limit", "5", code=2)
    assert "--limit: not given before, 5 now. Give --overwrite" in capsys.readouterr().err
    write_recap(tmp_path / "in", 21)  # another file
    convert("geo3k", source, tmp_path / "out", code=2)
    assert "other versions of 1 files of --input" in capsys.readouterr().err
    write_recap(tmp_path / "in", 20, files=2)  # more files
    convert("geo3k", source, tmp_path / "out", code=2)
    assert "files of --input: " in capsys.readouterr().err
    manifest = convert("geo3k", source, tmp_path / "out", "--limit", "5", "--overwrite")
    assert manifest.counts.rows_out == 5
    assert len(rows(tmp_path / "out", "geo3k")) == 5


def test_a_finished_set_is_in_the_outputs_dataset_info(tmp_path, capsys):
    source = write_recap(tmp_path / "in", 20)
    info = tmp_path / "out/dataset_info.json"
    info.parent.mkdir()
    info.write_text('{"mine": ')
    convert("geo3k", source, tmp_path / "out", code=2)
    assert "dataset_info.json cannot be read" in capsys.readouterr().err
    assert [path.name for path in info.parent.iterdir()] == [info.name]  # told before any work
    assert info.read_text() == '{"mine": '
    info.unlink()
    convert("geo3k", source, tmp_path / "out")
    named = json.loads(info.read_text())
    assert {name: entry["file_name"] for name, entry in named.items()} == {"geo3k": "llavaonevision_converted/geo3k"}
    info.write_text("{}")  # of a set that was finished before
    convert("geo3k", source, tmp_path / "out")
    assert json.loads(info.read_text()) == named


def test_the_same_files_may_be_named_in_another_way(tmp_path, capsys, monkeypatch):
    source = write_recap(tmp_path / "in", 20, files=2)
    monkeypatch.chdir(tmp_path)
    interrupted(monkeypatch, converting, "convert_unit", 1, "geo3k", Path("in"), tmp_path / "out")
    manifest = convert("geo3k", source, tmp_path / "out", "--resume")
    assert manifest.counts.rows_out == 20
    (tmp_path / "linked").symlink_to("in")
    for name in (Path("in"), source, Path("../") / tmp_path.name / "in", tmp_path / "linked"):
        convert("geo3k", name, tmp_path / "out")
        assert "finished already" in capsys.readouterr().err
    write_recap(tmp_path / "other", 21, files=2)  # control: other files under the same names
    convert("geo3k", Path("other"), tmp_path / "out", code=2)
    assert "other versions of" in capsys.readouterr().err


def test_several_problems_are_told_before_anything_is_begun(tmp_path, capsys):
    source = write_recap(tmp_path / "in/geo3k", 20)
    write_recap(tmp_path / "in/hme100k", 20)
    convert("geo3k", source, tmp_path / "out", "--limit", "5")
    arguments = ["data", "convert", "geo3k", "sroie", "hme100k", "--input", str(tmp_path / "in")]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "geo3k exists and was made with other options" in error
    assert "no folder for sroie" in error
    assert not (tmp_path / "out/llavaonevision_converted/hme100k").exists()
    assert cli.main([*arguments, "--resume", "--overwrite"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_stops_the_set_and_keeps_what_was_done(tmp_path, capsys):
    source = write_recap(tmp_path / "in", 40, files=4)
    whole = (source / "train-00002-of-00004.parquet").read_bytes()
    start = whole.index(b"Please describe") - 200
    (source / "train-00002-of-00004.parquet").write_bytes(whole[:start] + bytes(400) + whole[start + 400 :])
    convert("geo3k", source, tmp_path / "out", code=2)
    error = capsys.readouterr().err
    assert "train-00002-of-00004.parquet cannot be read" in error
    assert "--resume" in error
    assert os.listdir(tmp_path / "out/llavaonevision_converted") == [".geo3k.working"]
    (source / "train-00002-of-00004.parquet").write_bytes(whole)
    # A file that was read may not change under the journal, not even at the same size; the one to be mended may.
    first = source / "train-00000-of-00004.parquet"
    before = first.read_bytes()
    first.write_bytes(before.replace(b"Please describe", b"please describe"))
    convert("geo3k", source, tmp_path / "out", "--resume", code=2)
    assert "1 files of --input were read and have changed since" in capsys.readouterr().err
    first.write_bytes(before)
    assert convert("geo3k", source, tmp_path / "out", "--resume").counts.rows_out == 40


def test_a_set_of_which_nothing_is_left_says_so(tmp_path, capsys):
    write_parquet(tmp_path / "in/train.parquet", [recap_row(0, None)], recap_features())
    manifest = convert("mathqa", tmp_path / "in", tmp_path / "out")
    assert manifest.counts.drops["no picture"]["rows"] == 1
    assert manifest.shards == []
    assert "nothing is left" in capsys.readouterr().err


def test_rows_of_an_evaluation_set_are_dropped_and_counted(tmp_path):
    item = noise(200, 150, 77)
    question = "How many of the seventeen green triangles on the left side touch the long blue line at the bottom?"
    from data_sources import encoded

    table = ["index\tquestion\timage", f"0\t{question}\t{base64.b64encode(encoded(item, 'PNG')).decode()}"]
    (tmp_path / "MathVista_MINI.tsv").write_text("\n".join(table) + "\n")
    made = [
        recap_row(0, encoded(item.resize((300, 225)), "JPEG")),  # the same picture, otherwise encoded
        recap_row(1, jpeg(200, 150, 5), turns(f"<image>\n{question}", "Three.")),
        recap_row(2, jpeg(200, 150, 6)),
    ]
    write_parquet(tmp_path / "in/train.parquet", made, recap_features())
    manifest = convert(
        "geo3k", tmp_path / "in", tmp_path / "out", "--decontaminate", str(tmp_path / "MathVista_MINI.tsv")
    )
    assert numbers(tmp_path / "out") == [2]
    drops = manifest.counts.drops
    assert {reason: entry["rows"] for reason, entry in drops.items()} == {
        "picture is in an evaluation set": 1,
        "question is in an evaluation set": 1,
    }
    assert "MathVista_MINI.tsv" in drops["picture is in an evaluation set"]["examples"][0]
    assert manifest.options["decontaminate"][0][0] == "MathVista_MINI.tsv"
    assert manifest.versions["imagehash"] == importlib.metadata.version("imagehash")
    assert manifest.extra["evaluation sets"]["MathVista_MINI.tsv"] == {
        "rows": 1,
        "pictures": 1,
        "pictures that do not decode": 0,
        "questions": 1,
        "questions too short": 0,
    }
    control = convert("geo3k", tmp_path / "in", tmp_path / "control")
    assert control.counts.rows_out == 3
    assert "evaluation sets" not in control.extra
    assert "imagehash" not in control.versions


# The command


@pytest.mark.parametrize("script", ["llava", "synthdog", "onevision"])
def test_the_reproductions_scripts_are_the_same_command(tmp_path, script, capsys):
    name = {"llava": "LLaVA_ReCap_558K", "synthdog": "synthdog_en", "onevision": "geo3k"}[script]
    if script == "synthdog":
        write_parquet(
            tmp_path / "in/train.parquet", [{"image": jpeg(), "ground_truth": page("x")}], synthdog_features()
        )
    else:
        write_recap(tmp_path / "in", 1)
    arguments = [name, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "script"), "--limit", "9"]
    path = ROOT / f"src/data_process/process_{script}.py"
    subprocess.run([sys.executable, str(path), *arguments], check=True)
    convert(name, tmp_path / "in", tmp_path / "command", "--limit", "9")
    assert contents(tmp_path / "script") == contents(tmp_path / "command")
    other = "geo3k" if script != "onevision" else "synthdog_en"
    refused = subprocess.run([sys.executable, str(path), other], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"not {SETS[name].group}: {other}" in refused.stderr


def test_sets_are_listed_with_what_is_there(tmp_path, capsys):
    convert("geo3k", write_recap(tmp_path / "in", 20), tmp_path / "out")
    assert cli.main(["data", "sets", "--output", str(tmp_path / "out")]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == [*SETS, "text2image", "image_thinking"]
    assert "20 rows" in lines["geo3k"]
    assert " ".join(lines["text2image"].split()) == "text2image - distilled made by `qwen-merge data text2image`"
    (tmp_path / "out/image_thinking.answers").mkdir()
    (tmp_path / "out/text2image.manifest.json").write_text(
        (tmp_path / "out/llavaonevision_converted/geo3k.manifest.json").read_text()
    )
    assert cli.main(["data", "sets", "--output", str(tmp_path / "out")]) == 0
    states = [line.split("  ")[1:] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [next(filter(None, words)).strip() for words in states] == ["20 rows", "half done"]
    convert("image_thinking", tmp_path / "in", tmp_path / "out", code=2)
    assert "'image_thinking' (`qwen-merge data image-thinking` makes it)" in capsys.readouterr().err
    assert "lmms-lab/LLaVA-OneVision-Data, geo3k" in lines["geo3k"]
    for content in ("", "[]", "{}"):
        (tmp_path / "out/llavaonevision_converted/geo3k.manifest.json").write_text(content)
        assert cli.main(["data", "sets", "--output", str(tmp_path / "out")]) == 0
        assert "geo3k.manifest.json is broken" in capsys.readouterr().out


# Memory


# Not getrusage: what it gives a new process starts at the peak of the one that started it.
PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
CONVERT = "import sys; from qwen_merge.cli import main; assert main(sys.argv[1:]) == 0"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--max-rows", "3000"]], ids=["all", "sampled"])
def test_memory_does_not_grow_with_the_set(tmp_path, options):
    """Peak RSS for 40,000 rows is at most 1.2 × that for 4,000: the same pictures, in ten times as many files, and in
    one file that is ten times as long. Control: the set held in memory, as the original does, takes more."""
    peaks = {}
    for name, count, files in (("small", 4_000, 2), ("large", 40_000, 20), ("long", 40_000, 1)):
        source = write_recap(tmp_path / name, count, files, 64, 48, pictures=4_000)
        arguments = [
            "data",
            "convert",
            "LLaVA_ReCap_CC3M",
            "--input",
            str(source),
            "--output",
            str(tmp_path / f"{name}-out"),
        ]
        done = subprocess.run(
            [sys.executable, "-c", CONVERT + PEAK, *arguments, *options], check=True, capture_output=True, text=True
        )
        peaks[name] = int(done.stdout.split()[-1])
    print(peaks)
    assert peaks["large"] <= 1.2 * peaks["small"], peaks
    assert peaks["long"] <= 1.2 * peaks["small"], peaks
    held = (
        "import datasets, sys\n"
        "rows = list(datasets.load_dataset('parquet', data_files=sys.argv[1] + '/*', split='train', streaming=True)\n"
        "            .cast_column('image', datasets.Image(decode=False)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", held + PEAK, str(tmp_path / "large")], check=True, capture_output=True, text=True
    )
    assert int(done.stdout.split()[-1]) > 1.2 * peaks["small"]
