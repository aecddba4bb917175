"""VLMEvalKit's `run.py` on tables drawn by program, from a copy of the installed package that has the overlay."""

import base64
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from qwen_merge.overlays import engine, manifest
from training import REPOSITORY

MODEL = "Qwen-Merge-VL-4B-matched"  # small pictures stay small
TABLE = "TinyChoices"
ROWS = 12
LETTERS = list("ABCD" * 3)
COLOURS = ("red", "green", "blue", "black")


def picture(number: int) -> str:
    from PIL import Image

    image = Image.new("RGB", (56 + 28 * (number % 3), 56), COLOURS[number % 4])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def table(rows: int):
    import pandas

    return pandas.DataFrame(
        {
            "index": range(rows),
            "question": [f"What colour is picture {number}?" for number in range(rows)],
            **{letter: [colour] * rows for letter, colour in zip("ABCD", COLOURS, strict=True)},
            "answer": LETTERS[:rows],
            "category": ["colour"] * rows,
            "image": [picture(number) for number in range(rows)],
        }
    )


def write_tables(folder: Path) -> Path:
    """`TABLE` and FewChoices."""
    table(ROWS).to_csv(folder / f"{TABLE}.tsv", sep="\t", index=False)
    table(4).to_csv(folder / "FewChoices.tsv", sep="\t", index=False)
    return folder


def copy_with_the_overlay(folder: Path) -> Path:
    source = Path(next(iter(importlib.util.find_spec("vlmeval").submodule_search_locations)))
    shutil.copytree(source, folder / "vlmeval", ignore=shutil.ignore_patterns("__pycache__"))
    overlay = manifest.load("vlmevalkit")
    engine.revert(overlay, folder / "vlmeval")
    engine.apply(overlay, folder / "vlmeval")
    return folder


class Runs:
    """Launches `python -m vlmeval.run` for one checkpoint."""

    def __init__(self, site: Path, data: Path, model: Path):
        self.site, self.data, self.model = site, data, model

    def command(self, work: Path, *arguments: str, name: str = TABLE) -> list[str]:  # of two --judge the last counts
        return [
            *(sys.executable, "-m", "vlmeval.run", "--data", name, "--model", MODEL, "--model-path", str(self.model)),
            *("--work-dir", str(work), "--judge", "exact_matching", *arguments),
        ]

    @property
    def environment(self) -> dict[str, str]:
        paths = (self.site, REPOSITORY / "src", *filter(None, [os.environ.get("PYTHONPATH")]))
        unset = ("OPENAI_API_KEY", "OPENAI_API_BASE", "QWEN_MERGE_ENDPOINT")
        kept = {k: v for k, v in os.environ.items() if k not in unset}
        return {**kept, "LMUData": str(self.data), "PYTHONPATH": os.pathsep.join(map(str, paths))}

    def __call__(self, work: Path, *arguments: str, name: str = TABLE, timeout: float = 400, **environment: str):
        return subprocess.run(
            self.command(work, *arguments, name=name),
            env={**self.environment, **environment},
            cwd=work.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout,
        )


def lines(work: Path, name: str = TABLE) -> list[dict]:
    file = work / MODEL / f"{MODEL}_{name}_responses.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
