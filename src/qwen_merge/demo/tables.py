"""Held-out questions as two tables for VLMEvalKit's run.py, one of multiple choice and one of short answers.

The forms of VLMEvalKit: tab-separated, `index question answer category image` with the picture in base64, and columns
A to D for options. It takes any table in its folder LMUData; `openended` in a name marks one without options.

    python -m qwen_merge.demo.tables DIR [SEED]
"""

import base64
import csv
import sys
from pathlib import Path

from qwen_merge.demo.evaluation import KIND_OF_TOPIC
from qwen_merge.demo.language import LETTERS, choices, exchange
from qwen_merge.demo.world import Stream, png
from qwen_merge.errors import UserError

CHOICE, SHORT = TABLES = ("TinyWorld_choice", "TinyWorld_openended")
TOPICS_ASKED = ("colour", "shape", "number", "word")
QUESTIONS_OF_EACH_TOPIC = 25
CHANCE_OF_CHOICE = 100 / len(LETTERS)


def rows_of(table: str, seed: int = 0) -> list[dict[str, str]]:
    """The rows of one table; its pictures come from a stream of its own and show held-out numbers only."""
    stream = Stream(f"held-out table {table}", seed)
    rows: list[dict[str, str]] = []
    for topic in TOPICS_ASKED * QUESTIONS_OF_EACH_TOPIC:
        scene = stream.scene(KIND_OF_TOPIC.get(topic, topic))
        spoken = exchange(scene, topic, stream.random)
        row = {"index": str(len(rows)), "question": spoken.question, "answer": spoken.answer, "category": topic}
        if table == CHOICE:
            options = choices(topic, spoken.answer, stream.random)
            row |= options
            row["answer"] = next(letter for letter, option in options.items() if option == spoken.answer)
        rows.append({**row, "image": base64.b64encode(png(stream.drawing(scene))).decode()})
    return rows


def write(folder: Path, seed: int = 0) -> None:
    """Write both tables to `folder`, as `<name>.tsv`."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        rows = rows_of(table, seed)
        with (folder / f"{table}.tsv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0].keys(), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2):
        raise UserError("usage: python -m qwen_merge.demo.tables DIR [SEED]")
    write(Path(argv[0]), int(argv[1]) if len(argv) == 2 else 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
