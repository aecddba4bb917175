"""Thinking budgets on an engine that says what it is told to: what is cut and what is left alone.

Run by `tests/unit/test_vllm_plugin.py`, in a process of its own.
"""

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from qwen_merge.overlays.vllm.thinking_budget import EARLY_STOP, Marks, Watch, _within_budget

TURN, THINK, CLOSE, END = 1, 2, 3, 4
WORDS = {TURN: "<|im_start|>", THINK: "<think>", CLOSE: "</think>", END: ""}
SENTENCE = [1000 + number for number in range(7)]
PROMPT = [TURN, 50, 51]
MARKS = Marks(turn=TURN, think=THINK, end_think=CLOSE)


class Tokenizer:
    def convert_tokens_to_ids(self, tokens):
        return [{word: number for number, word in WORDS.items()}[token] for token in tokens]

    def encode(self, text, add_special_tokens):
        assert text == EARLY_STOP
        assert not add_special_tokens
        return list(SENTENCE)

    def decode(self, ids, **_):
        assert not set(ids) & set(SENTENCE)
        return "".join(WORDS.get(token, f"{token} ") for token in ids)


class Engine:
    """Says `answer`, and `second` to a request that goes on; `pieces` tokens at a time. Keeps what it was asked."""

    model_config = SimpleNamespace(max_model_len=200)

    def __init__(self, answer, second=(90, END), pieces: int = 1):
        self.answers, self.pieces = [answer, second], pieces
        self.requests: list[tuple[list[int], SamplingParams, str]] = []
        self.aborted: list[str] = []

    async def get_tokenizer(self):
        return Tokenizer()

    async def start(self, prompt, params, request_id):
        said = list(self.answers[len(self.requests)])[: params.max_tokens]
        self.requests.append((prompt["prompt_token_ids"], params, request_id))
        assert params.output_kind == RequestOutputKind.DELTA
        try:
            for at in range(0, len(said), self.pieces):
                ids = said[at : at + self.pieces]
                finished = at + self.pieces >= len(said)
                reason = ("stop" if said[-1] == END else "length") if finished else None
                completion = CompletionOutput(0, Tokenizer().decode(ids), ids, None, None, reason)
                yield RequestOutput(request_id, None, prompt["prompt_token_ids"], None, [completion], finished)
        except GeneratorExit:
            self.aborted.append(request_id)
            raise

    def ask(self, budget: int, kind=RequestOutputKind.FINAL_ONLY, prompt=PROMPT, **options):
        """(tokens, text, finish reason) as the client puts them together."""
        params = SamplingParams(**{"max_tokens": 100, "temperature": 1, "seed": 5, "output_kind": kind, **options})
        prompt = {"prompt_token_ids": list(prompt)}

        async def collect():
            ids: list[int] = []
            text, reason = "", None
            async for output in _within_budget(self, self.start, prompt, params, "one", budget):
                (completion,) = output.outputs
                assert reason is None, "nothing comes after the end"
                assert output.request_id == "one"
                assert output.prompt_token_ids == prompt["prompt_token_ids"]
                assert output.finished == (completion.finish_reason is not None)
                assert output.finished or kind == RequestOutputKind.DELTA
                ids += completion.token_ids
                text += completion.text
                reason = completion.finish_reason
            return ids, text, reason

        return asyncio.run(collect())


def text_of(ids) -> str:
    return Tokenizer().decode(ids)


KINDS = pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA])
PIECES = pytest.mark.parametrize("pieces", [1, 3, 50])  # outputs run together when a client reads slowly


@KINDS
@PIECES
@pytest.mark.parametrize(
    ("answer", "budget"),
    [
        ([THINK, 60, 61, CLOSE, 70, 71, END], 10),  # closed inside the budget
        ([THINK, 60, 61, CLOSE, 70, 71, END], 3),  # closed exactly at the limit
        ([THINK, 60, 61, CLOSE, THINK, 70, 71, END], 3),  # the first </think> ended the thought
        ([70, 71, 72, 73, END], 2),  # none opened
        ([70, 71, END], 0),
        ([THINK, 60, END], 2),  # ended by itself at the limit
        ([THINK, *range(60, 90)], 50),  # cut off by the context, before the limit
    ],
)
def test_a_budget_that_is_not_reached_changes_nothing(answer, budget, pieces, kind):
    engine = Engine(answer, pieces=pieces)
    found = engine.ask(budget, kind)
    assert found == (answer, text_of(answer), "stop" if answer[-1] == END else "length")
    ((_, params, request_id),) = engine.requests
    assert (params.max_tokens, params.seed, params.logit_bias, request_id) == (100, 5, None, "one")
    assert engine.aborted == []


