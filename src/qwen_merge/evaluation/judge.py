"""The judge of a run: asked once before anything else, so that the judge on record is the one that judges.

VLMEvalKit matches exactly, with a warning among many, when its judge has no key or does not answer, and it takes
OPENAI_API_BASE for the full address of the chat completions: with the usual http://HOST/v1 it gets 404 and goes on
without a judge. A number that was matched exactly would stand beside a published one that was judged.

    OPENAI_API_KEY=sk-… OPENAI_API_BASE=http://localhost:8001/v1 scripts/eval.sh DIR MMStar
"""

import argparse
import os
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from qwen_merge.data.teacher.endpoints import base_url
from qwen_merge.errors import UserError

EXACT = "exact_matching"
COMPLETIONS = "/chat/completions"
NOT_OPENAI = ("qwen-7b", "qwen-72b", "deepseek", "llama31-8b")  # judges that VLMEvalKit reaches in other ways
ATTEMPTS = 3


def settle(args: argparse.Namespace) -> None:
    """Make `args.judge` the one that will judge, and OPENAI_API_BASE what VLMEvalKit takes it for.

    Raises:
        UserError: a judge with a key does not answer.
    """
    _read_dotenv()
    complete_address()
    if args.judge == EXACT or getattr(args, "mode", "all") == "infer" or args.judge in NOT_OPENAI:
        return
    if not os.environ.get("OPENAI_API_KEY"):
        asked = args.judge or "a judge for each task"
        print(
            f"qwen-merge: OPENAI_API_KEY is not set: answers are matched exactly instead of judged by {asked}, and "
            "that is what is written down. An answer that is right but worded freely counts as wrong, so the numbers "
            "are lower and not comparable with judged ones.",
            file=sys.stderr,
            flush=True,
        )
        args.judge = EXACT
    elif os.environ.get("RANK", "0") == "0":
        ask(args.judge or "chatgpt-0125")


def _read_dotenv() -> None:
    """Once: VLMEvalKit reads the .env beside its package before it makes a judge, and would undo what is completed."""
    from vlmeval.dataset.utils import judge_util

    judge_util.load_env()
    judge_util.load_env = lambda: None


def complete_address() -> None:
    """Put /chat/completions behind OPENAI_API_BASE where it is missing.

    Raises:
        UserError: it is no address.
    """
    given = os.environ.get("OPENAI_API_BASE", "")
    if not given or given == "OFFICIAL" or urlsplit(given).query:  # the last: an address complete in its own way
        return
    try:
        whole = base_url(given)
    except ValueError as error:
        raise UserError(
            f"OPENAI_API_BASE is {given!r}, no address of a judge: {error}. Expected one such as "
            "http://localhost:8001/v1."
        ) from None
    os.environ["OPENAI_API_BASE"] = whole if whole.endswith(COMPLETIONS) else whole + COMPLETIONS


def ask(name: str) -> None:
    """Say hello to the judge through VLMEvalKit's own client.

    Raises:
        UserError: no answer; what came instead.
    """
    import requests
    from vlmeval.dataset.utils import build_judge

    seen = ""
    for attempt in range(ATTEMPTS):
        time.sleep(2 * attempt)
        judge: Any = build_judge(model=name, max_tokens=128)
        try:
            code, answer, response = judge.generate_inner([{"type": "text", "value": "hello"}])
        except requests.RequestException as error:
            seen = f"{type(error).__name__}: {error}"
            continue
        if code == 0 and answer and judge.fail_msg not in answer:
            return
        seen = f"status {response.status_code}: {response.text[:300]}"
        if 400 <= response.status_code < 500 and response.status_code != 429:
            break  # a refusal: the same request gives the same
    where = os.environ.get("OPENAI_API_BASE") or "OpenAI's own address"
    raise UserError(
        f"the judge {name} does not answer at {where} ({seen}).\nCorrect OPENAI_API_KEY and OPENAI_API_BASE (such as "
        f"http://localhost:8001/v1), or ask for exact matching: --judge {EXACT} (JUDGE={EXACT} scripts/eval.sh …)."
    )
