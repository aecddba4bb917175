"""Filter the answers, have the rest judged, and write the set: the good answer in the place of the original one.

    qwen-merge data image-thinking judge --endpoint http://localhost:8000/v1

The judge sees the picture, the question, the reference, and the thought and answer. A verdict is written under the id
of its answer, with the mark of what was judged. The pictures stay in the set, with their own bytes.

The set follows from answers and verdicts, which stay: it is written anew whenever they, or the shards' size, are others
than it was made with.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_merge.data import dataset_info
from qwen_merge.data.counts import Counts
from qwen_merge.data.image_thinking import SET
from qwen_merge.data.image_thinking.answer import Answer, checked, judgement
from qwen_merge.data.image_thinking.ask import COMMAND as ASK
from qwen_merge.data.image_thinking.ask import answers_file, answers_folder, drawn, drawn_content, message, samples
from qwen_merge.data.image_thinking.samples import Sample
from qwen_merge.data.manifest import Manifest, package_versions
from qwen_merge.data.schema import ASSISTANT, IMAGE_TAG, USER, Record
from qwen_merge.data.shards import SHARD_BYTES, ShardWriter
from qwen_merge.data.teacher import filters
from qwen_merge.data.teacher.answers import AnswerFile, Request, Summary, key_of, mark_of, read_at
from qwen_merge.data.teacher.judge import IMAGE_FIELDS, IMAGE_PROMPT, judging, response_format
from qwen_merge.data.teacher.steps import (
    BEYOND_LIMIT,
    Servers,
    check_limit,
    check_missing,
    check_same,
    run_step,
    short_hash,
)
from qwen_merge.data.workspace import State, Workspace
from qwen_merge.errors import UserError

COMMAND = "qwen-merge data image-thinking judge"


@dataclass
class JudgeOptions:
    """`json_schema`: force the verdict's form. Off by default: a judge that reasons has to think first.

    `input`: the folder with the answers, if it is another: the verdicts are written beside them; `limit`: only the
    first N samples.
    """

    output: Path
    input: Path | None = None
    limit: int | None = None
    seed: int = 0
    json_schema: bool = False
    accept_missing: bool = False
    shard_mb: int = SHARD_BYTES // 2**20

    @property
    def source(self) -> Path:
        return self.input or self.output


def verdicts_file(output: Path) -> AnswerFile:
    return AnswerFile(answers_folder(output), "verdicts")


def answered(output: Path) -> Iterator[tuple[Sample, dict[str, Any] | None]]:
    """Every sample with the line of its answer, matched by id and content; None for one without."""
    file = answers_file(output)
    places = file.index()
    for sample in samples(output):
        place = places.get(key_of(sample.id, sample.mark()))
        yield sample, None if place is None else next(read_at(file.path, [place]))


def request_of(sample: Sample, entry: dict[str, Any], answer: Answer, servers: Servers, json_schema: bool) -> Request:
    """`entry`: the line that `answer` was read from."""
    prompt = IMAGE_PROMPT.format(
        question=sample.question, reference=sample.reference, thought=answer.thought, answer=answer.text
    )
    body = {
        "messages": [message(sample.picture, prompt)],
        "max_tokens": servers.max_tokens,
        **({"response_format": response_format(IMAGE_FIELDS)} if json_schema else {}),
        **servers.extra_body,
    }
    return Request(sample.id, body, of=mark_of(entry))


def judge(options: JudgeOptions, servers: Servers, overwrite: bool = False) -> Summary | None:
    """Ask for the verdicts; None when they were all there.

    Raises:
        UserError: the answers are not all there; the output's dataset_info.json is broken; see run_step().
    """
    dataset_info.read(options.output)
    file = answers_file(options.source)
    done = check_missing(file, ASK, options.accept_missing)
    check_same(done, "samples", drawn_content(options.source), ASK)

    def requests() -> Iterator[Request]:
        for sample, entry in itertools.islice(answered(options.source), options.limit):
            if entry is None:
                continue
            found, *_ = checked(entry, sample.question, sample.reference)
            if found:
                yield request_of(sample, entry, found, servers, options.json_schema)

    recorded = {
        "answers": short_hash(str(file.options())),
        "prompt": short_hash(IMAGE_PROMPT),
        "json_schema": options.json_schema,
        "seed": options.seed,
    }
    read = {"answers": done["content"], "limit": options.limit}
    return run_step(
        verdicts_file(options.source),
        recorded,
        servers,
        requests,
        judging(IMAGE_FIELDS, options.seed),
        overwrite,
        before=lambda: read,
    )


def write(options: JudgeOptions, overwrite: bool = False) -> Manifest | None:
    """Write <output>/image_thinking/ from answers and verdicts; None when it was finished with the same ones.

    A set that this command made from others is replaced when the new one is complete: nothing of it was paid for that
    is not in the answers and verdicts.

    Args:
        overwrite: replace a folder of that name that this command did not make, too.

    Raises:
        UserError: a step before is not finished, or has read something else; a folder of that name is there which this
            command did not make.
    """
    answers, verdicts = answers_file(options.source), verdicts_file(options.source)
    asked = check_missing(answers, ASK, options.accept_missing)
    judged = check_missing(verdicts, COMMAND, options.accept_missing)
    check_same(asked, "samples", drawn_content(options.source), ASK)
    check_same(judged, "answers", asked["content"], COMMAND)
    check_limit(judged, options.limit, COMMAND)
    recorded = {
        "asked": answers.options(),
        "judged": verdicts.options(),
        "samples in all": asked["samples"],
        "answers in all": {"lines": asked["requests"] - asked["missing"], "hash": asked["content"]},
        "verdicts in all": {"lines": judged["requests"] - judged["missing"], "hash": judged["content"]},
        "limit": options.limit,
        "shard_mb": options.shard_mb,
    }
    with Workspace(options.output, SET) as space:
        if space.begin(recorded, resume=True, overwrite=overwrite or _may_replace(space, recorded)) is State.FINISHED:
            dataset_info.enlist(options.output, SET, SET)
            return None
        manifest = _write(options, recorded, space)
        space.finish(manifest)
        dataset_info.enlist(options.output, SET, SET)
    return manifest


def _may_replace(space: Workspace, recorded: dict[str, Any]) -> bool:
    """Whether what is there is this command's own, made from something else.

    Raises:
        UserError: it is not this command's own. Not the workspace's message: --overwrite would take the verdicts too.
    """
    problem = space.problem(json.loads(json.dumps(recorded)), resume=True, overwrite=False)
    if problem is None:
        return False
    if not space.manifest_path.is_file() and not (space.folder / "options.json").is_file():
        raise UserError(
            f"{space.final} exists without {space.manifest_path.name}, so this command did not make it. Move it away, "
            "or choose another --output and name this one with --input. Answers and verdicts are kept."
        )
    print(f"{SET}: the set is made anew, for it was made from something else", file=sys.stderr, flush=True)
    return True


def _write(options: JudgeOptions, recorded: dict[str, Any], space: Workspace) -> Manifest:
    lines = drawn(options.source)
    counts = Counts()
    for line in lines:
        counts.merge(Counts.from_json(line["counts"]))
    counts.rows_out = 0
    judged: dict[str, dict[str, Any]] = {
        key_of(entry["id"], entry.get("of")): _short(entry) for entry in verdicts_file(options.source).entries()
    }
    of_set: Counter[str] = Counter()
    with ShardWriter(space.shards, "part-00000", options.shard_mb * 2**20) as writer:
        for number, (sample, entry) in enumerate(answered(options.source)):
            if options.limit is not None and number >= options.limit:
                counts.drop(BEYOND_LIMIT, sample.id)
                continue
            found, reason, seen = _outcome(sample, entry, judged)
            if found is None:
                counts.drop(reason, f"{sample.id}: {seen}")
                continue
            writer.add(record_of(sample, found))
            counts.rows_out += 1
            of_set[sample.set] += 1
        shards = writer.close()
    drops = {reason: entry["rows"] for reason, entry in counts.drops.items()}
    evaluated = bool(recorded["asked"].get("decontaminate"))
    return Manifest(
        name=SET,
        source=", ".join(line["id"] for line in lines),
        revision=recorded["asked"]["sets"],
        options=recorded,
        seed=recorded["asked"]["seed"],
        counts=counts,
        shards=shards,
        versions=package_versions("openai", *(["imagehash"] if evaluated else [])),
        extra={
            "filters": filters.counted(drops, evaluated),
            "sets": {
                line["id"]: {key: line[key] for key in ("seen", "eligible", "unfit", "several_turns")}
                | {"drawn": line["counts"]["rows_in"], "rows_out": of_set[line["id"]]}
                for line in lines
            },
        },
    )


def _short(entry: dict[str, Any]) -> dict[str, Any]:
    """A verdict without its reason's length: all of them are held in memory."""
    verdict = entry.get("verdict")
    if verdict:
        verdict = {**verdict, "reason": verdict["reason"][:120]}
    return {"verdict": verdict, "refused": "refused" in entry, "problem": str(entry.get("problem", ""))[:120]}


def _outcome(
    sample: Sample, entry: dict[str, Any] | None, judged: dict[str, dict[str, Any]]
) -> tuple[Answer | None, str, str]:
    """(answer, "", "") for a row of the set, else (None, reason, what was seen)."""
    if entry is None:
        return None, "no answer from the teacher", sample.question
    found, reason, seen = checked(entry, sample.question, sample.reference)
    if found is None:
        return None, reason, seen
    line = judged.get(key_of(sample.id, mark_of(entry)))
    if line is None:
        return None, "no verdict from the judge", sample.question
    if line["refused"]:
        return None, "answer refused by the judge's server", sample.question
    if dropped := judgement(line["verdict"]):
        return None, dropped, line["verdict"]["reason"] if line["verdict"] else line["problem"]
    return found, "", ""


def record_of(sample: Sample, answer: Answer) -> Record:
    return Record(
        [
            {"role": USER, "content": f"{IMAGE_TAG}\n{sample.question}"},
            {"role": ASSISTANT, "content": answer.content},
        ],
        [sample.picture],
    )