@KINDS
@PIECES
@pytest.mark.parametrize("budget", [0, 1, 4])
def test_an_open_thought_is_cut_at_the_limit_and_an_answer_follows(budget, pieces, kind):
    answer = [THINK, 60, 61, 62, 63, 64, CLOSE, 70, END]
    engine = Engine(answer, pieces=pieces)
    kept = answer[: budget + 1]
    ids, text, reason = engine.ask(budget, kind, min_tokens=20)
    assert ids == [*kept, *SENTENCE, 90, END]
    assert text == text_of(kept) + EARLY_STOP + "90 "
    assert reason == "stop"
    (_, _, _), (prompt, params, request_id) = engine.requests
    assert prompt == [*PROMPT, *kept, *SENTENCE]
    used = len(kept) + len(SENTENCE)
    assert (params.max_tokens, params.min_tokens, params.seed) == (100 - used, 20 - used, 6)
    assert params.logit_bias is None
    assert request_id == "one-answer"
    assert engine.aborted == ["one"]


@KINDS
@PIECES
def test_a_thought_that_begins_behind_the_limit_is_left_out(pieces, kind):
    engine = Engine([70, 71, 72, THINK, 60, CLOSE, 73, END], pieces=pieces)
    assert engine.ask(1, kind) == ([70, 71, 72, 90, END], "70 71 72 90 ", "stop")
    (prompt, params, _) = engine.requests[1]
    assert prompt == [*PROMPT, 70, 71, 72]
    assert params.logit_bias == {THINK: -100.0}
    assert params.max_tokens == 97


def test_a_thought_that_the_template_opened_counts_from_its_beginning():
    engine = Engine([60, 61, 62, CLOSE, 70, END])
    assert engine.ask(2, prompt=[TURN, 50, THINK])[0] == [60, 61, *SENTENCE, 90, END]
    nothing = Engine([90, END])  # the sentence at once: one request
    assert nothing.ask(0, prompt=[TURN, 50, THINK])[0] == [*SENTENCE, 90, END]
    assert [request_id for _, _, request_id in nothing.requests] == ["one-answer"]


def test_a_thought_that_the_template_closed_is_left_alone():
    engine = Engine([70, THINK, 71, END])
    prompt = [TURN, 50, THINK, CLOSE]
    assert engine.ask(0, RequestOutputKind.DELTA, prompt=prompt)[0] == [70, THINK, 71, END]
    assert len(engine.requests) == 1


@pytest.mark.parametrize(("options", "context"), [({"max_tokens": 9}, 200), ({}, len(PROMPT) + 9)])
def test_without_room_for_the_sentence_the_answer_is_cut_as_any_other(options, context):
    engine = Engine([THINK, *range(60, 160)][:9])
    engine.model_config = SimpleNamespace(max_model_len=context)
    assert engine.ask(4, **options) == (list(engine.answers[0]), text_of(engine.answers[0]), "length")
    assert len(engine.requests) == 1
    roomy = Engine([THINK, *range(60, 160)][:9])  # control: with room it is cut
    assert SENTENCE[0] in roomy.ask(4)[0]


def test_a_client_that_leaves_takes_its_request_along():
    engine = Engine([THINK, *range(60, 90)])
    params = SamplingParams(max_tokens=100, output_kind=RequestOutputKind.DELTA)

    async def leave():
        prompt = {"prompt_token_ids": PROMPT}
        async with aclosing(_within_budget(engine, engine.start, prompt, params, "one", 20)) as outputs:
            async for _ in outputs:
                break

    asyncio.run(leave())
    assert engine.aborted == ["one"]


def test_half_a_character_is_not_shown():
    class Bytes(Tokenizer):
        def decode(self, ids, **_):
            return super().decode(ids[:-1]) + "\ufffd"

    class Half(Engine):
        async def get_tokenizer(self):
            return Bytes()

    assert Half([THINK, 60, 61, 62, END]).ask(2)[1] == f"<think>60 {EARLY_STOP}90 "


def test_the_watch_says_where_to_cut():
    watch = Watch(MARKS, "none", 3)
    assert [watch.cut([token]) for token in (THINK, 60, 61)] == [None, None, 3]
    assert Watch(MARKS, "none", 3).cut([THINK, 60, 61, 62, CLOSE]) == 3
    assert Watch(MARKS, "none", 3).cut([THINK, 60, CLOSE, 62]) is None
    assert Watch(MARKS, "none", 3).cut([60, 61, THINK, 62]) == 3  # opened at the limit
    assert Watch(MARKS, "none", 3).cut([60, 61, 62, THINK]) == 3
    assert Watch(MARKS, "open", 2).cut([60, 61]) == 2
