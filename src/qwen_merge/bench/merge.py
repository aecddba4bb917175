"""The merger against loading both models, and against a plain copy: `qwen-merge bench merge`.

Each way runs in a process of its own, several rounds one after the other, on the same files, none of them in the page
cache. A copy of the output is the physical limit: the merger has to read and write just these bytes. `cp` alone ends
when the page cache has them; `cp, then sync` ends when the disk has them, as the merger does.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_merge.bench import synthetic
from qwen_merge.errors import UserError

GOAL_WALL = 1.3  # times the plain copy that ends when the disk has the bytes, as the merger does
GOAL_MEMORY = 500e6  # bytes, whatever the models' size
GOAL_MEMORY_SHARE = 1 / 8  # of the baseline's


@dataclass(frozen=True)
class Measurement:
    """Wall time, peak resident memory and bytes read and written (by calls, cached or not) of a process."""

    seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int


def measure(command: list[str], log: Path) -> Measurement:
    """Run a command to its end and measure it with the kernel's own books (see measure.py).

    Raises:
        UserError: the command failed; its output is in the message.
    """
    runner = [sys.executable, "-m", "qwen_merge.bench.measure", str(log), *command]
    figures = json.loads(subprocess.run(runner, check=True, stdout=subprocess.PIPE).stdout)
    if figures.pop("exit_code"):
        raise UserError(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return Measurement(**figures)


def forget(directory: Path) -> None:
    """Write everything back, and empty the page cache of the files below `directory` (no root needed)."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run(arguments: argparse.Namespace) -> int:
    needed = 32e9 if arguments.real_size else 1e9 * (arguments.vlm_gb + 4 * (arguments.llm_gb + 2))
    parent = arguments.work_dir or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(parent).free < needed:
        raise UserError(f"{parent} has less than {needed / 1e9:.0f} GB free; name another place with --work-dir.")
    with tempfile.TemporaryDirectory(prefix="qwen-merge-bench-", dir=parent) as work:
        return _run(arguments, Path(work))


def _run(arguments: argparse.Namespace, work: Path) -> int:
    print(
        f"{os.cpu_count()} CPU cores, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    )
    if arguments.real_size:
        vlm = synthetic.make_vlm(work / "vlm", size="72B", only_vision_files=True)
        llm = synthetic.make_llm(work / "llm", size="4B")
    else:
        vlm = synthetic.make_vlm(work / "vlm", gb=arguments.vlm_gb)
        llm = synthetic.make_llm(work / "llm", gb=arguments.llm_gb)
    print(f"VLM {_size(vlm) / 1e9:.2f} GB on the disk, LLM {_size(llm) / 1e9:.2f} GB")

    merged, copy = work / "merged", work / "copy"
    merge = [sys.executable, "-m", "qwen_merge.cli", "merge", "--vlm-path", str(vlm), "--llm-path", str(llm)]
    ways = {
        "qwen-merge merge": [*merge, "--output-path", str(merged)],
        "cp": ["cp", "-r", str(merged), str(copy)],
        "cp, then sync": ["sh", "-c", f"cp -r {merged} {copy} && sync -f {copy}"],
    }
    if not arguments.real_size:
        baseline = [sys.executable, "-m", "qwen_merge.bench.baseline", str(vlm), str(llm), str(merged)]
        ways["load both, save"] = [*baseline, str(copy)]
    figures: dict[str, list[Measurement]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        shutil.rmtree(merged, ignore_errors=True)
        for way, command in ways.items():
            shutil.rmtree(copy, ignore_errors=True)
            forget(work)
            figures[way].append(measure(command, work / "log"))
    written = _size(merged)
    load = os.getloadavg()[1]
    print(f"output {written / 1e9:.2f} GB; {arguments.repeats} rounds, page cache emptied; load average {load:.1f}")
    return _report(figures, written, arguments.json)


def _report(figures: dict[str, list[Measurement]], output_bytes: int, json_path: Path | None) -> int:
    middle = {way: _median(rounds) for way, rounds in figures.items()}
    print(f"\n{'':<18}{'wall s':>9}{'(range)':>16}{'peak MB':>9}{'read GB':>9}{'written GB':>12}")
    for way, figure in middle.items():
        times = [one.seconds for one in figures[way]]
        spread = f"{min(times):.1f} to {max(times):.1f}"
        print(
            f"{way:<18}{figure.seconds:>9.2f}{spread:>16}{figure.peak_bytes / 1e6:>9.0f}"
            f"{figure.read_bytes / 1e9:>9.2f}{figure.written_bytes / 1e9:>12.2f}"
        )
    ours = middle["qwen-merge merge"]
    ratio, unsynced = ours.seconds / middle["cp, then sync"].seconds, ours.seconds / middle["cp"].seconds
    goals = [
        (f"wall time {ratio:.2f} × cp with sync ({unsynced:.2f} × cp into the page cache)", ratio <= GOAL_WALL),
        (f"peak memory {ours.peak_bytes / 1e6:.0f} MB", ours.peak_bytes <= GOAL_MEMORY),
    ]
    if "load both, save" in middle:
        share = ours.peak_bytes / middle["load both, save"].peak_bytes
        goals.append((f"peak memory 1/{1 / share:.1f} of loading both", share <= GOAL_MEMORY_SHARE))
    print()
    for text, met in goals:
        print(f"{'met    ' if met else 'NOT MET'}  {text}")
    if json_path:
        content = {
            "output_bytes": output_bytes,
            "rounds": {way: [asdict(one) for one in rounds] for way, rounds in figures.items()},
            "goals": dict(goals),
        }
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(met for _, met in goals) else 1


def _median(rounds: list[Measurement]) -> Measurement:
    names = ("peak_bytes", "read_bytes", "written_bytes")
    middle = {name: int(statistics.median(getattr(one, name) for one in rounds)) for name in names}
    return Measurement(seconds=statistics.median(one.seconds for one in rounds), **middle)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
