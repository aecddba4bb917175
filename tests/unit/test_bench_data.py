"""`qwen-merge bench data` on a few rows: what it counts and the ratio it works out, not how fast this machine is."""

import argparse
import json

import pytest

from qwen_merge import cli
from qwen_merge.bench import data as bench
from qwen_merge.bench.data import BASELINE, GOAL_SPEED, make_source, rows_written

WAYS = ["one process", "two processes", BASELINE]


def test_a_tiny_run(tmp_path, capsys):
    arguments = ["--rows", "24", "--files", "3", "--repeats", "1", "--no-ray", "--pictures", "2"]
    arguments += ["--work-dir", str(tmp_path / "work"), "--json", str(tmp_path / "figures.json")]
    code = cli.main(["bench", "data", *arguments])
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["rows"] == 24
    assert list(figures["rounds"]) == list(figures["starts"]) == WAYS
    assert figures["pictures_a_second"] > 0
    assert list((tmp_path / "work").iterdir()) == []  # it cleans up

    seconds = {way: rounds[0]["seconds"] for way, rounds in figures["rounds"].items()}
    assert all(len(rounds) == 1 for rounds in figures["rounds"].values())
    assert all(rounds[0]["peak_bytes"] > 30_000_000 for rounds in figures["rounds"].values())
    for way in WAYS:
        (line,) = [line for line in said.splitlines() if line.startswith(way) and "rows a second" not in line]
        assert line.removeprefix(way).split()[:2] == [f"{24 / seconds[way]:.0f}", f"{seconds[way]:.1f}"]
    ratios = {way: seconds[BASELINE] / seconds[way] for way in WAYS[:2]}
    for way, ratio in ratios.items():
        assert f"{way}: {ratio:.1f} × the rows a second of the whole-set way" in said
    (goal,) = figures["goals"].items()
    assert goal[0].startswith("one process: ")
    assert goal[1] == (ratios["one process"] >= GOAL_SPEED) == (code == 0)


def test_a_way_that_loses_rows_is_no_measurement(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source", 5, 2, size=(32, 24))
    assert rows_written(source) == 5
    (tmp_path / "log").touch()
    monkeypatch.setattr(bench, "measure", lambda command, log: bench.Measurement(1.0, 1, 1))
    with pytest.raises(RuntimeError, match="one process wrote 0 rows of 5"):
        bench._once("one process", source, tmp_path, 5)


def test_the_ratio_is_of_rounds_that_ran_side_by_side(tmp_path, monkeypatch, capsys):
    """The median of each round's ratio: a busy machine slows both ways of a round."""
    times = {"one process": iter([0.5, 1.0, 2.0, 9.0]), BASELINE: iter([1.0, 6.0, 14.0, 27.0])}  # starts first
    monkeypatch.setattr(bench, "make_source", lambda folder, rows, files: folder)
    monkeypatch.setattr(bench, "_once", lambda way, *_: bench.Measurement(next(times[way]), 1, 1))
    (tmp_path / "source").mkdir()
    arguments = argparse.Namespace(rows=100, files=2, repeats=3)
    content, goals = {}, []
    bench._speed(arguments, list(times), tmp_path, content, goals)
    net = (14.0 - 1.0) / (2.0 - 0.5)
    assert goals == [
        (f"one process: 6.0 × the rows a second of the whole-set way, {net:.1f} × without the starts", True)
    ]
    assert content["starts"] == {"one process": 0.5, BASELINE: 1.0}
