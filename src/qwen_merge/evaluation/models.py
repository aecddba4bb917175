"""The model behind VLMEvalKit's Qwen-Merge entries, in this process; `served` is its like behind an endpoint.

VLMEvalKit's own Qwen2-VL class insists on a GPU and on flash-attention, picks its classes by words in the model's path,
decodes greedily under vLLM whatever was asked, and cuts thoughts nowhere. What is kept of it is how questions are put
(`Qwen2VLPromptMixin`, `_prepare_content`), so that the published settings mean what they meant. Everything else is one
path for both back ends: the same prompt, pictures, seeds and cutting; only the call that generates tokens differs.

    python -m vlmeval.run --data MMStar --model Qwen-Merge-VL-4B --use-vllm --reuse --judge exact_matching
"""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

from vlmeval.vlm.qwen2_vl.model import Qwen2VLChat

from qwen_merge.errors import UserError
from qwen_merge.evaluation import thoughts
from qwen_merge.evaluation.backends import MAX_PICTURES, Prompt, PromptTooLong, Transformers, Vllm
from qwen_merge.evaluation.records import GRAFT, Question, Records, Settings, document, model_type_of
from qwen_merge.evaluation.vlmevalkit import leave


def merged(settings: Settings | None, overrides: dict[str, Any]) -> Settings:
    """The settings with single ones replaced, as a `--config` file does.

    Raises:
        UserError: a name that is no setting.
    """
    unknown = sorted(set(overrides) - set(Settings.__dataclass_fields__))
    if unknown:
        raise UserError(
            f"no settings of a Qwen-Merge model: {', '.join(unknown)}; there are: "
            f"{', '.join(Settings.__dataclass_fields__)}."
        )
    return dataclasses.replace(settings or Settings(), **overrides)


class Answering:
    """What the model in this process and the served one share: asking once, cutting thoughts, keeping the record."""

    settings: Settings
    records: Records
    document: dict[str, Any]

    _refused = False

    def begin(self, dataset: str | None) -> str:
        name = dataset or "unnamed"
        try:
            self.records.open(name, self.document)
        except UserError as error:
            if self._refused:  # said already, by another thread
                raise SystemExit(2) from None
            self._refused = True
            leave(error)
        return name

    def keep(self, dataset: str, question: Question, raw: str, split: thoughts.Split, **more: Any) -> str:
        """Record one output; returns what VLMEvalKit scores."""
        answer = thoughts.boxed(split.answer) if self.settings.post_process else split.answer
        record = {
            "key": question.key,
            "dataset": dataset,
            "question": question.text,
            "images": list(question.images),
            "response": raw,
            "closed": split.closed,
            "answer": answer,
        }
        self.records.append(dataset, {**record, **more})
        return answer


def limit_pictures(message: list[dict[str, str]]) -> list[dict[str, str]]:
    """The message without the pictures beyond `MAX_PICTURES`, said aloud."""
    pictures = [i for i, part in enumerate(message) if part["type"] == "image"]
    if len(pictures) <= MAX_PICTURES:
        return message
    warnings.warn(f"{len(pictures)} pictures in one message: only the first {MAX_PICTURES} are shown.", stacklevel=2)
    dropped = set(pictures[MAX_PICTURES:])
    return [part for i, part in enumerate(message) if i not in dropped]


def refuse_pixels(is_graft: bool, overrides: dict[str, Any]) -> None:
    """Limits of pictures that would be without effect.

    Raises:
        UserError: they are set for a graft.
    """
    if is_graft and (asked := sorted({"min_pixels", "max_pixels"} & set(overrides))):
        raise UserError(
            f"{', '.join(asked)}: a graft's pictures have the sizes of its own processor. Leave it out, or make the "
            "graft with other vision.min_pixels and vision.max_pixels."
        )


def whole_pictures(message: list[dict[str, str]]) -> list:
    """The pictures of a message as they are, for a processor that alone decides their sizes."""
    from PIL import Image

    if any(part["type"] == "video" for part in message):
        leave(UserError("a graft takes pictures and text; this data set has videos. Leave it out of --data."))
    files = [part["value"].removeprefix("file://") for part in message if part["type"] == "image"]
    return [Image.open(file).convert("RGB") for file in files]


