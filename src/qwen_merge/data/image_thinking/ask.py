"""Draw the samples and ask the teacher about each, with its picture.

    qwen-merge data image-thinking ask --endpoint http://localhost:8000/v1

The samples are drawn once a server has answered, and each answer carries the mark of its sample. The teacher's
sampling is its server's own (`generation_config.json`) unless options say otherwise. Answers are appended
to <output>/image_thinking.answers/answers.jsonl as they come; a restart asks only for what is missing.
"""

import base64
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_merge.data.image_thinking import SET
from qwen_merge.data.image_thinking.samples import ROWS, Sample, converted_sets, draw, fingerprint, read_samples
from qwen_merge.data.teacher.answers import AnswerFile, Request, Summary
from qwen_merge.data.teacher.steps import (
    Servers,
    decontaminate_option,
    evaluation_index,
    run_step,
    sha256_of,
    short_hash,
)
from qwen_merge.data.teacher.texts import seed_of

COMMAND = "qwen-merge data image-thinking ask"
_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff"}


@dataclass
class AskOptions:
    """`rows`: of each set; the teacher's sampling as the API's fields, e.g. {"temperature": 0.8}."""

    output: Path
    input: Path
    sets: list[str] = field(default_factory=list)
    rows: int = ROWS
    seed: int = 0
    sampling: dict[str, float] = field(default_factory=dict)
    decontaminate: list[Path] = field(default_factory=list)


def answers_folder(output: Path) -> Path:
    return Path(output) / f"{SET}.answers"


def answers_file(output: Path) -> AnswerFile:
    return AnswerFile(answers_folder(output), "answers")


def samples_file(output: Path) -> AnswerFile:
    """A line for each set that was drawn from; its sample lies beside."""
    return AnswerFile(answers_folder(output), "samples")


def sample_path(output: Path, name: str) -> Path:
    return answers_folder(output) / "samples" / f"{name}.parquet"


def drawn(output: Path) -> list[dict[str, Any]]:
    """What was drawn from each set, in the order of their names."""
    return sorted(samples_file(output).entries(), key=lambda line: line["id"])


def drawn_content(output: Path) -> str | None:
    """A hash of all samples; None if they are not all drawn."""
    file = samples_file(output)
    return file.done(COMMAND)["content"] if file.done_path.exists() else None


def samples(output: Path) -> Iterator[Sample]:
    """All drawn samples, in the order of their sets and places."""
    for line in drawn(output):
        yield from read_samples(sample_path(output, line["id"]))


def data_url(picture: bytes) -> str:
    kind = next((name for magic, name in _KINDS.items() if picture.startswith(magic)), None)
    if kind is None:
        kind = "webp" if picture[8:12] == b"WEBP" else "*"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def message(picture: bytes, text: str) -> dict[str, Any]:
    """A user's turn: the picture's own bytes, then the text."""
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": data_url(picture)}},
            {"type": "text", "text": text},
        ],
    }


def request_of(sample: Sample, options: AskOptions, servers: Servers) -> Request:
    body = {
        "messages": [message(sample.picture, sample.question)],
        "max_tokens": servers.max_tokens,
        "seed": seed_of(options.seed, sample.id),
        **options.sampling,
        **servers.extra_body,
    }
    return Request(sample.id, body, of=sample.mark())


def ask(options: AskOptions, servers: Servers, overwrite: bool = False) -> Summary | None:
    """Run the step; None when it was finished before.

    Raises:
        UserError: see converted_sets() and run_step(). While no server answers, nothing that is there changes.
    """
    sets = converted_sets(options.input, options.sets)
    recorded = {
        "sets": {name: short_hash(str(fingerprint(folder))) for name, folder in sets.items()},
        "rows": options.rows,
        "seed": options.seed,
        "decontaminate": decontaminate_option(options.decontaminate),
    }
    return run_step(
        answers_file(options.output),
        {**recorded, "sampling": options.sampling or None},
        servers,
        lambda: (request_of(sample, options, servers) for sample in samples(options.output)),
        overwrite=overwrite,
        before=lambda: {"samples": drawn_content(options.output)},
        prepare=lambda: _draw_all(sets, options, recorded, overwrite),
    )


def _draw_all(sets: dict[str, Path], options: AskOptions, recorded: dict[str, Any], overwrite: bool) -> None:
    with samples_file(options.output) as file:
        file.begin(recorded, overwrite)
        there = set(file.index())
        missing = [name for name in sets if name not in there]
        index = evaluation_index(options.decontaminate) if missing else None
        for name in missing:
            target = sample_path(options.output, name)
            line = draw(name, sets[name], options.rows, options.seed, target, index)
            file.journal.append({"id": name, **line, "sha256": sha256_of(target)})
            kept, seen = line["counts"]["rows_out"], line["seen"]
            print(f"{SET}: {kept:,} samples of {name}'s {seen:,} rows", file=sys.stderr, flush=True)
        file.finish({"requests": len(sets), "missing": 0})
