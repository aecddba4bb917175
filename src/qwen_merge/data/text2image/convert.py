"""Judged answers to the set: the question drawn as a picture, the teacher's answer behind it.

    qwen-merge data text2image convert --workers 8            or --engine ray, on a cluster

Answers and verdicts meet by their ids, and a verdict counts for the very answer that was judged. Rows come in the order
of the ids, which are hashes: mixed, and the same whatever came first from the servers. A question that cannot be drawn
is left as text: its row has no picture, and is counted.

An answer that was asked for with ` /no_think` keeps that switch in the user's turn and has no thought; the template
writes the empty one.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_merge.data import dataset_info
from qwen_merge.data.counts import Counts
from qwen_merge.data.manifest import Manifest, package_versions
from qwen_merge.data.schema import ASSISTANT, IMAGE_TAG, USER, Record
from qwen_merge.data.shards import SHARD_BYTES, ShardInfo, ShardWriter
from qwen_merge.data.teacher.answers import key_of, mark_of, read_at
from qwen_merge.data.teacher.judge import NO_THINK
from qwen_merge.data.teacher.steps import BEYOND_LIMIT, check_limit, check_missing, check_same
from qwen_merge.data.teacher.texts import is_chinese
from qwen_merge.data.text2image import PLAIN, SET
from qwen_merge.data.text2image.ask import COMMAND as ASK
from qwen_merge.data.text2image.ask import answers_file
from qwen_merge.data.text2image.judge import COMMAND as JUDGE
from qwen_merge.data.text2image.judge import in_order, problem_of, verdicts_file
from qwen_merge.data.units import run_units
from qwen_merge.data.workspace import State, Workspace
from qwen_merge.evaluation import thoughts

REQUEST = {"zh": "请回答图片中的问题。", "en": "Answer the question in the picture."}
UNIT_ROWS = 1000  # rendered by one worker before it is noted: about half a minute
POOR = "judged poor"
UNREADABLE = "verdict unreadable"


@dataclass
class ConvertOptions:
    """`fonts`: see data.render.fonts; `seed`: of the pictures' looks.

    `input`: the folder with the answers and verdicts, if it is another; `limit`: only the first N answers, in the order
    of their ids.
    """

    output: Path
    input: Path | None = None
    limit: int | None = None
    seed: int = 0
    fonts: str = "mplfonts"
    shard_mb: int = SHARD_BYTES // 2**20
    accept_missing: bool = False
    unit_rows: int = UNIT_ROWS

    @property
    def source(self) -> Path:
        return self.input or self.output


@dataclass
class _Kept:
    """Which answers become rows, and where the others went."""

    counts: Counts = field(default_factory=Counts)
    places: list[int] = field(default_factory=list)  # in the answers' file, in the order of the ids


def convert(
    options: ConvertOptions, engine: str = "processes", workers: int = 1, resume: bool = False, overwrite: bool = False
) -> Manifest | None:
    """Write <output>/text2image/; None when it was finished with the same answers and options.

    Raises:
        UserError: the steps before are not finished, or the answers are others than were judged; the state on disk
            asks for --resume or --overwrite; fonts are missing.
    """
    from qwen_merge.data.render.fonts import describe

    dataset_info.read(options.output)
    answers, verdicts = answers_file(options.source), verdicts_file(options.source)
    asked = check_missing(answers, ASK, options.accept_missing)
    judged = check_missing(verdicts, JUDGE, options.accept_missing)
    check_same(judged, "answers", asked["content"], JUDGE)
    check_limit(judged, options.limit, JUDGE)
    recorded = {
        "asked": answers.options(),
        "judged": verdicts.options(),
        "answers in all": {"lines": asked["requests"] - asked["missing"], "hash": asked["content"]},
        "verdicts in all": {"lines": judged["requests"] - judged["missing"], "hash": judged["content"]},
        "limit": options.limit,
        "seed": options.seed,
        "fonts": options.fonts,
        "font files": describe(options.fonts),
        "shard_mb": options.shard_mb,
        "unit_rows": options.unit_rows,
    }
    with Workspace(options.output, SET) as space:
        if space.begin(recorded, resume, overwrite) is State.FINISHED:
            dataset_info.enlist(options.output, SET, SET)
            return None
        kept = _join(options, asked)
        manifest = _render(kept, options, recorded, space, engine, workers)
        questions = asked["questions"]
        manifest.extra |= {
            "source_rows": questions["rows_in"],
            "questions": questions["rows_out"],
            "requests": asked["requests"],
        }
        space.finish(manifest)
        dataset_info.enlist(options.output, SET, SET)
    return manifest


def _join(options: ConvertOptions, asked: dict[str, Any]) -> _Kept:
    """Bring answers and their verdicts together.

    The set's rows in are the requests (a question, or a question without thinking) and the source rows that gave none.
    """
    ratings: dict[str, str | None] = {}
    for entry in verdicts_file(options.source).entries():
        key = key_of(entry["id"], entry.get("of"))
        verdict = entry.get("verdict")
        ratings[key] = sys.intern(verdict["rating"]) if verdict else None
        if "refused" in entry:
            ratings[key] = "refused"

    kept = _Kept(Counts.from_json(asked["questions"]))
    kept.counts.rows_in = kept.counts.dropped + asked["requests"]
    kept.counts.rows_out = 0
    there = 0
    for place, entry in in_order(options.source):
        there += 1
        if options.limit is not None and there > options.limit:
            reason: str | None = BEYOND_LIMIT
        else:
            reason = problem_of(entry) or _judgement(ratings.get(key_of(entry["id"], mark_of(entry)), "none"))
        if reason:
            kept.counts.drop(reason, f"{entry['id']}: {entry['question']}")
        else:
            kept.places.append(place)
    for _ in range(asked["requests"] - there):
        kept.counts.drop("no answer from the teacher", "see `ask`, which tells the last error")
    return kept


def _judgement(rating: str | None) -> str | None:
    if rating is None:
        return UNREADABLE
    reasons = {"poor": POOR, "refused": "answer refused by the judge's server", "none": "no verdict from the judge"}
    return reasons.get(rating)


def _render(
    kept: _Kept, options: ConvertOptions, recorded: dict[str, Any], space: Workspace, engine: str, workers: int
) -> Manifest:
    plan = {
        "answers": str(answers_file(options.source).path.absolute()),
        "folder": str(space.shards),
        "seed": options.seed,
        "fonts": options.fonts,
        "shard_bytes": options.shard_mb * 2**20,
    }
    size = options.unit_rows
    units = [
        {**plan, "unit": number, "places": kept.places[begin : begin + size]}
        for number, begin in enumerate(range(0, len(kept.places), size))
    ]
    done = {line["unit"]: line for line in space.journal.entries()}
    done = {unit: line for unit, line in done.items() if space.has(ShardInfo(**shard) for shard in line["shards"])}

    def finished(result: dict[str, Any]) -> None:
        space.journal.append(result)
        done[result["unit"]] = result
        print(f"{SET}: {len(done)} of {len(units)} units rendered", file=sys.stderr, flush=True)

    run_units([unit for unit in units if unit["unit"] not in done], render_unit, engine, workers, finished)
    notes: Counter[str] = Counter()
    left_as_text = Counts()
    shards: list[ShardInfo] = []
    for number in range(len(units)):
        shards += [ShardInfo(**shard) for shard in done[number]["shards"]]
        notes.update(done[number]["notes"])
        left_as_text.merge(Counts.from_json(done[number]["left_as_text"]))
    kept.counts.rows_out = len(kept.places)
    return Manifest(
        name=SET,
        source=", ".join(str(entry[0]) for entry in recorded["asked"]["input"]),
        revision=recorded["asked"]["input"],
        options=recorded,
        seed=options.seed,
        counts=kept.counts,
        shards=shards,
        versions=package_versions("openai", "mplfonts", "matplotlib"),
        extra={"rows": dict(sorted(notes.items())), "left as text": left_as_text.to_json()["drops"]},
    )


def render_unit(unit: dict[str, Any]) -> dict[str, Any]:
    """Draw one unit's questions and write its shards. JSON in, JSON out; done again it writes the same bytes."""
    from qwen_merge.data.render.render import CannotDraw, render

    notes: Counter[str] = Counter()
    left_as_text = Counts()
    with ShardWriter(Path(unit["folder"]), f"part-{unit['unit']:05d}", unit["shard_bytes"]) as writer:
        for entry in read_at(Path(unit["answers"]), unit["places"]):
            picture = None
            try:
                picture = render(entry["question"], unit["seed"], unit["fonts"]).png
            except CannotDraw as error:
                left_as_text.drop(error.reason, f"{error}: {entry['question']}")
            writer.add(record_of(entry, picture))
            notes[f"{entry['mode']}, {'picture' if picture else 'text'}"] += 1
        shards = writer.close()
    return {
        "unit": unit["unit"],
        "shards": [shard.to_json() for shard in shards],
        "notes": dict(notes),
        "left_as_text": left_as_text.to_json(),
    }


def record_of(entry: dict[str, Any], picture: bytes | None) -> Record:
    """The record of one answer; without a picture the question stays text."""
    switch = NO_THINK if entry["mode"] == PLAIN else ""
    if picture is None:
        user = entry["question"] + switch
    else:
        user = f"{IMAGE_TAG}\n{REQUEST['zh' if is_chinese(entry['question']) else 'en']}{switch}"
    found = thoughts.split(entry["text"])
    thought = f"{thoughts.OPEN}\n{found.thought}\n{thoughts.CLOSE}\n\n" if found.thought else ""
    messages = [{"role": USER, "content": user}, {"role": ASSISTANT, "content": thought + found.answer}]
    return Record(messages, [picture] if picture is not None else [])