class QwenMergeChat(Answering, Qwen2VLChat):
    """A Qwen-Merge checkpoint in this process; `use_vllm` picks the back end.

    The weights are loaded at the first question that is not on record, so a finished data set costs nothing.

    Args:
        model_path: a checkpoint folder of model_type qwen2_5_vl_merge or qwen_merge_graft.
        records: where answers go.
        judge: only written down.

    Raises:
        UserError: the folder holds no such model.
    """

    is_api = False

    def __init__(
        self,
        model_path: str,
        *,
        records: Records,
        settings: Settings | None = None,
        use_vllm: bool = False,
        judge: str | None = None,
        gpu_utils: float = 0.9,
        verbose: bool = False,
        **overrides: Any,
    ):
        # Not Qwen2VLChat's own __init__, which loads a model onto a GPU: the one behind it.
        self.settings = merged(settings, overrides)
        super(Qwen2VLChat, self).__init__(use_custom_prompt=self.settings.use_custom_prompt)
        model_type = model_type_of(model_path)
        self.is_graft = model_type == GRAFT
        refuse_pixels(self.is_graft, overrides)
        self.model_path = str(Path(model_path).expanduser())
        self.use_vllm, self.use_lmdeploy, self.use_audio_in_video = use_vllm, False, False
        self.min_pixels, self.max_pixels = self.settings.min_pixels, self.settings.max_pixels
        self.total_pixels = self.system_prompt = None
        self.max_new_tokens, self.post_process = self.settings.max_new_tokens, self.settings.post_process
        self.generate_kwargs = {
            name: getattr(self.settings, name) for name in ("max_new_tokens", "top_p", "top_k", "temperature")
        }
        self.verbose, self.gpu_utils = verbose, gpu_utils
        self.fps, self.nframe, self.FRAME_FACTOR = 2, 128, 2  # VLMEvalKit sets the first two for a set of videos
        self.limit_mm_per_prompt = MAX_PICTURES
        self.records = records
        self.document = document(
            records.model, self.model_path, model_type, "vllm" if use_vllm else "transformers", self.settings, judge
        )
        self.processor: Any = None
        self.backend: Any = None

    def _load(self) -> None:
        if self.backend is not None:
            return
        from transformers import AutoProcessor

        from qwen_merge.architecture import register

        # With torchrun, VLMEvalKit runs one model a process; transformers must not take that for tensor parallelism.
        world_size = os.environ.pop("WORLD_SIZE", None)
        try:
            register()
            self.processor = AutoProcessor.from_pretrained(self.model_path)
            self._refuse_smaller_pictures()
            self.backend = (
                Vllm(self.model_path, self.settings, self.gpu_utils)
                if self.use_vllm
                else Transformers(self.model_path, self.processor, self.settings)
            )
        finally:
            if world_size is not None:
                os.environ["WORLD_SIZE"] = world_size

    def _refuse_smaller_pictures(self) -> None:
        """The checkpoint's processor resizes after us: a lower limit of its own would silently undo the setting."""
        own = getattr(self.processor.image_processor, "max_pixels", None)
        if not self.is_graft and own is not None and own < self.settings.max_pixels:
            leave(
                UserError(
                    f"preprocessor_config.json in {self.model_path} limits pictures to {own} pixels, the setting is "
                    f"{self.settings.max_pixels}.\nTake the file of the merged base checkpoint, or the -matched entry."
                )
            )

    def prepare(self, message: list[dict[str, str]], dataset: str | None) -> Prompt:
        """Render the chat template and read the pictures, for either back end."""
        from qwen_vl_utils import process_vision_info

        messages = [{"role": "user", "content": self._prepare_content(message, dataset=dataset)}]
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.settings.thinking
        )
        if self.is_graft:
            return Prompt(text, whole_pictures(message) or None, None, [])
        images, videos, options = process_vision_info(messages, return_video_kwargs=True)
        return Prompt(text, images, videos, options.get("fps", []))

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        message = limit_pictures(message)
        has_video = any(part["type"] == "video" for part in message)
        question = Question.of(message, **({"fps": self.fps, "nframe": self.nframe} if has_video else {}))
        name = self.begin(dataset)
        known = self.records.find(name, question.key)
        if known is not None:
            return known
        self._load()
        prompt = self.prepare(message, dataset)
        tokenizer = self.processor.tokenizer
        try:
            tokens = list(self.backend.generate(prompt, self.settings.seed_of(question.key)))
        except PromptTooLong as error:
            warnings.warn(
                f"a question of {name} is too long to be answered ({error}); it counts as wrong", stacklevel=1
            )
            return self.keep(
                name, question, "", thoughts.Split("", "", None), tokens=0, thought_tokens=None, error=str(error)
            )
        raw = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        split = thoughts.split(raw, opened=prompt.text.rstrip().endswith(thoughts.OPEN))
        close = tokenizer.convert_tokens_to_ids(thoughts.CLOSE)
        thought_tokens = len(tokens) - tokens[::-1].index(close) if split.closed and close in tokens else None
        answer = self.keep(name, question, raw, split, tokens=len(tokens), thought_tokens=thought_tokens)
        if self.verbose:
            print(f"{dataset}: {question.text}\n-> {raw}", flush=True)
        return answer
