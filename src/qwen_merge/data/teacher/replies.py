"""What a server's reply or refusal means: an answer, a failure to try again elsewhere, or the request's own fault.

Used by `endpoints`, which decides what to do about it.
"""

import email.utils
import re
import time
from dataclasses import dataclass
from typing import Any

from qwen_merge.evaluation.thoughts import CLOSE, OPEN

FINISHED = ("stop", "length", "content_filter", "tool_calls", "function_call")  # else it was broken off: "abort", none


@dataclass(frozen=True)
class Reply:
    """`text`: thought and answer, joined as `<think>…</think>…` when the server sends them apart."""

    text: str
    finish_reason: str
    tokens: int | None
    max_tokens: int
    model: str


class Refused(Exception):
    """The request's own fault, as the server says: the same request gives the same refusal."""


class Failed(Exception):
    """No answer after every attempt; the servers' fault, so a later run may ask again."""


class Transient(Exception):
    """One attempt failed. `counts`: it may be this request that breaks servers; `fatal`: the server is of no use."""

    def __init__(self, message: str, *, counts: bool = True, fatal: bool = False, rest: float | None = None):
        super().__init__(message)
        self.counts, self.fatal, self.rest = counts, fatal, rest


class Shorter(Exception):
    """Question and answer together are too long for the server; an answer of `max_tokens` would fit."""

    def __init__(self, max_tokens: int):
        super().__init__(max_tokens)
        self.max_tokens = max_tokens


def meaning_of(error: Any, max_tokens: int) -> Exception:
    """What a 4xx or 5xx means."""
    status, message = error.status_code, f"{error.status_code} {_message(error)}"
    if status in (429, 503):
        rest = _retry_after(error.response.headers.get("retry-after"))
        if rest is None and status == 429:
            rest = 5.0
        if rest is not None:
            return Transient(message, counts=False, rest=rest)
    if status in (401, 403, 404):  # the key, the address, the model: no other request would fare better there
        return Transient(message, fatal=True)
    if status >= 500 or status in (408, 409, 425, 429):
        return Transient(message)
    room = _room(message, max_tokens)
    return Shorter(room) if room else Refused(message)


def _message(error: Any) -> str:
    body = error.body
    if isinstance(body, dict):
        return str(body.get("message") or body)
    return str(body or error.message)[:2000]


def _room(message: str, asked: int) -> int | None:
    """How long an answer may be, from a refusal of question and answer together; None if it says something else.

    The two wordings that vLLM has had: "maximum context length is 8192 tokens … (500 in the messages, 8000 in the
    completion)" and "maximum context length is 8192 tokens and your request has 500 input tokens".
    """
    limit = re.search(r"maximum context length is (\d+) tokens", message)
    prompt = re.search(r"\((\d+) in the messages|has (\d+) input tokens", message)
    if not limit or not prompt:
        return None
    room = int(limit[1]) - int(prompt[1] or prompt[2])
    return room if 0 < room < asked else None


def _retry_after(value: str | None) -> float | None:
    """Seconds, from either form of the header; None if there is none that can be read."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def read_reply(data: Any, max_tokens: int, model: str) -> Reply:
    """Read a chat completion.

    Raises:
        ValueError: it is none, or it was broken off.
    """
    try:
        choice = data["choices"][0]
        message = choice["message"]
        finish, content = choice["finish_reason"], message.get("content")
        thought = message.get("reasoning_content") or message.get("reasoning")  # the name has changed
        tokens = (data.get("usage") or {}).get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if finish not in FINISHED:
        raise ValueError(f"broken off: finish_reason is {finish!r}")
    if not isinstance(content, str | None) or not isinstance(thought, str | None):
        raise ValueError("its content is no text")
    return Reply(joined(thought, content or ""), finish, tokens, max_tokens, model)


def joined(thought: str | None, content: str) -> str:
    """Thought and answer as one text, as a server without a reasoning parser sends them.

    A thought without content was cut off: it stays open. A text that closes a thought which the prompt opened gets the
    opening.
    """
    if thought is not None and content.strip():
        return f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{content.lstrip()}"
    if thought is not None:
        return f"{OPEN}\n{thought.lstrip()}"
    if CLOSE in content and OPEN not in content:
        return f"{OPEN}\n{content.lstrip()}"
    return content


def cause_of(error: BaseException) -> str:
    """The client says "Connection error."; what it was is in the chain."""
    parts = [str(error) or type(error).__name__]
    while (cause := error.__cause__) is not None:
        error = cause
    text = str(error) or type(error).__name__
    return parts[0] if text == parts[0] else f"{parts[0]} {text}"
