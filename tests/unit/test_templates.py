"""The two LLaMA-Factory templates, down to the token ids, and which of them carry loss."""

import pytest
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.data.template import TEMPLATES
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.hparams import DataArguments
from PIL import Image
from transformers import AutoProcessor

from checkpoints import TOKEN_IDS

IM_START, IM_END = TOKEN_IDS["<|im_start|>"], TOKEN_IDS["<|im_end|>"]
PICTURE = [TOKEN_IDS["<|vision_start|>"], *[TOKEN_IDS["<|image_pad|>"]] * 6, TOKEN_IDS["<|vision_end|>"]]


@pytest.fixture
def processor(tied):
    processor = AutoProcessor.from_pretrained(tied.merged)
    processor.image_max_pixels, processor.image_min_pixels = 262144, 1024  # LLaMA-Factory sets these as it loads
    return processor


def encode(name: str, processor, *turns: str, images=()) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of alternating user and assistant turns, by LLaMA-Factory's own supervised processor."""
    template = TEMPLATES[name]
    template.enable_thinking = True  # the recipes' setting; LLaMA-Factory sets it from the data arguments
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(turns)]
    encoder = SupervisedDatasetProcessor(
        template=template, tokenizer=processor.tokenizer, processor=processor, data_args=DataArguments(cutoff_len=8096)
    )
    return encoder._encode_data_example(messages[:-1], messages[-1:], "", "", list(images), [], [])


def trained(input_ids: list[int], labels: list[int]) -> list[int]:
    return [token for token, label in zip(input_ids, labels, strict=True) if label != IGNORE_INDEX]


def ids(processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False)


def test_captions_have_no_roles_and_no_separator_before_the_answer(processor):
    picture = Image.new("RGB", (84, 56))
    input_ids, labels = encode("qwen_merge_vl_pt", processor, "<image>\nDescribe it.", "A red one.", images=[picture])
    answer = [*ids(processor, "A red one."), IM_END, *ids(processor, "\n")]
    assert input_ids == [IM_START, *PICTURE, *ids(processor, "\nDescribe it."), *answer]
    assert trained(input_ids, labels) == answer


def test_instructions_are_qwen3s_chatml_and_equal_the_chat_template(processor):
    picture = Image.new("RGB", (84, 56))
    answer = "<think>\nIt is red.\n</think>\n\nRed."
    input_ids, labels = encode("qwen_merge_vl", processor, "<image>What colour?", answer, images=[picture])
    prompt = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What colour?"}]}
    ]
    sent = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    prompt_ids = sent["input_ids"][0]
    assert input_ids[: len(prompt_ids)] == list(prompt_ids)
    assert trained(input_ids, labels) == [*ids(processor, answer), IM_END, *ids(processor, "\n")]
    assert prompt_ids[:2] == [IM_START, *ids(processor, "user")][:2]
    assert [token for token in input_ids if token in PICTURE] == PICTURE


def test_an_answer_without_thoughts_trains_the_empty_block(processor):
    """The switch /no_think asks the model itself to write the empty block, so there must be loss on it."""
    input_ids, labels = encode("qwen_merge_vl", processor, "What colour? /no_think", "Red.")
    block = ids(processor, "<think>\n\n</think>\n\n")
    assert trained(input_ids, labels) == [*block, *ids(processor, "Red."), IM_END, *ids(processor, "\n")]
    assert block[0] == TOKEN_IDS["<think>"]
    captions, _ = encode("qwen_merge_vl_pt", processor, "What colour?", "Red.")  # control: captions have no thoughts
    assert TOKEN_IDS["<think>"] not in captions
