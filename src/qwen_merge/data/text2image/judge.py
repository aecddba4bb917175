"""Judge the answers against the set's own: one verdict an answer, written under the answer's id.

    qwen-merge data text2image judge --endpoint http://localhost:8000/v1

Answers that no verdict can save (cut off by length, without a finished thought, …) are not judged; `convert` counts
them. Each verdict carries the mark of the answer that was judged: an answer that came in the place of another one is
judged anew, and the others' verdicts stay.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_merge.data.teacher.answers import AnswerFile, Request, Summary, mark_of, not_ended, read_at
from qwen_merge.data.teacher.judge import NO_THINK, TEXT_FIELDS, TEXT_PROMPT, judging, response_format
from qwen_merge.data.teacher.steps import Servers, check_missing, run_step, short_hash
from qwen_merge.data.teacher.texts import mark_in
from qwen_merge.data.text2image import THINKING
from qwen_merge.data.text2image.ask import COMMAND as ASK
from qwen_merge.data.text2image.ask import answers_file, answers_folder
from qwen_merge.evaluation import thoughts

COMMAND = "qwen-merge data text2image judge"


def verdicts_file(output: Path) -> AnswerFile:
    return AnswerFile(answers_folder(output), "verdicts")


def problem_of(entry: dict[str, Any]) -> str | None:
    """Why an answer is of no use whatever a judge says; None if it is worth a verdict."""
    if problem := not_ended(entry):
        return problem
    found = thoughts.split(entry["text"])
    problems = {
        "thought not finished": found.closed is False,
        "empty answer": not found.answer,
        "no thought in thinking mode": entry["mode"] == THINKING and not found.thought,
        "a thought without being asked for one": entry["mode"] != THINKING and bool(found.thought),
        "media tag or control token in the answer": bool(mark_in(found.answer) or mark_in(found.thought)),
    }
    return next((problem for problem, holds in problems.items() if holds), None)


def request_of(entry: dict[str, Any], servers: Servers, json_schema: bool) -> Request:
    prompt = TEXT_PROMPT.format(
        question=entry["question"], reference=entry["reference"], answer=thoughts.split(entry["text"]).answer
    )
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt + NO_THINK}],
        "max_tokens": servers.max_tokens,
        **({"response_format": response_format(TEXT_FIELDS)} if json_schema else {}),
        **servers.extra_body,
    }
    return Request(entry["id"], body, of=mark_of(entry))


def in_order(output: Path, limit: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The answers with their places in the file, in the order of their ids; with a limit only the first ones."""
    file = answers_file(output)
    index = file.index()
    places = [index[key] for key in sorted(index)[:limit]]
    yield from zip(places, read_at(file.path, places), strict=True)


def judge(
    output: Path,
    servers: Servers,
    seed: int = 0,
    json_schema: bool = True,
    accept_missing: bool = False,
    overwrite: bool = False,
    limit: int | None = None,
) -> Summary | None:
    """Run the step; None when it was finished before.

    Args:
        output: the folder that `ask` wrote to; the verdicts are written beside the answers.
        limit: only the first N answers, in the order of their ids: for trials. More of them can be judged later.

    Raises:
        UserError: the answers are not all there; see run_step().
    """
    answers = answers_file(output)
    done = check_missing(answers, ASK, accept_missing)

    def requests() -> Iterator[Request]:
        for entry in answers.entries() if limit is None else (entry for _, entry in in_order(output, limit)):
            if problem_of(entry) is None:
                yield request_of(entry, servers, json_schema)

    recorded = {
        "answers": short_hash(str(answers.options())),
        "prompt": short_hash(TEXT_PROMPT),
        "json_schema": json_schema,
        "seed": seed,
    }
    read = {"answers": done["content"], "limit": limit}
    return run_step(
        verdicts_file(output), recorded, servers, requests, judging(TEXT_FIELDS, seed), overwrite, before=lambda: read
    )
