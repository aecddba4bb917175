"""Asks a checkpoint about held-out pictures, and asks again with the pictures shuffled among the questions.

    python -m qwen_merge.demo.evaluation CHECKPOINT OUTPUT.json pt|chat

`pt` is the form of stages 1 to 2.2 (`qwen_merge_vl_pt`), `chat` that of stage 3 (the checkpoint's own chat template,
thinking). Pictures go through the checkpoint's own processor. Decoding is greedy, so that a table can be repeated.
"""

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image

from qwen_merge.demo.answers import Question, accuracies, split_thought
from qwen_merge.demo.language import CAPTION_REQUESTS, CHANCE, caption, exchange
from qwen_merge.demo.lessons import IGNORED
from qwen_merge.demo.world import Scene, Stream
from qwen_merge.errors import UserError

ASKED = {"colour": 200, "shape": 200, "number": 200, "count": 100, "word": 100, "sum": 100}
KIND_OF_TOPIC = {"colour": "shape"}  # the other topics are named as their kind of scene
NEW_TOKENS = {"pt": 12, "chat": 48}
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
BATCH = 32  # the vision tower attends over the patches of all pictures at once: its cost is quadratic in this
EXAMPLES_OF_EACH_TOPIC = 4

assert set(ASKED) == set(CHANCE)


class Exam:
    """The held-out pictures, the questions about them and the true answers; the same for every checkpoint."""

    def __init__(self, seed: int = 0, asked: Mapping[str, int] = MappingProxyType(ASKED)):
        stream, self.topics = Stream("held-out exam", seed), tuple(asked)
        self.scenes: list[Scene] = []
        self.pictures: list[Image.Image] = []
        self.questions: list[Question] = []
        self.answers: list[tuple[str, str]] = []  # (bare, with the thought)
        for topic, count in asked.items():
            for _ in range(count):
                scene = stream.scene(KIND_OF_TOPIC.get(topic, topic))
                spoken = exchange(scene, topic, stream.random)
                self.questions.append(Question(topic, spoken.question, spoken.answer, len(self.pictures)))
                self.answers.append((spoken.answer, spoken.thinking_answer))
                self.scenes.append(scene)
                self.pictures.append(stream.drawing(scene))

    def shuffled(self, seed: int = 0) -> list[int]:
        """For each question a picture of another one of its topic: what can be guessed without looking stays."""
        order = list(range(len(self.questions)))
        for topic in self.topics:
            places = [i for i, question in enumerate(self.questions) if question.topic == topic]
            mixed = places[:]
            random.Random(f"shuffled/{topic}/{seed}").shuffle(mixed)
            for place, other in zip(places, mixed, strict=True):
                order[place] = self.questions[other].picture
        return order


class Examinee:
    """A checkpoint that can be asked in one of the two forms."""

    def __init__(self, checkpoint: Path, form: str):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from qwen_merge.architecture import register

        register()
        self.form = form
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, torch_dtype=torch.float32).eval()

    def prompt(self, question: str, form: str | None = None) -> str:
        """The text up to the answer, exactly as training shows it."""
        if (form or self.form) == "pt":
            picture = f"<|vision_start|>{self.processor.image_token}<|vision_end|>"
            return f"<|im_start|>{picture}\n{question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        return self.processor(text=list(prompts), images=list(pictures), padding=True, return_tensors="pt")

    @torch.inference_mode()
    def answers(self, questions: Sequence[str], pictures: Sequence[Image.Image]) -> list[str]:
        """Greedy answers, thoughts included."""
        texts: list[str] = []
        for part in parts(len(questions)):
            inputs = self.inputs([self.prompt(question) for question in questions[part]], pictures[part])
            written = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS[self.form], **GREEDY)
            written = written[:, inputs["input_ids"].shape[1] :]
            # Not `skip_special_tokens`: it would hide that a model writes picture tokens.
            for text in self.processor.tokenizer.batch_decode(written, skip_special_tokens=False):
                texts.append(text.split("<|im_end|>")[0].replace("<|endoftext|>", "").strip())
        return texts

    @torch.inference_mode()
    def loss(self, form: str, questions: list[str], pictures: list[Image.Image], replies: list[str]) -> float:
        """Mean loss over the tokens of the true replies, `<|im_end|>` included."""
        total, tokens = 0.0, 0
        for part in parts(len(questions)):
            prompts = [self.prompt(question, form) for question in questions[part]]
            full = [f"{prompt}{reply}<|im_end|>" for prompt, reply in zip(prompts, replies[part], strict=True)]
            inputs = self.inputs(full, pictures[part])
            # Left padding puts every reply at the end, whatever the number of picture tokens before it.
            encode = self.processor.tokenizer.encode
            lengths = torch.tensor([len(encode(f"{reply}<|im_end|>")) for reply in replies[part]])
            width = inputs["input_ids"].shape[1]
            is_reply = torch.arange(width)[None] >= width - lengths[:, None]
            labels = inputs["input_ids"].masked_fill(~is_reply, IGNORED)
            logits = self.model(**inputs).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            tokens += int(lengths.sum())
        return total / tokens


def parts(count: int) -> Iterator[slice]:
    return (slice(start, start + BATCH) for start in range(0, count, BATCH))


def evaluate(checkpoint: Path, form: str, seed: int = 0, asked: Mapping[str, int] = MappingProxyType(ASKED)) -> dict:
    """Losses, accuracy for each topic, the shuffled control, and a few questions with their answers.

    asked: how many questions on each topic.
    """
    exam, examinee = Exam(seed, asked), Examinee(checkpoint, form)
    texts = [question.text for question in exam.questions]
    replies = [answer[form == "chat"] for answer in exam.answers]
    answers = examinee.answers(texts, exam.pictures)
    control = examinee.answers(texts, [exam.pictures[i] for i in exam.shuffled(seed)])
    captions = [caption(scene) for scene in exam.scenes]
    requests = [CAPTION_REQUESTS[i % len(CAPTION_REQUESTS)] for i in range(len(captions))]
    examples, shown = [], dict.fromkeys(exam.topics, 0)
    for question, text in zip(exam.questions, answers, strict=True):
        if shown[question.topic] < EXAMPLES_OF_EACH_TOPIC:
            shown[question.topic] += 1
            thought, answer = split_thought(text)
            examples.append({"picture": question.picture, "thought": thought, "answer": answer, "text": text})
    return {
        "caption_loss": examinee.loss("pt", requests, exam.pictures, captions),
        "answer_loss": examinee.loss(form, texts, exam.pictures, replies),
        "accuracy": accuracies(exam.questions, answers),
        "control": accuracies(exam.questions, control),
        "examples": examples,
    }


def main(argv: list[str]) -> int:
    if len(argv) not in (3, 4) or argv[2] not in NEW_TOKENS:
        raise UserError("usage: python -m qwen_merge.demo.evaluation CHECKPOINT OUTPUT.json pt|chat [SEED]")
    began = time.monotonic()
    result = evaluate(Path(argv[0]), argv[2], int(argv[3]) if len(argv) == 4 else 0)
    result["seconds"] = round(time.monotonic() - began, 1)
    Path(argv[1]).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
