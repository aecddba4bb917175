"""Messages with pictures, and the two places that answer them: a checkpoint in this process, or a server."""

import base64
import json
import mimetypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from qwen_merge.errors import UserError
from qwen_merge.video import processor_options

OPEN, CLOSE = "<think>", "</think>"
MERGE, GRAFT = "qwen2_5_vl_merge", "qwen_merge_graft"


@dataclass(frozen=True)
class Settings:
    """How to answer. Temperature 0 is greedy; the defaults of the command are Qwen3's for thinking."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    thinking: bool
    thinking_budget: int | None = None


def opening(system: str | None) -> list[dict]:
    return [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []


def question(text: str, images: Sequence[Path] = (), videos: Sequence[Path] = ()) -> dict:
    """A user's turn, pictures first, as the training data has them."""
    return {
        "role": "user",
        "content": [
            *({"type": "image", "image": str(path)} for path in images),
            *({"type": "video", "video": str(path)} for path in videos),
            {"type": "text", "text": text},
        ],
    }


class ThoughtSplitter:
    """Tells a thought from an answer in a text that comes in pieces and may begin with <think>.

    A tag may be cut anywhere: what could still become one is held back until the next piece.
    """

    def __init__(self) -> None:
        self.kind = "start"
        self.held = ""

    def feed(self, text: str) -> list[tuple[str, str]]:
        """The ("thought" | "answer", text) pieces that are certain now."""
        pieces = []
        self.held += text
        if self.kind == "start":
            stripped = self.held.lstrip()
            if len(stripped) < len(OPEN) and OPEN.startswith(stripped):
                return []
            self.kind = "thought" if stripped.startswith(OPEN) else "answer"
            self.held = stripped.removeprefix(OPEN)
        if self.kind == "thought":
            thought, closed, rest = self.held.partition(CLOSE)
            if closed:
                self.kind, self.held = "answer", rest
            else:
                keep = next((n for n in range(len(CLOSE) - 1, 0, -1) if thought.endswith(CLOSE[:n])), 0)
                thought, self.held = thought[: len(thought) - keep], thought[len(thought) - keep :]
            pieces.append(("thought", thought))
        if self.kind == "answer":
            pieces.append(("answer", self.held))
            self.held = ""
        return [(kind, piece) for kind, piece in pieces if piece]

    def flush(self) -> list[tuple[str, str]]:
        """What was held back, when no more comes."""
        return [("thought" if self.kind == "thought" else "answer", self.held)] if self.held else []


class InProcess:
    """A checkpoint, loaded with transformers; on a GPU when there is one."""

    def __init__(self, folder: Path, settings: Settings):
        config = folder / "config.json"
        if not config.is_file() and (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} is an adapter (adapter_config.json), not a checkpoint: it changes a base elsewhere.\n"
                "Merge it into its base: llamafactory-cli export --finetuning_type lora --trust_remote_code true "
                f"--template qwen_merge_vl --model_name_or_path BASE --adapter_name_or_path {folder} "
                "--export_dir MERGED, and give MERGED.\n"
                f"Or for a server: qwen-merge split-adapter {folder} --base BASE --output DIR; then --endpoint."
            )
        if not config.is_file():
            raise UserError(f"{folder} is not a checkpoint: it has no config.json.\nGive the output folder of a stage.")
        content = json.loads(config.read_text(encoding="utf-8"))
        model_type = content.get("model_type")
        if model_type not in (MERGE, GRAFT):
            raise UserError(f"{folder} is a {model_type} checkpoint; expected model_type {MERGE} or {GRAFT}.")
        self.is_graft = model_type == GRAFT
        if self.is_graft and (content.get("vision_config") or {}).get("model_type") == "custom":
            raise UserError(
                f"the encoder of {folder} is code of its user's own, which is not run here. Load it with transformers: "
                "AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)."
            )
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        from qwen_merge.architecture import register

        register()
        logging.set_verbosity_error()
        self.settings = settings
        self.cut_off = False  # the last answer, by max_tokens
        self.processor = AutoProcessor.from_pretrained(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForImageTextToText.from_pretrained(folder, torch_dtype="auto").to(device).eval()

    def inputs(self, messages: list[dict]):
        """What the model sees: the rendered conversation, its pictures and videos, and how fast the videos run."""
        from qwen_vl_utils import process_vision_info

        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.settings.thinking
        )
        if self.is_graft:
            try:
                return self.processor(text=[text], images=_pictures(messages) or None, return_tensors="pt")
            except ValueError as error:  # a picture that is too long, a placeholder in the text
                raise UserError(f"this graft takes no such question: {error}") from None
        images, videos, options = process_vision_info(messages, return_video_kwargs=True)
        rates = {"fps": options["fps"]} if videos else {}
        return self.processor(text=[text], images=images, videos=videos, return_tensors="pt", **rates)

    def answer(self, messages: list[dict]) -> Iterator[tuple[str, str]]:
        import torch
        from transformers import TextIteratorStreamer

        inputs = self.inputs(messages).to(self.model.device)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        greedy = self.settings.temperature == 0
        sampling = {
            "do_sample": not greedy,
            "temperature": None if greedy else self.settings.temperature,
            "top_p": None if greedy else self.settings.top_p,
            "top_k": None if greedy else self.settings.top_k,
        }
        config = self.model.config  # an answer holds no placeholder of a picture, as in vLLM
        torch.manual_seed(self.settings.seed)
        ends = self.model.generation_config.eos_token_id
        if ends is None:  # a checkpoint without generation_config.json: its tokenizer knows
            ends = self.processor.tokenizer.eos_token_id
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                tokens = self.model.generate(
                    **inputs,
                    **sampling,
                    eos_token_id=ends,
                    max_new_tokens=self.settings.max_tokens,
                    suppress_tokens=[config.image_token_id, config.video_token_id, config.vision_start_token_id],
                    streamer=streamer,
                )
                new = tokens.shape[1] - inputs["input_ids"].shape[1]
                ended = torch.isin(tokens[0, -1].cpu(), torch.tensor(ends)).item()
                self.cut_off = new >= self.settings.max_tokens and not ended
            except BaseException as error:  # handed over to the thread that waits for text
                failures.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        splitter = ThoughtSplitter()
        for piece in streamer:
            yield from splitter.feed(piece)
        yield from splitter.flush()
        thread.join()
        if failures:
            raise failures[0]


