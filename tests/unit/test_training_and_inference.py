"""What LLaMA-Factory trains on is what the checkpoint's chat template sends, token by token.

For every pattern the sequence that training builds must be the one that inference would: the prompt of the last answer,
and the answer behind it.
"""

import json
from pathlib import Path

import pytest
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.data.template import TEMPLATES
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.hparams import DataArguments
from PIL import Image
from transformers import AutoProcessor

from qwen_merge.data.own_rows import OwnRow, by_answer

THOUGHT = "<think>\nIt is round and red.\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"
TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Counts shapes.",
        "parameters": {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]},
    },
}
CALL = {"name": "count", "arguments": {"colour": "red"}}


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# Messages as LLaMA-Factory has them; the last one is the answer. Tools beside them.
PATTERNS: dict[str, tuple[list[dict], list[dict] | None]] = {
    "one question": (turns("What is it?", f"{THOUGHT}A circle."), None),
    "picture first": (turns("<image>\nWhat is it?", f"{THOUGHT}A circle."), None),
    "picture in the middle": (turns("Look at <image> and say what it is.", f"{THOUGHT}A circle."), None),
    "two pictures": (turns("<image> or <image>: which is larger?", f"{THOUGHT}The first."), None),
    "system": ([{"role": "system", "content": "Be brief."}, *turns("<image>What is it?", f"{THOUGHT}A circle.")], None),
    "several turns": (turns("<image>What is it?", "A circle.", "Its colour?", f"{THOUGHT}Red."), None),
    "several turns with thoughts": (
        turns("<image>What is it?", f"{THOUGHT}A circle.", "Its colour?", f"{THOUGHT}Red.", "Sure?", f"{THOUGHT}Yes."),
        None,
    ),
    "a picture in a later turn": (turns("Hello.", "Hello!", "<image>What is it?", f"{THOUGHT}A circle."), None),
    "system and several turns": (
        [{"role": "system", "content": "Be brief."}, *turns("What?", f"{THOUGHT}This.", "Why?", f"{THOUGHT}So.")],
        None,
    ),
    "tools": (
        [
            {"role": "user", "content": "<image>How many red ones?"},
            {"role": "function", "content": json.dumps(CALL)},
            {"role": "observation", "content": "3"},
            {"role": "assistant", "content": f"{THOUGHT}Three."},
        ],
        [TOOL],
    ),
    "tools and system": (
        [
            {"role": "system", "content": "Count well."},
            *turns("Hello.", f"{THOUGHT}Hello!", "How many red ones?", f"{THOUGHT}I cannot see any."),
        ],
        [TOOL],
    ),
}


@pytest.fixture(scope="module")
def processor(tied):
    processor = AutoProcessor.from_pretrained(tied.merged)
    processor.image_max_pixels, processor.image_min_pixels = 262144, 1024  # LLaMA-Factory sets these as it loads
    return processor


def pictures_of(messages: list[dict]) -> list[Image.Image]:
    return [Image.new("RGB", (84, 56))] * sum(message["content"].count("<image>") for message in messages)


def trained(
    processor, messages: list[dict], tools: list[dict] | None, thinking: bool = True, mask_history: bool = True
):
    """(input_ids, labels) of LLaMA-Factory's supervised processor, with the settings of stage 3."""
    template = TEMPLATES["qwen_merge_vl"]
    template.enable_thinking = thinking
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    messages = [message for message in messages if message["role"] != "system"]
    encoder = SupervisedDatasetProcessor(
        template=template,
        tokenizer=processor.tokenizer,
        processor=processor,
        data_args=DataArguments(cutoff_len=8096, mask_history=mask_history),
    )
    tools_text = json.dumps([tool["function"] for tool in tools]) if tools else ""
    try:
        return encoder._encode_data_example(
            messages[:-1], messages[-1:], system, tools_text, pictures_of(messages), [], []
        )
    finally:
        template.enable_thinking = True


def as_chat(message: dict) -> dict:
    """A message of LLaMA-Factory's as an OpenAI client would send it."""
    if message["role"] == "function":
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    if message["role"] == "observation":
        return {"role": "tool", "content": message["content"]}
    if "<image>" not in message["content"]:
        return message
    parts: list[dict] = []
    for i, text in enumerate(message["content"].split("<image>")):
        parts += [{"type": "image"}] * (i > 0) + ([{"type": "text", "text": text}] if text else [])
    return {"role": message["role"], "content": parts}


def sent(processor, messages: list[dict], tools: list[dict] | None, **switches) -> list[int]:
    """Ids of the prompt that asks for the last message."""
    chat = [as_chat(message) for message in messages[:-1]]
    text = processor.apply_chat_template(chat, tools=tools, add_generation_prompt=True, **switches)
    return processor(text=[text], images=pictures_of(messages) or None)["input_ids"][0]


