"""Small sets in the record format, written by the package's own writer, and a recipe that trains on them."""

import argparse
import io
import json
import random
from pathlib import Path

import yaml

from qwen_merge.data.counts import Counts
from qwen_merge.data.look_command import add_parsers
from qwen_merge.data.manifest import Manifest, manifest_path
from qwen_merge.data.schema import Record
from qwen_merge.data.shards import ShardWriter

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
THOUGHT = "<think>\nIt is round.\n</think>\n\n"
# Sizes that meet every branch of LLaMA-Factory's resizing: over the cap, tiny, thin, and plain ones.
SIZES = [(56, 56), (640, 480), (1, 1), (3, 700), (5000, 20), (29, 31), (900, 300), (513, 511), (33, 28), (2000, 1500)]
MODES = ["RGB", "RGBA", "P", "L", "CMYK", "I;16", "1", "LA"]
FORMATS = {"CMYK": "JPEG", "L": "JPEG"}


def picture(width: int, height: int, mode: str = "RGB", format: str | None = None) -> bytes:
    """An encoded picture with something in it."""
    from PIL import Image

    image = Image.radial_gradient("L").resize((width, height))
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, format or FORMATS.get(mode, "PNG"))
    return file.getvalue()


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def records(count: int, seed: int = 0) -> list[Record]:
    """Sound rows that differ in everything: turns, thoughts, languages, lengths, number, size and mode of pictures."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        pictures = [] if index % 7 == 3 else [index, index + 5][: 1 + (index % 9 == 4)]
        contents = ["<image>" * len(pictures) + draw.choice(["What is it?", "这是什么颜色?", "Describe. " * index])]
        contents += [draw.choice(["", THOUGHT]) + draw.choice(["A circle.", "一个红色的圆。", "Round. " * (3 * index)])]
        for again in range(index % 3):
            contents += [f"And number {again}?", draw.choice(["", THOUGHT]) + "Another one. " * (1 + index % 4)]
        images = [picture(*SIZES[i % len(SIZES)], MODES[i % len(MODES)]) for i in pictures]
        made.append(Record(turns(*contents), images))
    return made


def parted_rows() -> list[Record]:
    """Samples that packs of 200 tokens hold two at a time, with as many labels each; one in three has a picture."""
    rows = []
    for i in range(48):
        images = [picture(56, 56)] * (i % 3 == 0)
        words = "".join(chr(97 + (i * 7 + k) % 26) for k in range(42 - 8 * len(images)))
        digits = "".join(str((i + k * k) % 10) for k in range(30))  # a token each
        rows.append(Record(turns("<image>" * len(images) + words, digits), images))
    return rows


def write_set(dataset_dir: Path, name: str, rows: list[Record], shards: int = 1) -> Path:
    """The set's folder with `shards` shards, its manifest beside it, and its entry in dataset_info.json."""
    folder = dataset_dir / name
    found = []
    for number in range(shards):
        with ShardWriter(folder, f"part-{number:05d}") as writer:
            for row in rows[number * len(rows) // shards : (number + 1) * len(rows) // shards]:
                writer.add(row)
            found += writer.close()
    counts = Counts(rows_in=len(rows), rows_out=len(rows))
    manifest = Manifest(name, "made/by-program", "0" * 40, {"limit": None}, 0, counts, found)
    manifest.write(manifest_path(dataset_dir, name))
    enlist(dataset_dir, name)
    return folder


def enlist(dataset_dir: Path, name: str, **values) -> None:
    """Add a set to dataset_info.json."""
    path = dataset_dir / "dataset_info.json"
    info = json.loads(path.read_text()) if path.exists() else {}
    columns = {"messages": "messages", "images": "images"}
    info[name] = {"file_name": name, "formatting": "sharegpt", "columns": columns, "tags": TAGS, **values}
    path.write_text(json.dumps(info), encoding="utf-8")


def settings(folder: Path, model: Path, dataset: str, **values) -> dict:
    """A recipe's keys, as those of stage 3 where they shape the data."""
    return {
        "model_name_or_path": str(model),
        "cache_dir": str(folder / "cache"),
        "image_max_pixels": 262144,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(folder),
        "dataset": dataset,
        "template": "qwen_merge_vl",
        "mask_history": True,
        "cutoff_len": 8096,
        "preprocessing_batch_size": 8,
        "preprocessing_num_workers": 1,
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1.5,
        "bf16": True,
        "report_to": "wandb",
        **values,
    }


def run(*arguments: object) -> int:
    """The command, without the package's whole command line."""
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return parsed.run(parsed)


def write_recipe(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
