"""A limit on the tokens that a thought may take, as a request option of the OpenAI server.

After `thinking_budget` tokens an open thought is ended with Qwen3's early-stop sentence and the answer follows: the
method of the Qwen3 technical report (section 4.7). Off unless a request asks for it:

    curl …/v1/chat/completions -d '{"model": …, "messages": […], "chat_template_kwargs": {"thinking_budget": 256}}'

vLLM's V1 engine takes no logits processors from a request, so the limit works one level above, on the interface that
its servers use (`EngineClient.generate`): the request runs as it is; if its thought is still open when the budget is
used up, it is aborted and a second one goes on from prompt, thought and sentence. The prefix cache makes the second
prefill cheap. The client sees one answer, streamed or whole. A budget that is not used up changes nothing in it.

Penalties on presence and frequency see the thought as part of the prompt in the second request.

vLLM 0.12 hands `generate` a request of the engine's instead of a prompt: there the option is refused with a clear 400.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import wraps
from typing import Any

from qwen_merge.overlays.vllm import MODEL_TYPES, clients

OPTION = "thinking_budget"
# The sentence of the Qwen3 report, in the form of Qwen3's model card: the thought it ends is never mid-sentence text
# of the answer, and the blank line is what the model was trained to see before an answer.
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


def hook() -> None:
    """Teach vLLM's request class the option and its engine clients what it means; safe to call again."""
    from vllm.entrypoints.openai.protocol import ChatCompletionRequest

    if "knows_thinking_budget" in ChatCompletionRequest.to_sampling_params.__dict__:
        return
    to_sampling_params = ChatCompletionRequest.to_sampling_params
    to_beam_search_params = ChatCompletionRequest.to_beam_search_params

    @wraps(to_sampling_params)
    def to_sampling_params_with_budget(self, *args, **kwargs):
        params = to_sampling_params(self, *args, **kwargs)
        budget = (self.chat_template_kwargs or {}).get(OPTION)
        if budget is not None:
            params.extra_args = {**(params.extra_args or {}), OPTION: budget}
        return params

    @wraps(to_beam_search_params)
    def to_beam_search_params_without_budget(self, *args, **kwargs):
        if (self.chat_template_kwargs or {}).get(OPTION) is not None:
            raise ValueError(f"{OPTION} cannot be combined with use_beam_search; leave one of them out.")
        return to_beam_search_params(self, *args, **kwargs)

    to_sampling_params_with_budget.__dict__["knows_thinking_budget"] = True
    ChatCompletionRequest.to_sampling_params = to_sampling_params_with_budget
    ChatCompletionRequest.to_beam_search_params = to_beam_search_params_without_budget
    if maker := clients.request_maker():
        maker.process_inputs = _refusing_budgets_of_requests(maker.process_inputs)
    for client in clients.of_v1():
        client.generate = _keeping_budgets(client.generate)
    for client in clients.of_v0():
        client.generate = _refusing_budgets(client.generate)


def _keeping_budgets(generate):
    @wraps(generate)
    def generate_within_budget(self, prompt, sampling_params, request_id, *args, **kwargs):
        if not _asks(self, sampling_params):
            return generate(self, prompt, sampling_params, request_id, *args, **kwargs)
        budget = checked_budget(sampling_params)

        def start(prompt, params, request_id):
            return generate(self, prompt, params, request_id, *args, **kwargs)

        return _within_budget(self, start, prompt, sampling_params, request_id, budget)

    generate_within_budget.__dict__["knows_thinking_budget"] = True
    return generate_within_budget


def _refusing_budgets(generate):
    """V0 makes its outputs in other ways. A budget that is silently not kept is worse than a refused one."""

    @wraps(generate)
    def generate_without_budget(self, prompt, sampling_params, *args, **kwargs):
        if _asks(self, sampling_params):
            raise ValueError(
                f"{OPTION} needs vLLM's V1 engine, and this server runs the older V0. Leave it out, or start the "
                "server without VLLM_USE_V1=0 and without options that V1 does not know (the server's log names them)."
            )
        return generate(self, prompt, sampling_params, *args, **kwargs)

    generate_without_budget.__dict__["knows_thinking_budget"] = True
    return generate_without_budget