def answer_ids(processor, answer: str) -> list[int]:
    return processor.tokenizer.encode(f"{answer}<|im_end|>\n", add_special_tokens=False)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_thinking(processor, pattern):
    messages, tools = PATTERNS[pattern]
    input_ids, labels = trained(processor, messages, tools)
    prompt, answer = sent(processor, messages, tools), answer_ids(processor, messages[-1]["content"])
    assert input_ids == [*prompt, *answer]
    assert labels == [IGNORE_INDEX] * len(prompt) + answer  # loss on the last answer, and on nothing else


@pytest.mark.parametrize("pattern", PATTERNS)
def test_thinking_switched_off(processor, pattern):
    """`enable_thinking: false` in a recipe, and in a request."""
    messages, tools = PATTERNS[pattern]
    plain = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"].removeprefix(THOUGHT)}]
    prompt = sent(processor, plain, tools, enable_thinking=False)
    for given in (messages, plain):  # a thought that is there is taken out
        input_ids, labels = trained(processor, given, tools, thinking=False)
        answer = answer_ids(processor, plain[-1]["content"])
        assert input_ids == [*prompt, *answer]
        assert labels == [IGNORE_INDEX] * len(prompt) + answer


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_think_in_the_question(processor, pattern):
    """The model itself writes the empty thought, so training has loss on it."""
    messages, tools = PATTERNS[pattern]
    plain = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"].removeprefix(THOUGHT)}]
    input_ids, labels = trained(processor, plain, tools)
    prompt, answer = sent(processor, plain, tools), answer_ids(processor, EMPTY + plain[-1]["content"])
    assert input_ids == [*prompt, *answer]
    assert labels == [IGNORE_INDEX] * len(prompt) + answer


THREE = turns("<image>What is it?", "A circle.", "Its colour?", "Red.", "<image>And this?", "A square.")


def test_each_of_three_answers_is_trained_on_what_inference_sends_before_it(processor):
    """`qwen-merge data import --turns each`, and `enable_thinking: false` in the recipe."""
    rows = [part.messages for part in by_answer(OwnRow(THREE, [("<image>", Path("a")), ("<image>", Path("b"))]))]
    assert [row[-1]["content"] for row in rows] == ["A circle.", "Red.", "A square."]
    for row in rows:
        input_ids, labels = trained(processor, row, None, thinking=False)
        prompt = sent(processor, row, None, enable_thinking=False)
        answer = answer_ids(processor, row[-1]["content"])
        assert input_ids == [*prompt, *answer]
        assert labels == [IGNORE_INDEX] * len(prompt) + answer


def test_control_of_one_row_not_every_answer_can_be_trained_so(processor):
    """With loss on all answers the tokens before an earlier one are not those that ask for it; without, it has none."""
    for masked, loss in ((False, ["A circle.", "Red.", "A square."]), (True, ["A square."])):
        input_ids, labels = trained(processor, THREE, None, thinking=False, mask_history=masked)
        text = processor.tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
        assert text == "".join(f"{answer}<|im_end|>\n" for answer in loss)
        asked = sent(processor, THREE[:2], None, enable_thinking=False)
        assert input_ids[: len(asked)] != asked
        assert input_ids == [*sent(processor, THREE, None, enable_thinking=False), *answer_ids(processor, "A square.")]


def test_control_llama_factorys_own_reasoning_template_differs(processor):
    """It leaves the thoughts of earlier turns in the sequence, where inference never shows them."""
    from llamafactory.data.template import ReasoningTemplate

    messages, tools = PATTERNS["several turns with thoughts"]
    template = TEMPLATES["qwen_merge_vl"]
    ours = type(template)
    template.__class__ = ReasoningTemplate
    try:
        input_ids, _ = trained(processor, messages, tools)
    finally:
        template.__class__ = ours
    assert input_ids != [*sent(processor, messages, tools), *answer_ids(processor, messages[-1]["content"])]
    assert ours is not ReasoningTemplate


def test_a_golden_prompt(processor):
    messages, tools = PATTERNS["several turns with thoughts"]
    text = processor.tokenizer.decode(trained(processor, messages, tools)[0])
    picture = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    assert text == (
        f"<|im_start|>user\n{picture}What is it?<|im_end|>\n<|im_start|>assistant\nA circle.<|im_end|>\n"
        "<|im_start|>user\nIts colour?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nIt is round and red.\n</think>\n\nYes.<|im_end|>\n"
    )
