"""Several OpenAI-compatible servers as one: round-robin over the healthy ones, and nothing lost when some are not.

    async with Pool(["http://a:8000/v1", "http://b:8000/v1"]) as pool:
        reply = await pool.ask({"messages": [...], "max_tokens": 8000})

Why not the client's own retries: a request that failed has to move to another server, which a client of one server
cannot do. A server that stops answering is taken out, its requests go elsewhere, and it is asked again from time to
time whether it is back. What is the request's own fault (400, 413, 422) is not tried again. The time that an answer may
take follows from its length: a thought of 8,000 tokens on a busy server needs many minutes.

Nothing here decides what a reply is worth: a cut-off one is a reply whose `finish_reason` is "length".
"""

import asyncio
import contextlib
import json
import os
import random
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from qwen_merge.data.teacher.replies import Failed, Reply, Shorter, Transient, cause_of, meaning_of, read_reply
from qwen_merge.errors import UserError

KEY_VARIABLE = "QWEN_MERGE_API_KEY"
RATE_LIMITS = 100  # that many 429s for one request are no accident


@dataclass(frozen=True)
class Patience:
    """How long to wait for what. Seconds, unless said otherwise."""

    attempts: int = 6  # of one request that fails, on whichever servers
    back_off: float = 1.0  # before the second attempt; doubled for each further one
    longest_back_off: float = 60.0
    connect: float = 10.0
    grace: float = 180.0  # for queueing and for reading the prompt
    slowest: float = 4.0  # tokens a second of one answer, below which a server counts as hanging
    probe_every: float = 15.0
    probe: float = 20.0  # for an answer to a probe
    missed_probes: int = 3  # in a row, until a server that answers nothing at all is taken out
    failures: int = 3  # in a row, of requests, until a server is taken out
    all_dead: float = 300.0  # without any healthy server, until the run stops

    def of_answer(self, max_tokens: int) -> float:
        """The time-out of a request for an answer of at most `max_tokens` tokens."""
        return self.grace + max_tokens / self.slowest


@dataclass(eq=False)
class Endpoint:
    """One server, and how it does."""

    url: str
    client: Any
    model: str = ""
    max_model_len: int | None = None
    healthy: bool = False
    busy: int = 0
    failures: int = 0  # in a row
    probation: bool = False  # back after being out: one request at a time until one succeeds
    rest_until: float = 0.0
    error: str = ""
    answers: int = 0
    calls: set[asyncio.Task] = field(default_factory=set)

    def free(self, in_flight: int, now: float) -> bool:
        return self.healthy and now >= self.rest_until and self.busy < (1 if self.probation else in_flight)


