"""One conversion, four ways: one process, two, Ray, and each of them killed. The output is the same, byte for byte."""

import base64
import csv
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_sources import broken_pictures, jpeg, recap_features, recap_row, turns, write_parquet
from qwen_merge.data.units import ATTEMPTS, run_units
from qwen_merge.errors import UserError
from worker_processes import alive, at_work, family, kill_one, until

SET = "LLaVA_ReCap_558K"
FILES = 12
ROWS = 120  # a file
SAMPLE = 1000
LEAK = "Which of the two lighthouses on the northern shore was rebuilt after the storm of that year?"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Good rows, and in each file one of each kind that is dropped."""
    folder = tmp_path_factory.mktemp("source")
    broken = list(broken_pictures().values())
    for file in range(FILES):
        made = []
        for number in range(file * ROWS, (file + 1) * ROWS):
            place = number % ROWS
            picture = jpeg(320, 240, seed=number)
            if place < len(broken):
                made.append(recap_row(number, broken[place]))
            elif place == 50:
                made.append(recap_row(number, picture, turns(f"<image>\n{LEAK}", "The eastern one.")))
            elif place == 51:
                made.append(recap_row(number, jpeg(320, 240, seed=77777, quality=40)))  # the evaluation picture
            elif place == 52:
                made.append(recap_row(number, picture, turns("<image>")))
            else:
                made.append(recap_row(number, picture))
        write_parquet(folder / f"train-{file:05d}-of-{FILES:05d}.parquet", made, recap_features())
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "Bench.tsv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", "image"])
        writer.writerow([1, LEAK, base64.b64encode(jpeg(640, 480, seed=4711)).decode()])
        writer.writerow([2, "Short?", base64.b64encode(jpeg(320, 240, seed=77777, quality=95)).decode()])
    return path


@pytest.fixture
def convert(source, evaluation, tmp_path) -> Callable[..., subprocess.Popen]:
    """Starts the command in a session of its own; what is left of it is killed afterwards."""
    started: list[subprocess.Popen] = []

    def start(output: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "qwen_merge.cli", "data", "convert", SET, "--input", str(source)]
        command += ["--output", str(output), "--max-rows", str(SAMPLE), "--decontaminate", str(evaluation), *more]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment["PYTHONPATH"] = str(ROOT / "src")
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for member in [*family(process.pid), process]:
            if member.returncode is None if isinstance(member, subprocess.Popen) else member.is_running():
                member.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def reference(source, evaluation, tmp_path_factory) -> dict[str, str]:
    """The uninterrupted result of one process."""
    output = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "-m", "qwen_merge.cli", "data", "convert", SET, "--input", str(source)]
    command += ["--output", str(output), "--max-rows", str(SAMPLE), "--decontaminate", str(evaluation)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    return content(output)


def content(output: Path) -> dict[str, str]:
    """File to sha256, of everything but hidden folders."""
    files = [path for path in output.rglob("*") if path.is_file() and not any(p.startswith(".") for p in path.parts)]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def converted(output: Path) -> int:
    """Units that the journal of a run under way says are done."""
    journal = output / f".{SET}.working" / "journal.jsonl"
    return journal.read_bytes().count(b'"converted"') if journal.is_file() else 0


def test_the_reference_is_what_it_should_be(reference, source, tmp_path):
    """What is compared below would notice: a sample of another seed differs in every shard."""
    assert len(reference) == FILES + 2  # its manifest, and dataset_info.json
    output = tmp_path / "other"
    command = [sys.executable, "-m", "qwen_merge.cli", "data", "convert", SET, "--input", str(source), "--seed", "1"]
    subprocess.run([*command, "--output", str(output), "--max-rows", str(SAMPLE)], check=True)
    other = content(output)
    assert reference.keys() == other.keys()
    assert [name for name in reference if reference[name] == other[name]] == ["dataset_info.json"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_a_lost_worker_costs_nothing_but_time(convert, reference, tmp_path, engine):
    process = convert(tmp_path / "data", "--workers", "2", "--engine", engine)
    until(lambda: converted(tmp_path / "data") >= 2, 180, "two units were done", process)
    kill_one(process, engine)
    assert converted(tmp_path / "data") < FILES - 2
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    # Without this the kill may have come too late to matter.
    assert ("its unit is done again" if engine == "processes" else "A worker died or was killed") in said
    assert content(tmp_path / "data") == reference
    manifest = json.loads((tmp_path / "data" / f"{SET}.manifest.json").read_text())
    assert (
        manifest["rows_in"] == FILES * ROWS == manifest["rows_out"] + sum(d["rows"] for d in manifest["drops"].values())
    )
    assert manifest["drops"]["question is in an evaluation set"]["rows"] == FILES
    sampled = manifest["drops"]["picture is in an evaluation set"]["rows"]
    assert 0 < sampled <= FILES


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_killed_as_a_whole_and_resumed(convert, reference, tmp_path, engine):
    output = tmp_path / "data"
    process = convert(output, "--workers", "2", "--engine", engine)
    until(lambda: converted(output) >= 3, 180, "three units were done", process)
    # Ray's agents, which write nothing of ours, may live on; those that have a unit in hand may not.
    workers = until(lambda: at_work(process, engine), 60, "a worker at work", process)
    process.kill()
    process.wait()
    until(lambda: not any(map(alive, workers)), 60, "its workers were gone")
    before = converted(output)
    assert 3 <= before < FILES
    assert content(output) == {}  # nothing that a trainer would take for a set
    shards = {p.name: p.stat().st_ino for p in (output / f".{SET}.working" / "shards").glob("*.parquet")}
    assert len(shards) >= before

    refused = convert(output, "--engine", engine)
    assert "--resume" in refused.communicate(timeout=60)[0]
    assert refused.returncode == 2

    done = [json.loads(line) for line in (output / f".{SET}.working" / "journal.jsonl").read_text().splitlines()[:-1]]
    kept = [shard["name"] for line in done if "converted" in line for shard in line["shards"]]
    resumed = convert(output, "--workers", "2", "--engine", engine, "--resume")
    said = resumed.communicate(timeout=240)[0]
    assert resumed.returncode == 0, said
    assert f"{before} of {FILES} files were converted before" in said
    assert content(output) == reference
    assert len(kept) >= before - 1
    for name in kept:  # not done again: the very same files
        assert (output / SET / name).stat().st_ino == shards[name]


# run_units by itself. Spawned workers import this module, so what they run is at its top.


def double(unit: dict) -> dict:
    if "die" in unit and not os.path.exists(unit["die"]):
        Path(unit["die"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if "always" in unit:
        os.kill(os.getpid(), signal.SIGKILL)
    if "wrong" in unit:
        raise UserError("the third file cannot be read")
    if "full" in unit:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part-00000.parquet")
    if "bug" in unit:
        raise KeyError("a bug")
    return {"twice": 2 * unit["number"], "pid": os.getpid()}


def doubled(units: list[dict], engine: str = "processes", workers: int = 2) -> list[dict]:
    results: list[dict] = []
    run_units(units, double, engine, workers, results.append)
    return results


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_unit_is_done_once(workers):
    results = doubled([{"number": n} for n in range(30)], workers=workers)
    assert sorted(result["twice"] for result in results) == [2 * n for n in range(30)]
    pids = {result["pid"] for result in results}
    assert (pids == {os.getpid()}) == (workers == 1)
    assert len(pids) <= workers


def test_no_units_no_workers():
    assert doubled([]) == []


def test_each_unit_survives_its_worker_once(tmp_path):
    results = doubled([{"number": n, "die": str(tmp_path / str(n))} for n in range(4)])
    assert sorted(result["twice"] for result in results) == [0, 2, 4, 6]


def test_a_unit_that_always_kills_its_worker_is_named():
    with pytest.raises(UserError, match=rf'lost {ATTEMPTS} times in the unit {{"number": 7, "always": 1}}.*signal 9'):
        doubled([{"number": 1}, {"number": 7, "always": 1}])


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_worker_raises(workers):
    with pytest.raises(UserError, match="the third file cannot be read"):
        doubled([{"number": 0, "wrong": 1}], workers=workers)
    with pytest.raises(UserError, match=r"part-00000\.parquet: No space left on device\. Make room"):
        doubled([{"number": 0, "full": 1}], workers=workers)
    # With one worker it is the exception itself; from another process, its traceback as text.
    with pytest.raises(KeyError if workers == 1 else RuntimeError, match="a bug"):
        doubled([{"number": 0, "bug": 1}], workers=workers)


def test_an_error_in_on_done_ends_the_workers():
    def full(result: dict) -> None:
        raise OSError("the disk is full")

    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(OSError, match="the disk is full"):
        run_units([{"number": n} for n in range(9)], double, "processes", 2, full)
    left = [child for child in psutil.Process().children() if child.pid not in before]
    assert [child for child in left if "spawn_main" in " ".join(child.cmdline())] == []


def test_unknown_engine_and_no_workers():
    with pytest.raises(UserError, match="expected one of processes, ray"):
        doubled([{"number": 0}], engine="spark")
    with pytest.raises(UserError, match="expected at least 1"):
        doubled([{"number": 0}], workers=0)


@pytest.mark.slow
def test_ray_errors_and_a_unit_that_always_kills_its_worker():
    """In one local Ray, which is what takes the time. Through a process: Ray keeps threads and signal handlers."""
    program = """