def _refusing_budgets_of_requests(process_inputs):
    @wraps(process_inputs)
    def process_inputs_without_budget(self, request_id, prompt, params, *args, **kwargs):
        if _asked(self.model_config, params):
            raise ValueError(f"{OPTION} needs vLLM 0.9.1; this server runs a newer one. Leave it out.")
        return process_inputs(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs_without_budget


def _asks(client, params) -> bool:
    return _asked(clients.model_config_of(client), params)


def _asked(model_config, params) -> bool:
    return OPTION in (getattr(params, "extra_args", None) or {}) and model_config.hf_config.model_type in MODEL_TYPES


def checked_budget(params) -> int:
    """The option, from the sampling parameters of a request that has it.

    Raises:
        ValueError: not a whole number, or beside an option that it cannot be combined with; the server answers 400.
    """
    budget = params.extra_args[OPTION]
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise ValueError(f"{OPTION} is {budget!r}; expected a whole number of tokens, 0 or more.")
    clashes = [
        name
        for name, asked in (
            ("n > 1", params.n > 1),
            ("logprobs", params.logprobs is not None),
            ("prompt_logprobs", params.prompt_logprobs is not None),
            # A second request would begin its grammar, or its JSON, at the beginning.
            ("guided decoding (response_format, required tools)", params.guided_decoding is not None),
        )
        if asked
    ]
    if clashes:
        raise ValueError(f"{OPTION} cannot be combined with {', '.join(clashes)}; leave one of them out.")
    return budget


@dataclass(frozen=True)
class Marks:
    """Token ids that say where a turn and a thought begin and end."""

    turn: int
    think: int
    end_think: int

    @classmethod
    def of(cls, tokenizer) -> "Marks":
        return cls(*tokenizer.convert_tokens_to_ids(["<|im_start|>", "<think>", "</think>"]))

    def state(self, token_ids: Sequence[int]) -> str:
        """ "open", "closed" or "none": how the thought of the last turn stands.

        Only the last turn counts: a user may write <think> in a question, and it becomes the same token.
        """
        for token in reversed(token_ids):
            if token == self.think:
                return "open"
            if token == self.end_think:
                return "closed"
            if token == self.turn:
                break
        return "none"


class Watch:
    """Follows the tokens of an answer as they come and says where it has to be cut.

    Args:
        state: of the prompt's last turn, "open" or "none".
        limit: the token of the answer at which an open thought has used up its budget.
    """

    def __init__(self, marks: Marks, state: str, limit: int):
        self.marks, self.state, self.limit = marks, state, limit
        self.count = 0

    def cut(self, token_ids: Sequence[int]) -> int | None:
        """How many tokens of the answer stay, these ones included; None: it may go on.

        A thought that is still open at the limit is cut there. One that begins behind the limit, which nobody would
        count, is cut before its first token. The first </think> ends the watch.
        """
        for token in token_ids:
            if self.state == "none" and token == self.marks.think:
                if self.count >= self.limit:
                    return self.count
                self.state = "open"
            elif token == self.marks.end_think:
                self.state = "closed"
            self.count += 1
            if self.state == "open" and self.count == self.limit:
                return self.count
        return None

    def stop(self) -> None:
        self.state = "closed"


async def _within_budget(engine, start, prompt, params, request_id: str, budget: int) -> AsyncGenerator[Any, None]:
    """One request as its client sees it, made of one or two of the engine's.

    Args:
        start: begins a request of the engine: (prompt, sampling parameters, request id) -> generator of outputs.
        prompt: vLLM's tokens prompt; pictures are not yet expanded in its token ids.
    """
    from vllm.sampling_params import RequestOutputKind

    tokenizer = await engine.get_tokenizer()
    marks = Marks.of(tokenizer)
    state = marks.state(prompt["prompt_token_ids"])
    if state == "closed":  # by the template (enable_thinking: false): there is nothing to limit
        pieces, kind = start(prompt, params, request_id), RequestOutputKind.DELTA
    else:
        # The token <think> itself is not one of the thought's.
        watch = Watch(marks, state, budget + (state == "none"))
        kind, params = params.output_kind, params.clone()
        params.output_kind = RequestOutputKind.DELTA
        pieces = _pieces(engine, tokenizer, start, prompt, params, request_id, watch)
    whole: Any = None
    async with aclosing(pieces):
        async for piece in pieces:
            if kind == RequestOutputKind.DELTA:
                yield piece
                continue
            if whole is None:
                whole = piece
            else:
                whole.add(piece, aggregate=True)
            if piece.finished or kind == RequestOutputKind.CUMULATIVE:
                yield whole


async def _pieces(engine, tokenizer, start, prompt, params, request_id, watch: Watch) -> AsyncGenerator[Any, None]:
    """The answer piece by piece: that of the request as it is, until `watch` cuts it, and then that of a second one.

    The first request has all the tokens that were asked for and its own seed, so an answer that needs no cut is the one
    that would have come without a budget. `params` ask for outputs piece by piece, whatever the client's do.
    """

    def room_after(count: int, first) -> tuple[list[int], int]:
        """(tokens of the sentence, room for what follows it) when `count` tokens of the answer stay."""
        forced = tokenizer.encode(EARLY_STOP, add_special_tokens=False) if watch.state == "open" else []
        room = params.max_tokens
        if first is not None:  # params.max_tokens was reckoned with the prompt before its pictures were expanded
            room = min(room, engine.model_config.max_model_len - len(first.prompt_token_ids))
        return forced, room - count - len(forced)

    ids: list[int] = []
    text = ""
    first: Any = None
    if watch.limit:
        async with aclosing(start(prompt, params, request_id)) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                cut = watch.cut(completion.token_ids)
                ended = len(ids) + len(completion.token_ids)
                if cut is not None and (
                    room_after(cut, output)[1] < 1  # none for the sentence and an answer: an ordinary cut, soon
                    or (output.finished and cut == ended)
                ):
                    watch.stop()
                    cut = None
                if cut is None:
                    ids += completion.token_ids
                    text += completion.text
                    yield output
                    continue
                # Leaving the generator aborts the request. A piece may hold more tokens than those that stay.
                first = output
                kept = [*ids, *completion.token_ids][:cut]
                break
            else:
                return
        whole = tokenizer.decode(
            kept, skip_special_tokens=params.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        if _shorten(first, kept[len(ids) :], whole.rstrip("\ufffd")[len(text) :]):  # without half a character
            yield first
        ids = kept

    sentence, room = room_after(len(ids), first)
    forced_ids = sentence
    rest = _with_limit(params, max(1, room), used=len(ids) + len(forced_ids))
    if not forced_ids:  # no thought so far, and none may begin that nobody counts
        rest.logit_bias = {**(rest.logit_bias or {}), watch.marks.think: -100.0}
    rest_prompt = {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *ids, *forced_ids]}
    async with aclosing(start(rest_prompt, rest, f"{request_id}-answer")) as outputs:
        async for output in outputs:
            output.request_id = request_id
            completion = output.outputs[0]
            # Usage counts the client's prompt, not the thought and the sentence within this one.
            if first is not None:
                output.prompt_token_ids, output.num_cached_tokens = first.prompt_token_ids, first.num_cached_tokens
            else:
                output.prompt_token_ids = output.prompt_token_ids[: -len(sentence)]
            if forced_ids:
                completion.text = EARLY_STOP + completion.text
                completion.token_ids = [*forced_ids, *completion.token_ids]
                forced_ids = []
            yield output


def _shorten(output, token_ids: list[int], text: str) -> bool:
    """Leave these tokens and their text of a piece, and its request unfinished. Returns whether there are any."""
    completion = output.outputs[0]
    completion.token_ids, completion.text = token_ids, text
    completion.finish_reason = completion.stop_reason = None
    output.finished = False
    return bool(token_ids)


def _with_limit(params, limit: int, used: int = 0):
    """`params` for a part of the answer: at most `limit` tokens, after `used` of them."""
    part = params.clone()
    part.max_tokens = limit
    part.min_tokens = min(max(0, params.min_tokens - used), limit)
    if used and params.seed is not None:
        part.seed = params.seed + 1  # not the same draws again
    return part