class Pool:
    """Use as an async context manager: entering it checks every server, leaving it ends what is under way.

    Args:
        urls: base URLs; `/v1` is added to one without a path. Several may name the same machine.
        model: the served model's name; None takes it from each server's `/v1/models`, which must then all agree.
        in_flight: requests at a time for each server.

    Raises:
        UserError: (entering) an URL is none, no server answers, or they serve different models.
    """

    def __init__(
        self, urls: list[str], model: str | None = None, in_flight: int = 32, patience: Patience | None = None
    ):
        self.urls, problems = [], []
        for url in urls:
            try:
                self.urls.append(base_url(url))
            except ValueError as error:
                problems.append(f"{url!r} is no URL such as http://localhost:8000/v1: {error}")
        if not urls:
            problems.append("no --endpoint was given; expected at least one, such as http://localhost:8000/v1")
        if in_flight < 1:
            problems.append(f"--in-flight {in_flight}: expected at least 1")
        if problems:
            raise UserError.from_list("the endpoints cannot be used:", problems)
        self.model = model
        self.in_flight = in_flight
        self.patience = patience or Patience()
        self.endpoints: list[Endpoint] = []
        self._next = 0
        self._changed = asyncio.Event()
        self._dead_since: float | None = None
        self._watchers: list[asyncio.Task] = []

    @property
    def capacity(self) -> int:
        """Requests at a time for all servers together, the dead ones included."""
        return self.in_flight * len(self.urls)

    async def __aenter__(self) -> "Pool":
        import openai

        key = os.environ.get(KEY_VARIABLE) or "none"
        self.endpoints = [
            Endpoint(url, openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)) for url in self.urls
        ]
        await asyncio.gather(*(self._probe(endpoint) for endpoint in self.endpoints))
        try:
            self._check_start()
        except UserError:
            await self._close()
            raise
        self._watchers = [asyncio.create_task(self._watch(endpoint)) for endpoint in self.endpoints]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        tasks = [*self._watchers, *(call for endpoint in self.endpoints for call in endpoint.calls)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.client.close()

    def _check_start(self) -> None:
        healthy = [endpoint for endpoint in self.endpoints if endpoint.healthy]
        if not healthy:
            raise UserError.from_list(
                "no endpoint can be used. Start one (`vllm serve MODEL`) or correct --endpoint and --model; a key goes "
                f"into {KEY_VARIABLE}.",
                [f"{endpoint.url}: {endpoint.error}" for endpoint in self.endpoints],
            )
        names = {endpoint.model for endpoint in healthy}
        if len(names) > 1:
            raise UserError.from_list(
                "the endpoints serve different models, and a set has one teacher. Give --model, or serve one model "
                "under one --served-model-name.",
                [f"{endpoint.url}: {endpoint.model}" for endpoint in healthy],
            )
        self.model = names.pop()
        for endpoint in self.endpoints:
            if not endpoint.healthy:
                _say(f"{endpoint.url} is left out until it answers: {endpoint.error}")

    def warn_of_short_contexts(self, max_tokens: int) -> None:
        """Say so when answers of this length leave a server little room for questions: it then gets shorter answers."""
        for endpoint in self.endpoints:
            limit = endpoint.max_model_len
            if limit is not None and limit < max_tokens + 1024:
                _say(
                    f"{endpoint.url} serves {limit:,} tokens for question and answer together, and answers may have "
                    f"{max_tokens:,}: long questions get less room, and more answers are cut off and dropped. Serve "
                    f"with --max-model-len {max_tokens + 4096} or more."
                )

    # --- one request ---

    async def ask(self, body: dict[str, Any]) -> Reply:
        """Send one chat completion request, as often and wherever it takes.

        Args:
            body: what the API takes but for `model`; `messages` and `max_tokens` are expected.

        Raises:
            Refused: the server says that the request itself is wrong.
            Failed: every attempt failed.
            UserError: no server has been healthy for a long time.
        """
        failures = limits = 0
        while True:
            endpoint = await self._take()
            try:
                reply = await self._call(endpoint, body)
            except Transient as error:
                self._note_failure(endpoint, error)
                failures += error.counts
                limits += error.rest is not None
                if failures >= self.patience.attempts or limits >= RATE_LIMITS:
                    raise Failed(f"{endpoint.url}: {error}") from error
            except Shorter as error:
                body = {**body, "max_tokens": error.max_tokens}
                continue
            else:
                self._note_success(endpoint)
                return reply
            finally:
                endpoint.busy -= 1
                self._notify()
            if failures:  # it holds no server's slot while it waits
                wait = min(self.patience.longest_back_off, self.patience.back_off * 2 ** (failures - 1))
                await asyncio.sleep(wait * random.uniform(0.5, 1))  # jitter: they failed together

    async def _take(self) -> Endpoint:
        """The next healthy server with room, in turn."""
        while True:
            now = time.monotonic()
            for offset in range(len(self.endpoints)):
                position = (self._next + offset) % len(self.endpoints)
                if self.endpoints[position].free(self.in_flight, now):
                    self._next = position + 1
                    self.endpoints[position].busy += 1
                    return self.endpoints[position]
            self._check_alive(now)
            with contextlib.suppress(asyncio.TimeoutError):  # the time-out: rests end without a notice
                await asyncio.wait_for(self._changed.wait(), 0.25)

    def _check_alive(self, now: float) -> None:
        if any(endpoint.healthy for endpoint in self.endpoints):
            self._dead_since = None
            return
        self._dead_since = self._dead_since or now
        if now - self._dead_since >= self.patience.all_dead:
            raise UserError.from_list(
                f"no endpoint has answered for {self.patience.all_dead:.0f} s. Every answer that came is kept; start "
                "the servers again and give the same command to go on.",
                [f"{endpoint.url}: {endpoint.error}" for endpoint in self.endpoints],
            )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _call(self, endpoint: Endpoint, body: dict[str, Any]) -> Reply:
        limit = self.patience.of_answer(body["max_tokens"])
        call = asyncio.ensure_future(self._post(endpoint, body, limit))
        endpoint.calls.add(call)
        try:
            done, _ = await asyncio.wait({call}, timeout=limit)
        finally:
            endpoint.calls.discard(call)
            call.cancel()  # of no effect on one that is done
        if not done:
            raise Transient(f"no answer within {limit:.0f} s")
        if call.cancelled():  # by _take_out: the server answers nothing at all
            raise Transient(f"the server went away: {endpoint.error}")
        return call.result()

    async def _post(self, endpoint: Endpoint, body: dict[str, Any], limit: float) -> Reply:
        import openai

        messages, max_tokens = body["messages"], body["max_tokens"]
        rest = {key: value for key, value in body.items() if key not in ("messages", "model")}
        try:
            raw = await endpoint.client.chat.completions.with_raw_response.create(
                model=endpoint.model,
                messages=messages,
                extra_body=rest,
                timeout=openai.Timeout(limit, connect=self.patience.connect),
            )
        except openai.APIStatusError as error:
            raise meaning_of(error, max_tokens) from error
        except openai.APITimeoutError as error:
            connecting = "Connect" in type(error.__cause__).__name__
            raise Transient("no answer in time", counts=not connecting, fatal=connecting) from error
        except openai.APIConnectionError as error:
            connecting = "ConnectError" in type(error.__cause__).__name__
            raise Transient(cause_of(error), counts=not connecting, fatal=connecting) from error
        try:
            return read_reply(json.loads(raw.http_response.text), max_tokens, endpoint.model)
        except ValueError as error:
            raise Transient(f"not a chat completion ({error}): {raw.http_response.text[:200]!r}") from error

    # --- how the servers do ---

    def _note_success(self, endpoint: Endpoint) -> None:
        endpoint.failures = 0
        endpoint.probation = False
        endpoint.answers += 1

    def _note_failure(self, endpoint: Endpoint, error: Transient) -> None:
        if error.rest is not None:  # it is healthy, and says how long it wants to be left alone
            endpoint.rest_until = max(endpoint.rest_until, time.monotonic() + error.rest)
            return
        endpoint.failures += 1
        endpoint.error = str(error)
        if error.fatal or endpoint.probation or endpoint.failures >= self.patience.failures:
            self._take_out(endpoint)

    def _take_out(self, endpoint: Endpoint) -> None:
        if endpoint.healthy:
            endpoint.healthy = False
            _say(f"{endpoint.url} is taken out: {endpoint.error}")
            self._notify()

    async def _watch(self, endpoint: Endpoint) -> None:
        """Probe a server as long as the pool lives: back in when it answers, out when it answers nothing."""
        missed = 0
        while True:
            # A random part, so that many servers (or many clients of one) are not asked at the same moment.
            await asyncio.sleep(self.patience.probe_every * random.uniform(0.8, 1.2))
            was_out = not endpoint.healthy
            before = endpoint.error
            if await self._probe(endpoint):
                missed = 0
                if was_out:
                    _say(f"{endpoint.url} is back")
                    endpoint.probation = True
                    self._notify()
            elif not was_out:
                missed += 1
                if missed >= self.patience.missed_probes:
                    self._take_out(endpoint)
                    for call in list(endpoint.calls):  # they would hang until their time-outs
                        call.cancel()
            else:
                endpoint.error = before or endpoint.error

    async def _probe(self, endpoint: Endpoint) -> bool:
        """Ask `/v1/models`: marks a server healthy that serves what is wanted; never marks one dead."""
        import openai

        try:
            raw = await endpoint.client.models.with_raw_response.list(timeout=self.patience.probe)
            cards = {card["id"]: card for card in json.loads(raw.http_response.text)["data"]}
        except openai.OpenAIError as error:
            endpoint.error = cause_of(error)
            return False
        except (ValueError, KeyError, TypeError) as error:
            endpoint.error = f"its /v1/models is no list of models ({error!r})"
            return False
        name = self.model or (next(iter(cards)) if len(cards) == 1 else "")
        if name not in cards:
            wanted = self.model or "one model only; name it with --model"
            endpoint.error = f"serves {', '.join(cards) or 'nothing'}; expected {wanted}"
            return False
        endpoint.model = name
        length = cards[name].get("max_model_len")
        endpoint.max_model_len = length if isinstance(length, int) else None
        if not endpoint.healthy:
            endpoint.failures = 0
        endpoint.healthy = True
        return True


def base_url(given: str) -> str:
    """The URL that `/chat/completions` is put behind: as given, with `/v1` if it has no path of its own.

    Not all servers have their API under `/v1`: a path is left as it is.

    Raises:
        ValueError: it is no http URL of a server; what is wrong with it.
    """
    import httpx

    if re.search(r"\s", given):
        raise ValueError("there is white space in it")
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https"):
        raise ValueError("it does not begin with http:// or https://")
    if not parts.hostname:
        raise ValueError("it names no host")
    if parts.port == 0:  # reading the port raises ValueError if it is no number, or too large a one
        raise ValueError("no server has port 0")
    if parts.query or parts.fragment:
        raise ValueError("there is something behind its path")
    try:
        httpx.URL(given)
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from None
    return given.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
