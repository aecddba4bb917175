"""A stream of requests, and the file that their answers are written to as they come.

    qwen-merge data text2image ask        writes <output>/text2image.answers/answers.jsonl

An answer that a teacher took minutes for must not be lost: each is one line of an append-only journal, forced to the
disk when it comes, whatever becomes of the process. A restart reads which ids are there and asks for the others only.
Beside the journal lie its options: answers of two teachers, or of two seeds, never mix in one file.

    <name>.jsonl           one line a request: {"id", …what the request keeps…, "text", "finish_reason", …} or "refused"
    <name>.options.json    what decides the answers; a restart must give the same, or --overwrite
    <name>.done.json       written when all requests were seen: how many, where the others went, and the content's hash

What a line is about may change while its id stays: a question asked again gets another answer, and a verdict on the old
one says nothing about it. Such a line carries "of", the mark of what it is about, and counts for that alone.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_merge.data.disk import told
from qwen_merge.data.journal import Journal
from qwen_merge.data.manifest import option_changes, write_json
from qwen_merge.data.teacher.endpoints import Pool
from qwen_merge.data.teacher.replies import Failed, Refused
from qwen_merge.errors import UserError

ALL_WRONG = 20  # outcomes without one answer, after which something is wrong with all of them
PROGRESS_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Request:
    """`id`: unique in its file; `body`: as the API takes it, without `model`; `keep`: goes into the answer's line.

    `of`: the mark of what the request is about, if that can change under the same id; see mark_of().
    """

    id: str
    body: dict[str, Any]
    keep: dict[str, Any] = field(default_factory=dict)
    of: str | None = None

    @property
    def head(self) -> dict[str, Any]:
        """The first part of its line."""
        return {"id": self.id, **({"of": self.of} if self.of is not None else {}), **self.keep}


def key_of(name: str, of: str | None = None) -> str:
    """What a line is found by: its id, and the mark of what it is about."""
    return name if of is None else f"{name} of {of}"


def mark_of(entry: dict[str, Any]) -> str:
    """A line's mark: another answer under the same id has another one."""
    text = json.dumps(entry, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:24]


# Asks for what becomes of one request: the part of its line that is not id and keep.
Settle = Callable[[Pool, Request], Coroutine[Any, Any, dict[str, Any]]]


