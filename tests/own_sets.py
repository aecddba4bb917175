"""A user's own sets as seed files: pictures, clips, annotations, and the file that names them."""

import json
from pathlib import Path

import yaml

from record_sets import picture


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def row(number: int, question: str, **files) -> dict:
    return {"id": f"n{number}", **files, "conversations": turns(question, f"It is number {number}.")}


def make_pictures(folder: Path, names: list[str], size: tuple[int, int] = (64, 56)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(size[0] + number, size[1]))
    return folder


def write_sets(folder: Path, sets: dict[str, list], data_path: str | None = "pictures", lines: bool = False) -> Path:
    """Annotations of each set as a JSON array or JSONL, and the file that names them, which is given back."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, rows in sets.items():
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        entries[name] = {"annotation_path": f"{name}.json"} | ({"data_path": data_path} if data_path else {})
    (folder / "sets.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    return folder / "sets.yaml"
