"""What all steps with a teacher or a judge share: options of the servers, and the run from servers to answers.

Used by `qwen-merge data text2image ask|judge` and `qwen-merge data image-thinking ask|judge`.
"""

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_merge.data.teacher.answers import AnswerFile, Request, Settle, Summary, collect, plain_answer
from qwen_merge.data.teacher.endpoints import Patience, Pool
from qwen_merge.errors import UserError

BEYOND_LIMIT = "beyond --limit"


@dataclass
class Servers:
    """Where answers come from. `extra_body`: more of the request's body, such as `{"min_p": 0.05}`."""

    endpoints: list[str]
    model: str | None = None
    in_flight: int = 32
    max_tokens: int = 8000
    extra_body: dict[str, Any] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)

    def recorded(self) -> dict[str, Any]:
        """What of this decides answers. Not the addresses: a set may be begun on two servers and finished on ten."""
        return {"max_tokens": self.max_tokens, "extra_body": self.extra_body or None}


def run_step(
    file: AnswerFile,
    options: dict[str, Any],
    servers: Servers,
    requests: Callable[[], Iterable[Request]],
    settle: Settle = plain_answer,
    overwrite: bool = False,
    totals: Callable[[], dict[str, Any]] = dict,
    before: Callable[[], dict[str, Any]] = dict,
    prepare: Callable[[], None] | None = None,
) -> Summary | None:
    """Ask for everything that is missing in `file` and record how it ended.

    Args:
        options: what decides the answers, but for `servers`' part; the model's name is added.
        requests: called once the servers are there; what it counts while it is read is in totals().
        totals: more for the record of the end.
        before: facts about what this step reads. A step is finished only as long as they are the same.
        prepare: makes what the requests are made of, once the servers are there and old answers are gone.

    Returns:
        None when the step had been finished with the same options: then no server is asked.

    Raises:
        UserError: other options than before, no server, …: see Pool, AnswerFile and collect.
    """
    options = {**options, **servers.recorded()}
    if not overwrite and _finished(file, options, servers.model, before()):
        return None
    state: dict[str, Any] = {"model": servers.model, "begun": False, "there": False}

    async def begin(pool: Pool) -> None:
        if not state["begun"]:
            there = file.begin({**options, "model": pool.model}, overwrite)
            state.update(model=pool.model, begun=True, there=there)

    async def check() -> None:
        async with Pool(servers.endpoints, servers.model, servers.in_flight, servers.patience) as pool:
            await begin(pool)

    async def run() -> Summary:
        async with Pool(servers.endpoints, state["model"], servers.in_flight, servers.patience) as pool:
            await begin(pool)
            pool.warn_of_short_contexts(servers.max_tokens)
            going_on = ", going on" if state["there"] else ""
            print(f"{pool.model} on {len(pool.urls)} endpoint(s){going_on}", file=sys.stderr)
            return await collect(file, requests(), pool, settle)

    with file:
        if prepare is not None:  # it may take minutes, in which no server is waited for and Ctrl-C has to work
            asyncio.run(check())
            prepare()
        summary = asyncio.run(run())
        file.finish(
            {
                "requests": summary.requests,
                "missing": summary.failed,
                "last_error": summary.last_error or None,
                **before(),
                **totals(),
            }
        )
    return summary


def _finished(file: AnswerFile, options: dict[str, Any], model: str | None, before: dict[str, Any]) -> bool:
    if not file.done_path.exists() or not file.options_path.exists():
        return False
    recorded = file.options()
    wanted = json.loads(json.dumps({**options, "model": model or recorded.get("model")}))
    done = file.done("")
    return recorded == wanted and not done["missing"] and all(_covers(done, key, before[key]) for key in before)


def _covers(done: dict[str, Any], key: str, value: Any) -> bool:
    """Whether a finished step's fact is still what is asked for; one with a higher limit, or none, did that too."""
    there = done.get(key)
    return there == value or (key == "limit" and (there is None or (value is not None and value <= there)))


def check_missing(file: AnswerFile, command: str, accept: bool) -> dict[str, Any]:
    """The record of a finished step, which may lack answers only if that is accepted.

    Raises:
        UserError: it is not finished, or requests are without an answer.
    """
    done = file.done(command)
    if done["missing"] and not accept:
        raise UserError(
            f"{done['missing']:,} of {done['requests']:,} requests of `{command}` have no answer (the last error: "
            f"{str(done['last_error'])[:300]}). Run it again, which asks for those only, or give --accept-missing to "
            "drop and count them."
        )
    return done


def check_same(done: dict[str, Any], what: str, content: str | None, command: str) -> None:
    """Whether a finished step read what is there now.

    Args:
        what: the name of what it read, in its record `done`: "answers", "samples".

    Raises:
        UserError: it read something else.
    """
    if done.get(what) != content:
        raise UserError(
            f"the {what} have changed since `{command}` read them. Run it again first; it asks only about what is new."
        )


def check_limit(done: dict[str, Any], limit: int | None, command: str) -> None:
    """Whether a step that may have been run with --limit has done all that the next one takes.

    Raises:
        UserError: it has not.
    """
    judged = done.get("limit")
    if judged is not None and (limit is None or limit > judged):
        raise UserError(
            f"`{command}` was run with --limit {judged}: the answers beyond have no verdicts. Run it again without "
            f"--limit, which goes on, or give --limit {judged} here too."
        )


def report(step: str, summary: Summary | None) -> int:
    """Print how a step ended; 1 when requests are without an answer."""
    if summary is None:
        print(f"{step}: finished already, nothing to do")
        return 0
    print(
        f"{step}: {summary.answered:,} answered, {summary.there:,} were there, {summary.refused:,} refused, "
        f"{summary.failed:,} without an answer"
    )
    if summary.failed:
        print(f"  the last error: {summary.last_error[:300]}\n  run the same command again to ask for what is missing")
    return 1 if summary.failed else 0


def sha256_of(path: Path) -> str:
    """Of a file's content.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    return digest.hexdigest()


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def evaluation_index(paths: list[Path]) -> Any:
    """The evaluation sets to keep out; None without any."""
    if not paths:
        return None
    from qwen_merge.data.decontaminate import Index

    return Index.read(paths)


def decontaminate_option(paths: list[Path]) -> list[list[str]] | None:
    return [[path.name, sha256_of(path)] for path in paths] or None
