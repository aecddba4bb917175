"""A served Qwen-Merge model behind VLMEvalKit's entries: any OpenAI-compatible endpoint, as `vllm serve DIR` gives.

A server answers many questions at once and may run on another machine; the questions, the pixel limits, the seeds and
the cutting of thoughts are those of a model in this process.

    python -m vlmeval.run --data MMStar --model Qwen-Merge-VL-4B --endpoint http://localhost:8000/v1 --nproc 16 --reuse
"""

import base64
import mimetypes
import os
import re
import time
from pathlib import Path
from typing import Any

from vlmeval.api.base import BaseAPI
from vlmeval.vlm.qwen2_vl.prompt import Qwen2VLPromptMixin

from qwen_merge.errors import UserError
from qwen_merge.evaluation import thoughts
from qwen_merge.evaluation.backends import MAX_LENGTH
from qwen_merge.evaluation.models import Answering, limit_pictures, merged, refuse_pixels
from qwen_merge.evaluation.records import GRAFT, Question, Records, Settings, document, model_type_of
from qwen_merge.video import SERVER_FRAMES, processor_options

OCRBENCH_MIN_PIXELS = 10 * 10 * 28 * 28  # VLMEvalKit's own exception: its pictures are single words


class QwenMergeAPI(Answering, Qwen2VLPromptMixin, BaseAPI):
    """A served Qwen-Merge model behind an OpenAI-compatible endpoint: the same questions, pictures, seeds and cutting.

    Pictures travel as the bytes on the disk; the server resizes them under the same pixel limits (vLLM's
    `mm_processor_kwargs`). A graft's own processor gives them its sizes; `model_path` says that the server has one.

    Args:
        endpoint: the base URL, with or without `/v1`.
        model: the served model's name; None asks the server, which must then serve exactly one.
        retry: attempts when the server cannot be reached or fails by itself.

    Raises:
        UserError: nothing usable answers there.
    """

    is_api = True

    def __init__(
        self,
        endpoint: str,
        *,
        records: Records,
        settings: Settings | None = None,
        model: str | None = None,
        model_path: str | None = None,
        judge: str | None = None,
        retry: int = 5,
        wait: int = 3,
        timeout: float = 3600,
        verbose: bool = False,
        **overrides: Any,
    ):
        self.settings = merged(settings, overrides)
        super().__init__(
            use_custom_prompt=self.settings.use_custom_prompt,
            retry=retry,
            wait=wait,
            verbose=verbose,
        )
        self.url = endpoint.rstrip("/").removesuffix("/v1") + "/v1"
        self.timeout = timeout
        self.model, card = self._ask_for_model(model)
        self.limit = card.get("max_model_len") or MAX_LENGTH
        self.records = records
        local = model_path if model_path and os.path.isdir(model_path) else None
        model_type = model_type_of(local) if local else None
        self.is_graft = model_type == GRAFT
        refuse_pixels(self.is_graft, overrides)
        self.document = document(
            records.model,
            local or self.model,
            model_type,
            "endpoint",
            self.settings,
            judge,
        )
        # All that can be known of the weights behind the server: its name for them, and where it has them from.
        self.document["checkpoint"] |= {"served as": self.model, "root": card.get("root")}

    @property
    def headers(self) -> dict[str, str]:
        key = os.environ.get("QWEN_MERGE_API_KEY")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _ask_for_model(self, wanted: str | None) -> tuple[str, dict[str, Any]]:
        import requests

        try:
            answer = requests.get(f"{self.url}/models", headers=self.headers, timeout=30)
            answer.raise_for_status()
            served = {card["id"]: card for card in answer.json()["data"]}
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"no OpenAI-compatible server answers at {self.url} ({error}).\n"
                "Start one (`vllm serve DIR`) or correct --endpoint; a key goes into QWEN_MERGE_API_KEY."
            ) from error
        name = wanted or (next(iter(served)) if len(served) == 1 else "")
        if name not in served:
            raise UserError(
                f"{self.url} serves {', '.join(served) or 'nothing'}; expected {wanted or 'one model only'}.\n"
                "Start the server with one --served-model-name."
            )
        return name, served[name]

    def content(self, message: list[dict[str, str]]) -> list[dict[str, Any]]:
        """The message in the API's form."""
        parts: list[dict[str, Any]] = []
        for part in message:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["value"]})
                continue
            kind = f"{part['type']}_url"
            mime = mimetypes.guess_type(part["value"])[0] or f"{part['type']}/*"
            data = base64.b64encode(Path(part["value"]).read_bytes()).decode()
            parts.append({"type": kind, kind: {"url": f"data:{mime};base64,{data}"}})
        return parts

    def sizes(self, message: list[dict[str, str]], dataset: str | None) -> dict[str, Any]:
        """How large pictures are, and how fast videos run."""
        return {
            "min_pixels": OCRBENCH_MIN_PIXELS if dataset == "OCRBench" else self.settings.min_pixels,
            "max_pixels": self.settings.max_pixels,
            **processor_options(videos_of(message)),
        }

    def request(self, message: list[dict[str, str]], dataset: str | None, key: str) -> dict[str, Any]:
        """The body of one question."""
        s = self.settings
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": self.content(message)}],
            "max_tokens": min(s.max_new_tokens, self.limit - 1),
            "temperature": s.temperature,
            **({"top_p": s.top_p, "top_k": s.top_k} if s.temperature > 0 else {"top_p": 1.0, "top_k": -1}),
            "repetition_penalty": 1.0,
            "seed": s.seed_of(key),
            "chat_template_kwargs": {"enable_thinking": s.thinking},
            **({} if self.is_graft else {"mm_processor_kwargs": self.sizes(message, dataset)}),
        }

    def generate(self, message, dataset: str | None = None, **_) -> str:
        """One answer. Not BaseAPI's, which asks again whenever an answer is empty, as those of unfinished thoughts are.

        Returns:
            The answer; VLMEvalKit's failure message when the server does not answer, which `--reuse` asks again.
        """
        if self.check_content(message) == "listdict":
            message = self.preprocess_message_with_role(message)
        message = limit_pictures(self.preproc_content(message))
        context: dict[str, Any] = {"system": self.system_prompt} if self.system_prompt else {}
        if videos := videos_of(message):  # the server keeps so many frames of each, and is told how fast they run
            context |= {"frames": SERVER_FRAMES, **processor_options(videos)}
        question = Question.of(message, **context)
        name = self.begin(dataset)
        known = self.records.find(name, question.key)
        if known is not None:
            return known
        reply = self._post(self.request(message, dataset, question.key))
        if reply is None:
            return self.fail_msg
        raw, split, tokens = read_reply(reply)
        return self.keep(name, question, raw, split, tokens=tokens, thought_tokens=None)

    def generate_inner(self, inputs, **kwargs):
        """BaseAPI's inner interface, for whoever calls it directly."""
        answer = self.generate(inputs, **kwargs)
        return (-1 if answer == self.fail_msg else 0), answer, ""

    def _post(self, body: dict[str, Any]) -> dict[str, Any] | None:
        import requests

        for attempt in range(self.retry):
            if attempt:
                time.sleep(self.wait * attempt)
            try:
                answer = requests.post(
                    f"{self.url}/chat/completions", json=body, headers=self.headers, timeout=self.timeout
                )
            except requests.RequestException as error:
                self.logger.warning(f"attempt {attempt + 1} of {self.retry}: {error}")
                continue
            if answer.ok:
                return answer.json()
            self.logger.warning(f"attempt {attempt + 1} of {self.retry}: {answer.status_code} {answer.text[:500]}")
            shorter = room_left(answer.text, self.limit, body["max_tokens"])
            if shorter:
                body = {**body, "max_tokens": shorter}
            elif answer.status_code < 500 and answer.status_code != 429:
                return None  # a refusal: the same request gives the same
        return None


def videos_of(message: list[dict[str, str]]) -> list[str]:
    return [part["value"] for part in message if part["type"] == "video"]


def room_left(message: str, limit: int, asked: int) -> int | None:
    """How long an answer may be, from vLLM's refusal of prompt and answer together; None if it says something else."""
    match = re.search(r"\((\d+) in the messages", message)
    room = limit - int(match[1]) if match else 0
    return room if 0 < room < asked else None


def read_reply(reply: dict[str, Any]) -> tuple[str, thoughts.Split, int | None]:
    """(full text, thought and answer, generated tokens) of a chat completion.

    A server with a reasoning parser sends the thought apart; without content it was cut off while thinking.
    """
    message = reply["choices"][0]["message"]
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    thought, content = message.get("reasoning_content"), message.get("content") or ""
    if thought is None:
        return content, thoughts.split(content), tokens
    if not content.strip():
        return f"{thoughts.OPEN}{thought}", thoughts.Split(thought.strip(), "", False), tokens
    raw = f"{thoughts.OPEN}{thought}{thoughts.CLOSE}{content}"
    return raw, thoughts.Split(thought.strip(), content.strip(), True), tokens
