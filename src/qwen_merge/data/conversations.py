"""What becomes of a source row's text: a conversation in the record format, or a named reason why not.

    qwen-merge data convert puts each row through one of these rules

ReCap and OneVision share theirs. Kept word for word is what people wrote; only `<image>` is added where it is missing.
Beyond the published rules, a row whose text spells out a special token of the model (`<|im_end|>`, `<|image_pad|>`, …)
is dropped: the tokenizer would take it for the real one, and a stray picture token stops the training.
"""

import json
import re

from qwen_merge.data.schema import ASSISTANT, IMAGE_TAG, USER

ROLES = {"human": USER, "gpt": ASSISTANT}
VIDEO_TAG = "<video>"
MEDIA_TAGS = (VIDEO_TAG, "<audio>")  # LLaMA-Factory's other placeholders
THINK_TAGS = ("<think>", "</think>")
SPECIAL_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|object_ref_start|object_ref_end|box_start|box_end|quad_start|quad_end"
    r"|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
)


class Dropped(Exception):
    """`reason`: a fixed text, to count by; `example`: what was seen in this row."""

    def __init__(self, reason: str, example: str) -> None:
        super().__init__(f"{reason}: {example}")
        self.reason = reason
        self.example = example


def conversation(turns: object) -> list[dict[str, str]]:
    """`conversations` of ReCap and OneVision as messages with exactly one `<image>`.

    Args:
        turns: [{"from": "human" or "gpt", "value": text}, ...] in a row that can be trained on.

    Raises:
        Dropped: any of the reasons below.
    """
    messages = alternating(turns)
    text = "\n".join(message["content"] for message in messages)
    check_text(text)
    tags = text.count(IMAGE_TAG)
    if tags > 1:
        raise Dropped("more than one <image>", text)
    if any(IMAGE_TAG in message["content"] for message in messages if message["role"] == ASSISTANT):
        raise Dropped("<image> in an answer", text)
    for tag in THINK_TAGS:
        if tag in text:
            raise Dropped("think tag", text)
    if not tags:
        messages[0]["content"] = with_image_tag(messages[0]["content"])
    for message in messages:  # after the tag: a picture alone is a question
        if not message["content"].strip():
            raise Dropped("an empty turn", text)
    return messages


def alternating(turns: object) -> list[dict[str, str]]:
    """Turns of human and gpt as messages, their texts as they are.

    Raises:
        Dropped: there are none, or they are no texts, or not in turns.
    """
    if not isinstance(turns, list) or not turns:
        raise Dropped("no conversation", repr(turns))
    messages = []
    for turn in turns:
        role = turn.get("from") if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str) or not isinstance(role, str):
            raise Dropped("a turn is not text", repr(turn))
        if role not in ROLES:
            raise Dropped("a turn is of neither human nor gpt", repr(role))
        messages.append({"role": ROLES[role], "content": text})
    roles = [message["role"] for message in messages]
    if len(roles) % 2 or roles != [USER, ASSISTANT] * (len(roles) // 2):
        raise Dropped("turns do not alternate human, gpt", " ".join(turn["from"] for turn in turns))
    return messages


def page(ground_truth: object, instruction: str) -> list[dict[str, str]]:
    """SynthDoG's `ground_truth`, a JSON string with gt_parse.text_sequence, as an instruction and the page's text.

    Raises:
        Dropped: it is not such JSON (nothing in it is ever evaluated), its text is empty, or holds tags.
    """
    try:
        text = json.loads(ground_truth)["gt_parse"]["text_sequence"]  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Dropped("ground_truth is not JSON with gt_parse.text_sequence", repr(ground_truth)) from None
    if not isinstance(text, str):
        raise Dropped("ground_truth is not JSON with gt_parse.text_sequence", repr(text))
    if not text.strip():
        raise Dropped("empty text", repr(ground_truth))
    check_text(text)
    for tag in (IMAGE_TAG, *THINK_TAGS):
        if tag in text:
            raise Dropped("<image> in an answer" if tag == IMAGE_TAG else "think tag", text)
    return [
        {"role": USER, "content": with_image_tag(instruction)},
        {"role": ASSISTANT, "content": text},
    ]


def with_image_tag(text: str) -> str:
    return f"{IMAGE_TAG}\n{text}" if text else IMAGE_TAG


def check_text(text: str, tags: tuple[str, ...] = MEDIA_TAGS) -> None:
    """What no text may hold.

    Raises:
        Dropped: one of `tags`, a special token, half a character.
    """
    for tag in tags:
        if tag in text:
            raise Dropped("video or audio tag", text)
    if match := SPECIAL_TOKEN.search(text):
        raise Dropped("special token of the model in the text", match.group())
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Dropped("text is not Unicode", ascii(text[error.start : error.start + 40])) from None
