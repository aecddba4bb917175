"""The converter against loading, mapping and writing a whole set; memory; rendering: `qwen-merge bench data`.

ReCap-shaped rows (a JPEG of 640 × 480 and a caption), made by program. Each way is a command in a process of its own,
several rounds one after the other on the same files. A command's start (imports; Ray's own processes) is measured on a
set of one row a file and shown apart, because it does not grow with the rows. Memory is given twice: of the largest
process by the kernel's books, and of all processes together, shared pages counted once, looked at four times a second.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_merge.errors import UserError

GOAL_SPEED = 5.0  # times the rows a second of the whole-set way
GOAL_MEMORY = 1.2  # times the peak, for ten times the rows
SET = "LLaVA_ReCap_558K"
BASELINE = "whole set, decoded"
WAYS = ("one process", "two processes", "Ray, two workers", BASELINE)
MEMORY_ROWS = (4_000, 40_000)
CAPTION = "a the of with near two small large red blue wooden table window street person standing light under sky"


@dataclass(frozen=True)
class Measurement:
    """`peak_bytes`: resident, of the largest process; `all_bytes`: of all together."""

    seconds: float
    peak_bytes: int
    all_bytes: int


def measure(command: list[str], log: Path) -> Measurement:
    """Run a command to its end and measure it.

    Raises:
        UserError: the command failed; the end of its output is in the message.
    """
    runner = [sys.executable, "-m", "qwen_merge.bench.measure", str(log), *command]
    all_bytes = 0
    with subprocess.Popen(runner, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            all_bytes = max(all_bytes, sum(map(_proportional, _descendants(process.pid))))
            time.sleep(0.25)
        assert process.stdout is not None
        figures = json.loads(process.stdout.read())
    if figures["exit_code"]:
        raise UserError(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Measurement(figures["seconds"], figures["peak_bytes"], all_bytes)


def _descendants(pid: int) -> list[int]:
    try:
        threads = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return []
    return [one for child in children for one in (child, *_descendants(child))]


def _proportional(pid: int) -> int:
    """A process's memory in bytes, pages that n processes share counted as 1/n."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def make_source(folder: Path, rows: int, files: int, size: tuple[int, int] = (640, 480), different: int = 64) -> Path:
    """A ReCap-shaped set; `different` pictures are used again and again, captions are as long as ReCap's."""
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value

    features = Features(
        {
            "id": Value("string"),
            "image": Image(),
            "conversations": [{"from": Value("string"), "value": Value("string")}],
        }
    )
    pictures = [photograph(seed, size) for seed in range(min(different, rows))]
    generator = random.Random(0)
    folder.mkdir(parents=True)
    for file in range(files):
        numbers = range(file * rows // files, (file + 1) * rows // files)
        name = f"train-{file:05d}-of-{files:05d}.parquet"
        # No dictionary: it would store a picture that comes twice in a row group once.
        with pq.ParquetWriter(folder / name, features.arrow_schema, use_dictionary=False) as writer:
            for start in range(0, len(numbers), 100):  # rows in a group, as on the hub
                made = [
                    {
                        "id": f"{number:09d}",
                        "image": {"bytes": pictures[number % len(pictures)], "path": None},
                        "conversations": [
                            {
                                "from": "human",
                                "value": "<image>\nPlease generate detailed descriptions of the picture.",
                            },
                            {"from": "gpt", "value": " ".join(generator.choices(CAPTION.split(), k=180))},
                        ],
                    }
                    for number in numbers[start : start + 100]
                ]
                writer.write_table(pa.Table.from_pylist(made, schema=features.arrow_schema))
    return folder


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG with coarse and fine structure; about 60 KB at 640 × 480, as the pictures of CC3M."""
    import io

    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells, weight in ((8, 0.55), (size[0] // 10, 0.3), (size[0] // 3, 0.15)):
        grid = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(grid.resize(size, Image.Resampling.BICUBIC), dtype=float) * weight
    buffer = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def command(way: str, source: Path, output: Path) -> list[str]:
    """What a way runs; `output` is a folder that does not exist yet."""
    if way == BASELINE:
        files = [str(source), str(output / "set.parquet"), str(output / "cache")]
        return [sys.executable, "-m", "qwen_merge.bench.data_baseline", *files]
    words = [sys.executable, "-m", "qwen_merge.cli", "data", "convert", SET]
    words += ["--input", str(source), "--output", str(output), "--workers", "1" if way == "one process" else "2"]
    return [*words, "--engine", "ray" if way.startswith("Ray") else "processes"]


def rows_written(output: Path) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in output.rglob("*.parquet"))


def run(arguments: argparse.Namespace) -> int:
    ways = [way for way in WAYS if not (arguments.no_ray and way.startswith("Ray"))]
    parent = arguments.work_dir or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    needed = 4 * (arguments.rows * 70_000 + (sum(MEMORY_ROWS) * 8_000 if arguments.memory else 0))
    if shutil.disk_usage(parent).free < needed:
        raise UserError(f"{parent} has less than {needed / 1e9:.1f} GB free; name another place with --work-dir.")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(f"{os.cpu_count()} CPU cores, {memory:.0f} GiB memory, load average {os.getloadavg()[1]:.1f} before")
    content: dict = {}
    goals: list[tuple[str, bool]] = []
    with tempfile.TemporaryDirectory(prefix="qwen-merge-bench-", dir=parent) as work:
        _speed(arguments, ways, Path(work), content, goals)
        if arguments.memory:
            _memory(Path(work), content, goals)
    if arguments.pictures:
        _rendering(arguments.pictures, content)
    print(f"load average {os.getloadavg()[1]:.1f} after\n")
    for text, met in goals:
        print(f"{'met    ' if met else 'NOT MET'}  {text}")
    if arguments.json:
        content["goals"] = dict(goals)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(met for _, met in goals) else 1


def _speed(arguments: argparse.Namespace, ways: list[str], work: Path, content: dict, goals: list) -> None:
    rows = arguments.rows
    source = make_source(work / "source", rows, arguments.files)
    short = make_source(work / "short", arguments.files, arguments.files)
    size = sum(path.stat().st_size for path in source.iterdir())
    print(f"{rows:,} rows in {arguments.files} files, {size / 1e6:.0f} MB; {arguments.repeats} rounds, ways in turns")
    starts = {way: _once(way, short, work, arguments.files).seconds for way in ways}
    figures: dict[str, list[Measurement]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way in ways:
            figures[way].append(_once(way, source, work, rows))
    middle = {way: statistics.median(one.seconds for one in figures[way]) for way in ways}
    print(f"\n{'':<20}{'rows/s':>8}{'wall s':>9}{'(range)':>16}{'start s':>9}{'largest MB':>12}{'all MB':>8}")
    for way in ways:
        times = [one.seconds for one in figures[way]]
        spread = f"{min(times):.1f} to {max(times):.1f}"
        largest, everything = (max(getattr(one, name) for one in figures[way]) for name in ("peak_bytes", "all_bytes"))
        print(
            f"{way:<20}{rows / middle[way]:>8.0f}{middle[way]:>9.1f}{spread:>16}{starts[way]:>9.1f}"
            f"{largest / 1e6:>12.0f}{everything / 1e6:>8.0f}"
        )
    print()
    for way in ways[:-1]:
        # Of the same round: what else the machine did then slowed both.
        pairs = zip(figures[BASELINE], figures[way], strict=True)
        ratio = statistics.median(plain.seconds / ours.seconds for plain, ours in pairs)
        net = max(middle[BASELINE] - starts[BASELINE], 0.01) / max(middle[way] - starts[way], 0.01)
        text = f"{way}: {ratio:.1f} × the rows a second of the whole-set way, {net:.1f} × without the starts"
        if way == "one process":
            goals.append((text, ratio >= GOAL_SPEED))
        else:
            print(text)
    content["rows"] = rows
    content["starts"] = starts
    content["rounds"] = {way: [asdict(one) for one in figures[way]] for way in ways}


def _once(way: str, source: Path, work: Path, rows: int) -> Measurement:
    output = work / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    figure = measure(command(way, source, output), work / "log")
    shutil.rmtree(output / "cache", ignore_errors=True)
    written = rows_written(output)
    if written != rows:
        raise RuntimeError(f"{way} wrote {written} rows of {rows}")
    return figure


def _memory(work: Path, content: dict, goals: list) -> None:
    """Small pictures, so that ten times the rows fit a small disk; a row group is then mostly text."""
    peaks: dict[str, list[int]] = {"one process": [], BASELINE: []}
    for rows in MEMORY_ROWS:
        source = make_source(work / f"memory-{rows}", rows, rows // 1000, size=(112, 84))
        for way, seen in peaks.items():
            seen.append(_once(way, source, work, rows).peak_bytes)
    few, many = MEMORY_ROWS
    for way, (small, large) in peaks.items():
        text = f"{way}: peak {small / 1e6:.0f} MB for {few:,} rows, {large / 1e6:.0f} MB for {many:,}"
        if way == BASELINE:
            print(f"{text} ({large / small:.2f} ×)")
        else:
            goals.append((f"{text} ({large / small:.2f} ×)", large <= GOAL_MEMORY * small))
    content["memory"] = {"rows": MEMORY_ROWS, **peaks}


def _rendering(count: int, content: dict) -> None:
    """Questions of 5 to 120 words, a third of them Chinese, in this process; fonts are loaded before."""
    import random

    from qwen_merge.data.render.render import render

    generator = random.Random(0)
    chinese = "如图所示三角形的面积是多少请说明理由并给出计算过程以及最后的答案"

    def question(number: int) -> str:
        length = generator.randint(5, 120)
        if number % 3 == 0:
            return "".join(generator.choices(chinese, k=length)) + "？"
        return " ".join(generator.choices(CAPTION.split(), k=length)) + "?"

    questions = [question(number) for number in range(count)]
    _timed(lambda: [render(text) for text in questions[:20]])
    seconds = _timed(lambda: [render(text, seed=1) for text in questions])
    print(f"{count / seconds:.1f} pictures rendered a second ({count} questions, one process)")
    content["pictures_a_second"] = count / seconds


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
