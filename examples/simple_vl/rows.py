"""Reads every row that ms-swift is to train on, before it trains: which are too long, and which cannot be read.

    python examples/simple_vl/rows.py FOLDER stop|drop [options of swift sft]        (scripts/simple_vl.sh calls it)

ms-swift encodes rows while it trains, so a row that is too long or has no picture strikes hours in. What is written is
what `swift export --to_cached_dataset` writes, the rows and the number of tokens of each (pictures stay files), except
that every unreadable row is named, not the first or the first ten. `swift sft --cached_dataset` takes it, and leaves
out what is longer than its --max_length. Rows that were read before, with the same options and files, are not read
again.

Prints the folder that holds train/ and, where there are rows to evaluate on, val/. Leaves with 2 where a row cannot be
read; drop leaves such rows out.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_from_disk
from swift.llm import ExportArguments
from swift.llm.argument.base_args.data_args import DataArguments
from swift.llm.dataset import AddLengthPreprocessor
from swift.llm.export.cached_dataset import ExportCachedDataset
from swift.utils import parse_args

SHOWN = 10  # of the rows that are named
IRRELEVANT = {"dataset_num_proc", "load_from_cache_file", "strict", "cached_dataset", "cached_val_dataset"}
# Files of a checkpoint that decide how many tokens a row has.
PROCESSOR = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json")


def say(text: str) -> None:
    print(f"rows: {text}", file=sys.stderr, flush=True)


class Read(AddLengthPreprocessor):
    """A row with its number of tokens, or with what is wrong with it."""

    def preprocess(self, row: dict[str, Any]) -> dict[str, Any]:
        text = "".join(message["content"] for message in row["messages"] if isinstance(message["content"], str))
        for tag, name in (("<image>", "images"), ("<video>", "videos")):
            tags, files = text.count(tag), len(row.get(name) or [])
            if tags > files:  # ms-swift would train on the tag as on any word; for fewer tags it puts some in front
                return {**row, "length": 0, "problem": f"{tags} {tag} for {files} {name}"}
        try:
            return {**super().preprocess(row), "problem": ""}
        except Exception as error:  # whatever a row can do to the template
            return {**row, "length": 0, "problem": f"{type(error).__name__}: {error}"}


class Rows(ExportCachedDataset):
    """The rows as `swift sft` would see them, in its order."""

    def main(self) -> dict[str, Dataset]:
        if self.template.truncation_strategy == "raise":
            self.template.max_length = None  # the length of a long row is wanted; `swift sft` leaves it out by that
        try:
            parts = dict(zip(("train", "val"), self._get_dataset(), strict=True))
        except Exception as error:
            say(f"the rows cannot be loaded: {type(error).__name__}: {error}")
            raise SystemExit(2) from error
        tell_lost([*self.args.dataset, *self.args.val_dataset], sum(len(part) for part in parts.values() if part))
        read = Read(template=self.template)
        settings = {"num_proc": self.args.dataset_num_proc, "strict": self.args.strict, "batch_size": 100}
        return {name: read(part, **settings) for name, part in parts.items() if part is not None}


def tell_lost(names: list[str], loaded: int) -> None:
    """Leaves with 2 if files have more rows than were loaded: ms-swift passes over what it sees no messages in."""
    files = [Path(name) for name in names]
    if not all(file.suffix == ".jsonl" and file.is_file() for file in files):
        return  # shares of sets, and sets that ms-swift fetches: it alone knows how many rows they have
    rows, strange = 0, []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            rows += bool(line.strip())
            if line.strip() and "messages" not in json.loads(line):
                strange.append(f"\n  - {file} line {number} has {', '.join(json.loads(line))}")
    if rows > loaded:
        say(f"{rows - loaded} of {rows} rows were not loaded: no messages in them{''.join(strange[:SHOWN])}")
        say("give each row `messages`, or take it out.")
        raise SystemExit(2)


def key(args: ExportArguments, mode: str) -> str:
    """Of what decides which rows there are and how long each is: options, files and the checkpoint's processor."""
    known: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(DataArguments) if f.name not in IRRELEVANT}
    known["mode"] = mode
    known["template"] = {**args.get_template_kwargs(), "template": args.template}
    if known["template"]["truncation_strategy"] == "raise":
        known["template"].pop("max_length")
    known["environment"] = {
        name: os.environ[name] for name in sorted(os.environ) if "PIXELS" in name or "FRAMES" in name
    }
    for name in [*args.dataset, *args.val_dataset]:
        path = Path(name.partition("#")[0])  # a number of rows may stand behind it
        for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
            if file.is_file():
                known[f"file {file}"] = [file.stat().st_size, file.stat().st_mtime_ns]
    for name in args.custom_dataset_info or []:
        known[f"sets of {name}"] = Path(name).read_text()
    for name in PROCESSOR:
        path = Path(args.model_dir) / name
        known[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def shown(row: dict[str, Any]) -> str:
    """Enough to find a row by: its pictures' files and how it begins."""
    files = [picture.get("path") or "a picture in the row" for picture in row.get("images") or []]
    files = [f"{file} (not there)" if file.startswith("/") and not os.path.exists(file) else file for file in files]
    text = " ".join(str(row["messages"][0]["content"]).split())
    return f"{', '.join(files) or 'no picture'}: {text[:60]!r}"


def listed(part: Dataset, numbers: list[int], column: str) -> str:
    lines = [f"{shown(part[number])} ({column}: {part[number][column]})" for number in numbers[:SHOWN]]
    if len(numbers) > SHOWN:
        lines.append(f"and {len(numbers) - SHOWN} more")
    return "".join(f"\n  - {line}" for line in lines)


def readable(part: Dataset, what: str, stays: Path | None, lasts: Path) -> Dataset:
    """Without the rows that cannot be read, which are written to the folder `stays`.

    Leaves with 2 if there is none, or no others; they are written to `lasts` then.
    """
    wrong = [number for number, problem in enumerate(part["problem"]) if problem]
    if wrong:
        say(f"{what}: {len(wrong)} of {len(part)} rows cannot be read:{listed(part, wrong, 'problem')}")
        fatal = stays is None or len(wrong) == len(part)
        report = (lasts if fatal or stays is None else stays) / f"unreadable_{what}.txt"
        report.parent.mkdir(exist_ok=True)
        rows = ((shown(part[number]), " ".join(part[number]["problem"].split())) for number in wrong)
        report.write_text("".join(f"{row}\t{problem}\n" for row, problem in rows))
        if fatal:
            say(f"mend them (all are in {report})" + (", or leave them out with CHECK=drop." if stays is None else "."))
            raise SystemExit(2)
    good = part if not wrong else part.select([number for number, problem in enumerate(part["problem"]) if not problem])
    return good.remove_columns("problem")


def tell(part: Dataset, what: str, longest: int) -> None:
    """What training will make of the lengths. Leaves with 2 if no row is short enough."""
    lengths = part["length"]
    long = [number for number, length in enumerate(lengths) if length > longest]
    most = f"--max_length {longest} (the longest: {max(lengths)} tokens)"
    say(f"{what}: {len(lengths)} rows were read; {len(long)} are longer than {most}; {len(lengths) - len(long)} remain")
    if long:
        say(f"these are left out:{listed(part, long, 'length')}")
    if len(long) == len(lengths):
        say("no row is left. Raise --max_length, or lower MAX_PIXELS.")
        raise SystemExit(2)


def main(folder: str, mode: str, *options: str) -> None:
    into = Path(folder)
    into.mkdir(parents=True, exist_ok=True)
    new = into / f"new-{os.uname().nodename}-{os.getpid()}"
    # strict: a row that cannot be loaded stops here, before it could be counted; packing is the trainer's, and so are
    # most of the options.
    ours = ["--to_cached_dataset", "true", "--packing", "false", "--strict", "true", "--output_dir", str(new)]
    datasets.logging.set_verbosity_error()  # of caches, which this does not use
    with contextlib.redirect_stdout(sys.stderr):
        args, _ = parse_args(ExportArguments, [*options, *ours])
        place = into / key(args, mode)
        if not place.exists():
            try:
                for what, part in Rows(args).main().items():
                    readable(part, what, new if mode == "drop" else None, into).save_to_disk(str(new / what))
                with contextlib.suppress(OSError):  # another node was first, with the same rows
                    new.rename(place)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        for report in sorted(place.glob("*.txt")):
            count = len(report.read_text().splitlines())
            say(f"{count} rows that could not be read are left out ({report}); remove {place} to have them read again")
        for part in sorted(path for path in place.iterdir() if path.is_dir()):
            tell(load_from_disk(str(part)), part.name, args.max_length)
    print(place.resolve())


if __name__ == "__main__":
    main(*sys.argv[1:])