class AnswerFile:
    """One journal of answers with its options. One process at a time; the kernel drops the lock when it ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self.journal = Journal(Path(folder) / f"{name}.jsonl")
        self.options_path = Path(folder) / f"{name}.options.json"
        self.done_path = Path(folder) / f"{name}.done.json"
        self._lock = -1

    @property
    def path(self) -> Path:
        return self.journal.path

    def begin(self, options: dict[str, Any], overwrite: bool = False) -> bool:
        """Take the lock and compare the options with those of the answers that are there.

        Returns:
            Whether answers are there to go on from.

        Raises:
            UserError: other options; another process writes to the file; the folder cannot be written. What was
                finished then stays finished.
        """
        options = json.loads(json.dumps(options))  # as it will be read: tuples become lists
        with told(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            going_on = not overwrite and self._compare(options)
            with told(self.path.parent):
                self.done_path.unlink(missing_ok=True)
                if not going_on:
                    self.path.unlink(missing_ok=True)  # before the options: answers never stand under other ones
                    write_json(self.options_path, {"options": options})
        except BaseException:
            self.close()
            raise
        return going_on and self.path.exists()

    def _compare(self, options: dict[str, Any]) -> bool:
        """Whether the file was begun, with the same options; others are refused, and change nothing."""
        if self.options_path.exists():
            if changes := option_changes(self.options(), options):
                raise UserError(
                    f"the answers in {self.path} were begun with other options: {'; '.join(changes)}. Give the same "
                    "to go on, --overwrite to throw them away and start anew, or another --output."
                )
            return True
        if self.path.exists():
            raise UserError(
                f"{self.path} exists without {self.options_path.name}. Give --overwrite to throw it away, or another "
                "--output."
            )
        return False

    def options(self) -> dict[str, Any]:
        """The options that the answers were begun with.

        Raises:
            UserError: they cannot be read.
        """
        return _read_object(self.options_path, "options")["options"]

    def finish(self, summary: dict[str, Any]) -> None:
        """Record that every request was seen, whether or not it was answered."""
        self.journal.close()
        with told(self.path.parent):
            write_json(self.done_path, {**summary, "content": self.content()})

    def done(self, command: str) -> dict[str, Any]:
        """What finish() recorded, with the hash of the content that it found.

        Raises:
            UserError: `command`, which writes this file, has not come to its end.
        """
        if not self.done_path.exists():
            state = "is not finished" if self.path.exists() else "has not been run"
            raise UserError(f"`{command}` {state} ({self.done_path} is missing). Run it to its end first.")
        return _read_object(self.done_path, "requests", "missing", "content")

    def content(self) -> str:
        """A hash of all lines, whatever their order: servers answer in another one each time."""
        lines = sorted(mark_of(entry) for entry in self.entries())
        return hashlib.sha256("".join(lines).encode("ascii")).hexdigest()[:24]

    def index(self) -> dict[str, int]:
        """Each line's place in the file, in bytes, by its key_of(); of a key that is there twice, the first.

        About 150 bytes an answer.
        """
        places: dict[str, int] = {}
        for place, entry in self._lines():
            places.setdefault(key_of(entry["id"], entry.get("of")), place)
        return places

    def entries(self) -> Iterator[dict[str, Any]]:
        """The lines in the order they came, each key_of() once."""
        seen: set[str] = set()
        for _, entry in self._lines():
            key = key_of(entry["id"], entry.get("of"))
            if key not in seen:
                seen.add(key)
                yield entry

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            place = 0
            for line in file:
                if not line.endswith(b"\n"):
                    return  # torn by a kill; cut off before the next append
                try:
                    entry = json.loads(line.decode("utf-8", "surrogatepass"))
                    entry["id"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path}: the line at byte {place} is no answer: {line[:80]!r}. The file was changed by "
                        "something else; mend the line, or start anew with --overwrite."
                    ) from None
                yield place, entry
                place += len(line)

    def close(self) -> None:
        self.journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_lock(self) -> None:
        self._lock = os.open(self.options_path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"another process is writing to {self.path}. Wait for it, or choose another --output."
            ) from None
        except OSError:  # a file system without locks
            pass


def _read_object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON file of this module."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in found]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Mend it, or start anew with --overwrite.") from None
    if missing or not isinstance(found, dict):
        raise UserError(
            f"{path} has no {', '.join(missing) or 'fields'}: it is empty, or was changed or made by something else. "
            "Mend it, or start anew with --overwrite."
        )
    return found


def read_at(path: Path, places: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The lines at these places of a journal, as index() gives them: one at a time, so memory stays small."""
    with open(path, "rb") as file:
        for place in places:
            file.seek(place)
            yield json.loads(file.readline().decode("utf-8", "surrogatepass"))


def not_ended(entry: dict[str, Any]) -> str | None:
    """Why a line holds no answer that came to its own end; None if it does."""
    if "refused" in entry:
        return "question refused by the teacher's server"
    if entry["finish_reason"] == "length":
        return "answer cut off by length"
    return None if entry["finish_reason"] == "stop" else f"answer ended by {entry['finish_reason']}"


async def plain_answer(pool: Pool, request: Request) -> dict[str, Any]:
    """Ask once, keep the reply."""
    reply = await pool.ask(request.body)
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "tokens": reply.tokens,
        "max_tokens": reply.max_tokens,
    }


@dataclass
class Summary:
    """`there`: answered by an earlier run; `failed`: got no answer, and will be asked again by the next run."""

    there: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    last_error: str = ""

    @property
    def requests(self) -> int:
        return self.there + self.answered + self.refused + self.failed


