"""Batches for the two lessons that come before the graft: text for the tiny LLM, captioned pictures for the tiny VLM.

Token ids and labels are made here by hand, in the forms that LLaMA-Factory's templates give later: ChatML with
thoughts, and the bare `<|im_start|>` + content + answer of `qwen_merge_vl_pt`.
"""

from collections.abc import Iterator

import torch

from qwen_merge.demo.language import CAPTION_REQUESTS, NO_THINKING, TOPICS, as_examined, caption, exchange, note
from qwen_merge.demo.world import KINDS, SHOWN_MOST, SIDE, Stream

IGNORED = -100  # the label on which no loss is taken
PATCH, MERGE, TEMPORAL = 14, 2, 2
GRID = SIDE // PATCH
PICTURE_TOKENS = (GRID // MERGE) ** 2
EXAMINED = (0.2, 0.1)  # how often with options, how often with a request to be short
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def padded(samples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """(prompt, answer) pairs of token ids to right-padded input_ids, attention_mask and labels, (batch, tokens)."""
    width = max(len(prompt) + len(answer) for prompt, answer in samples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in samples:
        rest = width - len(prompt) - len(answer)
        rows["input_ids"].append(prompt + answer + [pad] * rest)
        rows["attention_mask"].append([1] * (width - rest) + [0] * rest)
        rows["labels"].append([IGNORED] * len(prompt) + answer + [IGNORED] * rest)
    return {name: torch.tensor(values) for name, values in rows.items()}


def text_sample(stream: Stream, tokenizer) -> tuple[list[int], list[int]]:
    """One question about a scene told in a note, as token ids: ChatML (thinking or not) or without any roles."""
    pick = stream.random
    scene = stream.scene(pick.choice(KINDS))
    spoken = as_examined(exchange(scene, pick.choice(TOPICS[scene.kind]), pick), pick, *EXAMINED)
    question, reply, form = spoken.question, spoken.answer, pick.random()
    if form < 0.25:
        question, reply = pick.choice(CAPTION_REQUESTS), caption(scene)
    content = f"{note(scene, pick)}\n{question}"
    if form < 0.5:
        prompt = f"<|im_start|>{content}"
    else:
        if form < 0.7:
            content, reply = content + NO_THINKING, f"<think>\n\n</think>\n\n{reply}"
        else:
            reply = spoken.thinking_answer
        prompt = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(prompt), tokenizer.encode(f"{reply}<|im_end|>\n")


def text_batches(stream: Stream, tokenizer, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end; samples of similar length come together, which saves a third of the work as padding."""
    while True:
        samples = sorted((text_sample(stream, tokenizer) for _ in range(8 * size)), key=lambda s: len(s[0] + s[1]))
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        stream.random.shuffle(batches)
        for batch in batches:
            yield padded(batch, tokenizer.pad_token_id)


def picture_batches(stream: Stream, tokenizer, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Pictures and their captions without end, in the forms that Qwen2_5_VLForConditionalGeneration takes."""
    prompt = tokenizer.encode("<|vision_start|>" + "<|image_pad|>" * PICTURE_TOKENS + "<|vision_end|>")
    while True:
        samples, pictures = [], []
        for _ in range(size):
            scene = stream.scene(stream.random.choice(KINDS + SHOWN_MOST))
            pictures.append(stream.drawing(scene))
            samples.append((prompt, tokenizer.encode(f"{caption(scene)}<|im_end|>")))
        batch = padded(samples, tokenizer.pad_token_id)
        yield {**batch, "pixel_values": patches(pictures), "image_grid_thw": torch.tensor([[1, GRID, GRID]] * size)}


def patches(pictures: list) -> torch.Tensor:
    """Pictures of 84 x 84 as Qwen2.5-VL's flat patches, (pictures * 36, 3 * 2 * 14 * 14).

    The same values as Qwen2VLImageProcessor's (a test compares them), for a whole batch at once.
    """
    import numpy

    pixels = torch.from_numpy(numpy.stack([numpy.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]
    count, blocks = len(pictures), GRID // MERGE
    # (picture, channel, block row, row in block, y, block column, column in block, x)
    pixels = pixels.reshape(count, 3, blocks, MERGE, PATCH, blocks, MERGE, PATCH)
    pixels = pixels.permute(0, 2, 5, 3, 6, 1, 4, 7)  # patches in 2 x 2 blocks, each (channel, y, x)
    pixels = pixels.reshape(count * GRID**2, 3, 1, PATCH, PATCH).expand(-1, -1, TEMPORAL, -1, -1)
    return pixels.reshape(count * GRID**2, -1)
