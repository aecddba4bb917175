"""Greedy tokens of the same requests by transformers, in this process, and by vLLM, in one of its own.

    expected = by_transformers(checkpoint, requests)
    answers = by_vllm([{"name": "a", "model": str(checkpoint), "rounds": [list(requests.values())]}], tmp_path)
    assert tokens_of(requests, answers["a"][0]) == expected

A request is what `tests/vllm_jobs.py` takes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_merge.architecture import register
from training import REPOSITORY

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
LONG = "Read the number in the picture, then count the shapes and name their colours. "


def picture_requests(folder: Path) -> dict[str, dict]:
    """One text and three ways of showing pictures, of two sizes; they are written to `folder`."""
    noise, pictures = np.random.default_rng(0), []
    for number, (width, height) in enumerate(((84, 84), (140, 56))):
        picture = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pictures.append(str(folder / f"{number}.png"))
        picture.save(pictures[-1])
    return {
        "text": {"prompt": "Answer with one word."},
        "one picture": {"prompt": f"{IMAGE}What colour is the shape?", "images": pictures[:1]},
        "two pictures": {"prompt": f"{IMAGE} and {IMAGE}: which is larger?", "images": pictures},
        "picture after a long text": {"prompt": f"{LONG * 4}{IMAGE}What is it?", "images": pictures[1:]},
    }


def by_transformers(checkpoint: Path, requests: dict[str, dict], adapter: Path | None = None) -> dict[str, list[int]]:
    """Greedy tokens of each request alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    register()
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, torch_dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    model.generation_config.eos_token_id = None
    tokens = {}
    for name, request in requests.items():
        inputs = processor(
            text=[request["prompt"]],
            images=[Image.open(file).convert("RGB") for file in request.get("images", [])] or None,
            videos=[np.load(file) for file in request.get("videos", [])] or None,
            return_tensors="pt",
        )
        # vLLM's model never says a placeholder (see its compute_logits).
        config = model.config
        never_said = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
        generated = model.generate(**inputs, max_new_tokens=16, do_sample=False, suppress_tokens=never_said)
        tokens[name] = generated[0, inputs.input_ids.shape[1] :].tolist()
    return tokens


def by_vllm(jobs: list[dict], folder: Path, **variables: str) -> dict[str, list[list[dict]]]:
    """Answers of tests/vllm_jobs.py: job -> rounds -> requests."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = subprocess.run(
        [sys.executable, "tests/vllm_jobs.py", folder / "jobs.json", folder / "answers.json"],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "PYTHONPATH": "src:tests",
            **variables,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return json.loads((folder / "answers.json").read_text())


def with_names_of_memory(source: Path, target: Path) -> Path:
    """The checkpoint as transformers 4.52.3 itself would save it: `model.visual.*`, `model.language_model.*`."""
    shutil.copytree(source, target)
    renamed = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        new = name
        if name.startswith("visual."):
            new = f"model.{name}"
        elif name.startswith("model."):
            new = name.replace("model.", "model.language_model.", 1)
        renamed[new] = tensor
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def make_adapter(checkpoint: Path, folder: Path) -> Path:
    """A LoRA on the LLM's attention and MLP whose random weights change the answer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    register()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, torch_dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj)")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def tokens_of(requests: dict[str, dict], outputs: list[dict]) -> dict[str, list[int]]:
    return {name: output["tokens"] for name, output in zip(requests, outputs, strict=True)}