def _pictures(messages: list[dict]) -> list:
    """All pictures as they are: a graft's own processor gives them their sizes.

    Raises:
        UserError: a video.
    """
    from PIL import Image

    parts = [part for message in messages for part in message["content"]]
    if any(part["type"] == "video" for part in parts):
        raise UserError("a graft takes pictures and text, no videos. Leave --video out.")
    return [Image.open(part["image"]).convert("RGB") for part in parts if part["type"] == "image"]


class Endpoint:
    """An OpenAI-compatible server. Thoughts come in `reasoning_content`, or in the text when it splits nothing."""

    def __init__(self, url: str, model: str | None, settings: Settings):
        import openai

        from qwen_merge.data.teacher.endpoints import base_url

        try:
            url = base_url(url)
        except ValueError as error:
            raise UserError(f"{url!r} is no address such as http://localhost:8000/v1: {error}.") from None
        self.settings = settings
        self.cut_off = False  # the last answer, by max_tokens
        # A local server asks for no key; the real one comes from OPENAI_API_KEY as usual.
        self.client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=1)
        try:
            self.model = model or self.client.models.list().data[0].id
        except (openai.OpenAIError, IndexError) as error:
            raise UserError(
                f"no model found at {url}: {error}\nStart a server with ./scripts/serve.sh MODEL_DIR; --endpoint is "
                "its address with /v1 at the end."
            ) from error

    def answer(self, messages: list[dict]) -> Iterator[tuple[str, str]]:
        import httpx
        import openai

        template: dict[str, bool | int] = {"enable_thinking": self.settings.thinking}
        if self.settings.thinking_budget is not None:
            template["thinking_budget"] = self.settings.thinking_budget
        body: dict[str, Any] = {"top_k": self.settings.top_k, "chat_template_kwargs": template}
        if options := processor_options(_videos(messages)):
            body["mm_processor_kwargs"] = options
        try:
            stream = self.client.chat.completions.create(
                model=self.model,
                messages=[_as_data_urls(message) for message in messages],
                stream=True,
                max_tokens=self.settings.max_tokens,
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                seed=self.settings.seed,
                extra_body=body,
            )
            splitter = ThoughtSplitter()
            for chunk in stream:
                delta = chunk.choices[0].delta if chunk.choices else None
                if chunk.choices and chunk.choices[0].finish_reason:
                    self.cut_off = chunk.choices[0].finish_reason == "length"
                if thought := getattr(delta, "reasoning_content", None):
                    yield "thought", thought
                yield from splitter.feed(getattr(delta, "content", None) or "")
            yield from splitter.flush()
        except openai.OpenAIError as error:
            raise UserError(f"the server refused the request: {error}") from error
        except httpx.HTTPError as error:
            raise UserError(f"the server broke off in the middle of the answer: {error}") from error


def _videos(messages: list[dict]) -> list[str]:
    return [part["video"] for message in messages for part in message["content"] if part["type"] == "video"]


def _as_data_urls(message: dict) -> dict:
    content = []
    for part in message["content"]:
        if part["type"] == "text":
            content.append(part)
            continue
        path = Path(part[part["type"]])
        kind = mimetypes.guess_type(path.name)[0] or f"{part['type']}/*"
        url = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        content.append({"type": f"{part['type']}_url", f"{part['type']}_url": {"url": url}})
    return {"role": message["role"], "content": content}