async def collect(file: AnswerFile, requests: Iterable[Request], pool: Pool, settle: Settle = plain_answer) -> Summary:
    """Send every request that has no line yet, each as soon as a server has room, and write each answer as it comes.

    Args:
        requests: read in a thread of its own, and only as far ahead as the servers can take: it may be endless for
            all the memory it takes. What else it does as it is read (counting) is done when this returns.

    Raises:
        UserError: no server is left; or of the first requests none was answered (a wrong option, a wrong server):
            their refusals are then not kept.
    """
    known = set(file.index())
    summary = Summary()
    progress = _Progress(summary)
    harvest = _Harvest(file, summary)
    tasks: dict[asyncio.Task, Request] = {}
    ahead = pool.capacity + len(pool.urls)  # a few more than fit, so that no server waits for this loop
    iterator = iter(requests)
    reader: asyncio.Task | None = None
    more = True
    try:
        while more or tasks:
            if more and reader is None and len(tasks) < ahead:
                # In a thread: a source may block for minutes, and answers must be written meanwhile.
                reader = asyncio.create_task(asyncio.to_thread(_next_unknown, iterator, known, summary))
            waiting = {*tasks, reader} if reader else set(tasks)
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=PROGRESS_EVERY)
            if reader in done and reader is not None:
                request, reader = reader.result(), None
                more = request is not None
                if request is not None:
                    tasks[asyncio.create_task(settle(pool, request))] = request
            harvest.write([(tasks.pop(task), task) for task in done if task in tasks])
            harvest.check(at_the_end=not more and not tasks)
            progress.show()
    finally:
        for task in [*tasks, *([reader] if reader else [])]:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(UserError):  # another one is on its way
            harvest.write([(request, task) for task, request in tasks.items() if not task.cancelled()])
        progress.show(last=True)
    return summary


class _Harvest:
    """Writes what became of requests."""

    def __init__(self, file: AnswerFile, summary: Summary):
        self.file, self.summary = file, summary
        self.held: list[dict[str, Any]] = []  # refusals, until one answer shows that not everything is refused
        self.failed_in_a_row = 0

    def write(self, ended: list[tuple[Request, asyncio.Task]]) -> None:
        """Write answers and refusals, then raise what was neither (no server is left, a bug)."""
        summary, lines = self.summary, []
        other: BaseException | None = None
        for request, task in ended:
            line = request.head
            error = task.exception()
            if error is None:
                lines.append({**line, **task.result()})
                summary.answered += 1
                self.failed_in_a_row = 0
            elif isinstance(error, Refused):
                self.held.append({**line, "refused": str(error)[:1000]})
                summary.refused += 1
                summary.last_error = str(error)
            elif isinstance(error, Failed):
                summary.failed += 1
                self.failed_in_a_row += 1
                summary.last_error = str(error)
            else:
                other = error
        if summary.answered + summary.there:
            lines += self.held
            self.held = []
        self.file.journal.extend(lines)
        if other is not None:
            raise other

    def check(self, at_the_end: bool) -> None:
        """Stop when something is wrong with every request."""
        if self.failed_in_a_row >= ALL_WRONG or len(self.held) >= (1 if at_the_end else ALL_WRONG):
            raise UserError(
                f"{max(len(self.held), self.failed_in_a_row)} requests in a row got no answer; the last one: "
                f"{self.summary.last_error[:600]}\nWhat was answered before is kept. Mend the servers or the options "
                "(--no-json-schema, for a judge that knows no `response_format`), and give the same command again."
            )


def _next_unknown(iterator: Iterator[Request], known: set[str], summary: Summary) -> Request | None:
    for request in iterator:
        key = key_of(request.id, request.of)
        if key not in known:
            known.add(key)
            return request
        summary.there += 1
    return None


class _Progress:
    """A line on stderr now and then: how many, how fast."""

    def __init__(self, summary: Summary):
        self.summary = summary
        self.began = self.last = time.monotonic()

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.last < PROGRESS_EVERY:
            return
        self.last = now
        s = self.summary
        rate = s.answered / max(now - self.began, 1e-9)
        print(
            f"{s.answered:,} answered ({rate:.1f} a second), {s.there:,} were there, {s.refused:,} refused, "
            f"{s.failed:,} without an answer",
            file=sys.stderr,
            flush=True,
        )
