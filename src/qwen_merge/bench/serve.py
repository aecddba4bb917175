"""vLLM's speed on a merged model beside a stock Qwen2.5-VL of the same shape, in one process and in turns.

    qwen-merge bench serve

Both have the same vision tower and an LLM of the same width, depth, heads and vocabulary; the merged one has Qwen3's
norms on queries and keys, no biases on them, and the projector's new layer. Weights are noise: speed does not depend on
them. The engines take turns, so that what else the machine does falls on both.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 8,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [3, 7],
    "tokens_per_second": 2,
}
SIDE = 336  # pixels: 576 patches, 144 tokens
QUESTION = "<|vision_start|><|image_pad|><|vision_end|>What is in the picture? Describe it."


def make_checkpoints(folder: Path) -> dict[str, Path]:
    """ "merged" and "stock", with the merge done by the real merger."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    from qwen_merge.demo.checkpoints import lay_out_as_on_the_hub, make_tokenizer
    from qwen_merge.merger.merge import MergeOptions, merge

    torch.manual_seed(0)
    words = make_tokenizer(folder / "llm")
    ids = {"bos_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    size = {"vocab_size": len(words), "max_window_layers": SHAPE["num_hidden_layers"], "torch_dtype": "float32"}
    llm = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **size, **ids, head_dim=64, sliding_window=None))
    llm.save_pretrained(folder / "llm")
    marks = {
        f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = Qwen2_5_VLConfig(
        **SHAPE,
        **size,
        **ids,
        **marks,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
        vision_config={**VISION, "out_hidden_size": SHAPE["hidden_size"]},
    )
    stock = folder / "stock"
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(stock)
    words.save_pretrained(stock)
    lay_out_as_on_the_hub(stock)
    merge(MergeOptions(vlm=str(stock), llm=str(folder / "llm"), output=folder / "merged"))
    return {"merged": folder / "merged", "stock": stock}


def start(checkpoint: Path) -> tuple[Any, float]:
    """An engine in this process, and how many seconds it took to be ready."""
    from vllm import LLM

    began = time.perf_counter()
    engine = LLM(
        str(checkpoint),
        dtype="float32",
        max_model_len=1024,
        limit_mm_per_prompt={"image": 1, "video": 0},
        enable_prefix_caching=False,
    )
    return engine, time.perf_counter() - began


def warm_up(checkpoint: Path) -> None:
    """Start an engine and let it go, so that importing vLLM and its first look at a model count for neither of two."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    engine, _ = start(checkpoint)
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


class Subject:
    """One engine, and what was measured of it."""

    def __init__(self, checkpoint: Path):
        self.engine, self.start_seconds = start(checkpoint)
        self.first_token: list[float] = []
        self.tokens_per_second: list[float] = []

    def measure(self, pictures: list, new_tokens: int) -> None:
        single, *batch = pictures  # each picture is asked about once: its preprocessing would come out of a cache
        self.first_token.append(self._seconds([single], 1))
        self.tokens_per_second.append(len(batch) * new_tokens / self._seconds(batch, new_tokens))

    def _seconds(self, pictures: list, new_tokens: int) -> float:
        from vllm import SamplingParams

        prompts = [{"prompt": QUESTION, "multi_modal_data": {"image": picture}} for picture in pictures]
        began = time.perf_counter()
        outputs = self.engine.generate(
            prompts, SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True), use_tqdm=False
        )
        seconds = time.perf_counter() - began
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
        return seconds


def run(arguments: argparse.Namespace) -> int:
    """Print medians, ranges and the paired ratio; `--json` writes them."""
    import numpy
    from PIL import Image

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # both engines in this process, so that they can take turns
    noise = numpy.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = make_checkpoints(Path(folder))
        for path in checkpoints.values():
            warm_up(path)
        subjects = {name: Subject(path) for name, path in checkpoints.items()}
        for round_number in range(arguments.repeats + 1):
            shape = (arguments.requests + 1, SIDE, SIDE, 3)  # new pictures each round: nothing comes out of a cache
            pictures = [Image.fromarray(picture) for picture in noise.integers(0, 256, shape, dtype=numpy.uint8)]
            order = list(subjects.values())
            for subject in order if round_number % 2 else reversed(order):
                subject.measure(pictures, arguments.new_tokens)
    figures: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        figures[name] = {
            "start_seconds": subject.start_seconds,
            "first_token_seconds": subject.first_token[1:],  # the first round warms up
            "tokens_per_second": subject.tokens_per_second[1:],
        }
    pairs = zip(figures["merged"]["tokens_per_second"], figures["stock"]["tokens_per_second"], strict=True)
    ratios = [merged / stock for merged, stock in pairs]
    print(
        f"{arguments.requests} requests of a {SIDE} x {SIDE} picture, {arguments.new_tokens} new tokens each, float32"
    )
    for name, figure in figures.items():
        first, rate = figure["first_token_seconds"], figure["tokens_per_second"]
        print(
            f"{name:7} {statistics.median(rate):8.1f} tokens/s ({min(rate):.1f} to {max(rate):.1f}), first token after "
            f"{1000 * statistics.median(first):.0f} ms ({1000 * min(first):.0f} to {1000 * max(first):.0f})"
        )
    print(
        "engine start, both warm: "
        + ", ".join(f"{name} {figure['start_seconds']:.1f} s" for name, figure in figures.items())
    )
    print(f"merged / stock, tokens/s, median of the rounds: {statistics.median(ratios):.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "ratios": ratios}, indent=1) + "\n")
    return 0
