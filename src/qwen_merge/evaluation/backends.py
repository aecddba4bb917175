"""The two ways to generate tokens in this process, transformers and vLLM, behind one call.

Both get the same rendered prompt and the same resized pictures and give token ids back, so that what differs between
two runs is the generating itself. `models` decides which one a run takes (`--use-vllm`).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_merge.evaluation.records import Settings

MAX_PICTURES = 24  # a message; VLMEvalKit's limit under vLLM, kept for every back end
MAX_LENGTH = 32768  # prompt and answer together, in tokens


class PromptTooLong(Exception):
    """A prompt that leaves no room for an answer; the question counts as unanswered."""


@dataclass(frozen=True)
class Prompt:
    """What a back end gets: the rendered text, the resized pictures, the frames of videos and their rates."""

    text: str
    images: list | None
    videos: list | None
    frame_rates: list[float]

    @property
    def processor_options(self) -> dict[str, Any]:
        return {"fps": self.frame_rates} if self.videos else {}


def context_length(model_path: str) -> int:
    """Prompt and answer together, in tokens: the model's limit, at most `MAX_LENGTH`."""
    config = json.loads(Path(model_path, "config.json").read_text(encoding="utf-8"))
    own = config.get("text_config", {}).get("max_position_embeddings") or config.get("max_position_embeddings")
    return min(MAX_LENGTH, own or MAX_LENGTH)


def stored_in_float32(model_path: str) -> bool:
    config = json.loads(Path(model_path, "config.json").read_text(encoding="utf-8"))
    dtype = config.get("torch_dtype") or config.get("text_config", {}).get("torch_dtype")
    return dtype == "float32"


class Transformers:
    """Generates with transformers, one question at a time."""

    name = "transformers"

    def __init__(self, model_path: str, processor, settings: Settings):
        import importlib.util

        import torch
        from transformers import AutoModelForImageTextToText

        from qwen_merge.architecture import register

        register()
        gpu = torch.cuda.is_available()
        flash = gpu and importlib.util.find_spec("flash_attn") is not None
        self.processor, self.settings = processor, settings
        self.limit = context_length(model_path)
        self.model = AutoModelForImageTextToText.from_pretrained(
            model_path,
            torch_dtype="auto",
            attn_implementation="flash_attention_2" if flash else "sdpa",
            **({"device_map": "auto"} if gpu else {}),
        ).eval()
        # As in vLLM (see compute_logits there): an answer holds no placeholder of a picture or a video.
        config = self.model.config
        self.never_said = [config.image_token_id, config.video_token_id, config.vision_start_token_id]

    def generate(self, prompt: Prompt, seed: int) -> Sequence[int]:
        import torch

        inputs = self.processor(
            text=[prompt.text],
            images=prompt.images,
            videos=prompt.videos,
            return_tensors="pt",
            **prompt.processor_options,
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        if length >= self.limit:
            raise PromptTooLong(f"{length} tokens, the limit is {self.limit}")
        s = self.settings
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if s.temperature > 0:
            sampling = {"do_sample": True, "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
        torch.manual_seed(seed)  # the devices' generators too
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=min(s.max_new_tokens, self.limit - length),
                repetition_penalty=1.0,
                suppress_tokens=self.never_said,
                **sampling,
            )
        return output[0, length:].tolist()


class Vllm:
    """Generates with vLLM in this process."""

    name = "vllm"

    def __init__(self, model_path: str, settings: Settings, gpu_memory_utilization: float = 0.9):
        import torch

        gpus = torch.cuda.device_count()
        options: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
        # CUDA is initialised in this process already, which a forked worker cannot use.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        if not gpus:
            # Without `dtype` vLLM would make bfloat16 of float32.
            options = {"dtype": "float32" if stored_in_float32(model_path) else "bfloat16", "enforce_eager": True}
        from vllm import LLM

        self.settings = settings
        self.llm = LLM(
            model=model_path,
            max_model_len=context_length(model_path),
            max_num_seqs=5,
            limit_mm_per_prompt={"image": MAX_PICTURES},
            tensor_parallel_size=1 << (gpus.bit_length() - 1) if gpus else 1,  # the largest power of two
            seed=settings.seed,
            **options,
        )

    def generate(self, prompt: Prompt, seed: int) -> Sequence[int]:
        from vllm import SamplingParams

        s = self.settings
        greedy = s.temperature == 0
        sampling = SamplingParams(
            temperature=s.temperature,
            top_p=1.0 if greedy else s.top_p,
            top_k=-1 if greedy else s.top_k,
            max_tokens=s.max_new_tokens,
            seed=seed,
        )
        media = {}
        if prompt.images:
            media["image"] = prompt.images
        if prompt.videos:
            media["video"] = prompt.videos
        request: Any = {"prompt": prompt.text}
        if media:
            request["multi_modal_data"] = media
        if prompt.processor_options:
            request["mm_processor_kwargs"] = prompt.processor_options
        try:
            return self.llm.generate(request, sampling, use_tqdm=False)[0].outputs[0].token_ids
        except ValueError as error:
            if "maximum model length" in str(error):
                raise PromptTooLong(str(error)) from error
            raise
