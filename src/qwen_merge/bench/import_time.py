"""How long the command line takes to answer: `qwen-merge bench import-time`.

A command that takes seconds to print its help is not asked twice; torch and transformers alone take several.
"""

import argparse
import statistics
import subprocess
import sys
import time

GOAL = 0.5  # seconds
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "safetensors")
_LIST_MODULES = """
import sys
from qwen_merge.cli import build_parser
build_parser()
print(*(name for name in {heavy!r} if name in sys.modules))
"""


def heavy_imports() -> list[str]:
    """Heavy libraries that building the parser imports, in a process of its own."""
    code = _LIST_MODULES.format(heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def help_seconds() -> float:
    """Wall time of one `qwen-merge --help`, the interpreter's start included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "qwen_merge.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def run(arguments: argparse.Namespace) -> int:
    help_seconds()  # fills the file cache and the byte code
    times = [help_seconds() for _ in range(arguments.repeats)]
    heavy = heavy_imports()
    median = statistics.median(times)
    spread = f"{min(times):.3f} to {max(times):.3f}"
    print(f"qwen-merge --help: median {median:.3f} s of {len(times)} ({spread}), goal {GOAL} s")
    print(f"heavy imports: {', '.join(heavy) or 'none'}")
    return 0 if median < GOAL and not heavy else 1