import ray
from test_data_engines import double, doubled
from qwen_merge.errors import UserError
ray.init(address="local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False,
         _node_ip_address="127.0.0.1")
results = doubled([{"number": n} for n in range(20)], "ray")
assert sorted(result["twice"] for result in results) == [2 * n for n in range(20)]
for extra in ("wrong", "bug", "always"):
    try:
        doubled([{"number": 1}, {"number": 7, extra: 1}], "ray")
    except (UserError, RuntimeError) as error:
        print("SEEN", extra, type(error).__name__, str(error).strip().splitlines()[-1])
assert ray.is_initialized()  # it was not ours to shut down
"""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests" / "integration")])
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    seen = [line.split(" ", 2)[1:] for line in ended.stdout.splitlines() if line.startswith("SEEN")]
    assert [name for name, _ in seen] == ["wrong", "bug", "always"]
    assert seen[0][1] == "UserError the third file cannot be read"
    assert seen[1][1] == "RuntimeError KeyError: 'a bug'"
    assert seen[2][1].startswith(f"UserError a worker was lost {ATTEMPTS} times")


def test_ray_is_asked_for_when_it_is_missing():
    program = """
import sys
sys.modules["ray"] = None  # as if it were not installed
from qwen_merge.data.units import run_units
run_units([{}], dict, "ray", 2)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "UserError: --engine ray needs Ray" in ended.stderr
    assert "pip install 'qwen-merge[ray]'" in ended.stderr
