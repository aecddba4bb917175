"""A limit on the tokens that a thought may take, as a request option of the OpenAI server.

After `thinking_budget` tokens an open thought is ended with Qwen3's early-stop sentence and the answer follows: the
method of the Qwen3 technical report (section 4.7). Off unless a request asks for it:

    curl …/v1/chat/completions -d '{"model": …, "messages": […], "chat_template_kwargs": {"thinking_budget": 256}}'

vLLM's V1 engine takes no logits processors from a request, so the limit works one level above, on the interface that
its servers use (`EngineClient.generate`): the request runs with the budget as its limit; if the thought is still open
then, a second one goes on from prompt, thought and sentence. The prefix cache makes the second prefill cheap. What the
client sees is one answer, streamed or whole.

vLLM 0.12 hands `generate` a request of the engine's instead of a prompt: there the option is refused with a clear 400.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import wraps
from typing import Any

from qwen_merge.overlays.vllm import MODEL_TYPE
from qwen_merge.overlays.vllm.chat import input_processor_class

OPTION = "thinking_budget"
# The sentence of the Qwen3 report, in the form of Qwen3's model card: the thought it ends is never mid-sentence text
# of the answer, and the blank line is what the model was trained to see before an answer.
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


def hook() -> None:
    """Teach vLLM's request class the option and its engine client what it means; safe to call again."""
    from vllm.entrypoints.openai.protocol import ChatCompletionRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    if "knows_thinking_budget" in ChatCompletionRequest.to_sampling_params.__dict__:
        return
    to_sampling_params, generate = ChatCompletionRequest.to_sampling_params, AsyncLLM.generate
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

    @wraps(generate)
    def generate_within_budget(self, prompt, sampling_params, request_id, *args, **kwargs):
        asked = OPTION in (sampling_params.extra_args or {})
        if not asked or self.model_config.hf_config.model_type != MODEL_TYPE:
            return generate(self, prompt, sampling_params, request_id, *args, **kwargs)
        budget = checked_budget(sampling_params)

        def start(prompt, params, request_id):
            return generate(self, prompt, params, request_id, *args, **kwargs)

        return _within_budget(self, start, prompt, sampling_params, request_id, budget)

    to_sampling_params_with_budget.__dict__["knows_thinking_budget"] = True
    generate_within_budget.__dict__["knows_thinking_budget"] = True
    ChatCompletionRequest.to_sampling_params = to_sampling_params_with_budget
    ChatCompletionRequest.to_beam_search_params = to_beam_search_params_without_budget
    if input_processor := input_processor_class():  # vLLM 0.12
        _refuse_budgets(input_processor)
        return
    AsyncLLM.generate = generate_within_budget


def _refuse_budgets(input_processor) -> None:
    process_inputs = input_processor.process_inputs

    @wraps(process_inputs)
    def process_inputs_without_budget(self, request_id, prompt, params, *args, **kwargs):
        asked = OPTION in (getattr(params, "extra_args", None) or {})
        if asked and self.model_config.hf_config.model_type == MODEL_TYPE:
            raise ValueError(f"{OPTION} needs vLLM 0.9.1; this server runs a newer one. Leave it out.")
        return process_inputs(self, request_id, prompt, params, *args, **kwargs)

    input_processor.process_inputs = process_inputs_without_budget


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


async def _within_budget(engine, start, prompt, params, request_id: str, budget: int) -> AsyncGenerator[Any, None]:
    """One request as its client sees it, made of one or two of the engine's.

    Args:
        start: begins a request of the engine: (prompt, sampling parameters, request id) -> generator of outputs.
        prompt: vLLM's tokens prompt; pictures are not yet expanded in its token ids.

    Penalties on presence and frequency see the thought as part of the prompt in the second request.
    """
    tokenizer = await engine.get_tokenizer()
    marks = Marks.of(tokenizer)
    prompt_ids = list(prompt["prompt_token_ids"])
    before = marks.state(prompt_ids)
    # The token <think> itself is not one of the thought's. A thought that the template closed (enable_thinking: false)
    # leaves nothing to limit.
    limit = params.max_tokens if before == "closed" else min(budget + (before == "none"), params.max_tokens)
    ids: list[int] = []
    last: Any = None
    if limit:
        async with aclosing(start(prompt, _with_limit(params, limit), request_id)) as outputs:
            async for output in outputs:
                ids += output.outputs[0].token_ids
                last = output
                if not output.finished:
                    yield output
        # Fewer tokens than asked for and "length": the context is full.
        if last.outputs[0].finish_reason != "length" or len(ids) < limit or limit == params.max_tokens:
            yield last
            return

    # What was generated may mention <think> again; the first </think> ended the thought.
    state = "closed" if marks.end_think in ids else marks.state(prompt_ids + ids)
    forced = EARLY_STOP if state == "open" else ""
    forced_ids = tokenizer.encode(forced, add_special_tokens=False) if forced else []
    room = params.max_tokens - len(ids) - len(forced_ids)
    if last is not None:  # params.max_tokens was reckoned with the prompt before its pictures were expanded
        context = engine.model_config.max_model_len
        room = min(room, context - len(last.prompt_token_ids) - len(ids) - len(forced_ids))
    if room < 1 and last is not None:  # none for the sentence and an answer: an ordinary cut
        yield last
        return
    rest = _with_limit(params, max(1, room), used=len(ids) + len(forced_ids))
    if state == "none":  # no thought so far, and none may begin that nobody counts
        rest.logit_bias = {**(rest.logit_bias or {}), marks.think: -100.0}
    rest_prompt = {**prompt, "prompt_token_ids": [*prompt_ids, *ids, *forced_ids]}
    async with aclosing(start(rest_prompt, rest, f"{request_id}-answer")) as outputs:
        first = True
        async for output in outputs:
            output.request_id = request_id
            completion = output.outputs[0]
            if last is not None:  # usage counts the client's prompt, not the thought within this one
                output.prompt_token_ids, output.num_cached_tokens = last.prompt_token_ids, last.num_cached_tokens
            if first:  # what the client has not seen: the end of the thought and the sentence
                held = last.outputs[0] if last is not None else None
                completion.text = (held.text if held else "") + forced + completion.text
                completion.token_ids = [*(held.token_ids if held else ()), *forced_ids, *completion.token_ids]
                first = False
            yield output


def _with_limit(params, limit: int, used: int = 0):
    """`params` for a part of the answer: at most `limit` tokens, after `used` of them."""
    part = params.clone()
    part.max_tokens = limit
    part.min_tokens = min(max(0, params.min_tokens - used), limit)
    if used and params.seed is not None:
        part.seed = params.seed + 1  # not the same draws again
    return part
