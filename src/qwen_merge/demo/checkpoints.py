"""The two parents of the graft, in tiny: a Qwen3 that knows the world in words, a Qwen2.5-VL that has seen it.

    python -m qwen_merge.demo.checkpoints llm DIR
    python -m qwen_merge.demo.checkpoints vlm DIR

The classes are transformers' own, the directories are laid out as the hub's. What happens here is pre-history (the
real parents are downloaded), hence plain loops on one thread; the demo runs both at once, one on each core.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional

from qwen_merge.demo import lessons, tokenizer
from qwen_merge.demo.language import corpus
from qwen_merge.demo.muon import Muon
from qwen_merge.demo.world import Stream
from qwen_merge.errors import UserError

# (steps, batch), found by trial: less leaves gaps that the four stages cannot close.
LLM_LESSON = (600, 32)
VLM_LESSON = (900, 48)
INITIAL_DEVIATION = 0.08  # near 1 / sqrt(width); the usual 0.02 is for widths of thousands and starts slowly here


def make_tokenizer(folder: Path, seed: int = 0):
    from transformers import AutoTokenizer

    tokenizer.save(tokenizer.train(corpus(seed)), folder)
    return AutoTokenizer.from_pretrained(folder)


def learn(model, batches: Iterator[dict], steps: int, name: str) -> float:
    """A plain loop: Muon for matrices, AdamW for the rest, 5% warm-up, cosine. Returns the last tenth's mean loss."""
    others: list[torch.nn.Parameter] = []
    matrices: list[torch.nn.Parameter] = []
    for parameter_name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "embed_tokens" not in parameter_name
        (matrices if matrix else others).append(parameter)
    optimizers = (
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    )
    warm_up = max(1, steps // 20)

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.51 + 0.49 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    losses: list[float] = []
    tenth, began = max(1, steps // 10), time.monotonic()
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        losses.append(loss.item())
        if step % tenth == 0:
            mean, seconds = sum(losses[-tenth:]) / tenth, time.monotonic() - began
            print(f"{name}: step {step} of {steps}, loss {mean:.4f}, {seconds:.0f} s", flush=True)
    return sum(losses[-tenth:]) / tenth


def make_llm(folder: Path, seed: int = 0, lesson: tuple[int, int] = LLM_LESSON) -> float:
    """A Qwen3 of 3 layers, taught the world in text, saved to `folder`. Returns its last loss."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    words = make_tokenizer(folder, seed)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_theta=1_000_000,
        tie_word_embeddings=True,
        initializer_range=INITIAL_DEVIATION,
        max_window_layers=3,
        sliding_window=None,
        bos_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        torch_dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    stream = Stream("text", seed)
    loss = learn(model, lessons.text_batches(stream, words, lesson[1]), lesson[0], "tiny LLM")
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        bos_token_id=words.pad_token_id,
        pad_token_id=words.pad_token_id,
        eos_token_id=[words.eos_token_id, words.pad_token_id],
    )
    model.save_pretrained(folder)
    return loss


def make_vlm(folder: Path, seed: int = 0, lesson: tuple[int, int] = VLM_LESSON) -> float:
    """A Qwen2.5-VL with a ViT of 4 layers, taught to caption, saved to `folder`. Returns its last loss."""
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    words = make_tokenizer(folder, seed)
    torch.manual_seed(seed + 1)
    model = Qwen2_5_VLForConditionalGeneration(vlm_config(words))
    model.train()
    stream = Stream("captions of the tiny VLM", seed)
    attend_within_pictures(model.model.visual)
    loss = learn(model, lessons.picture_batches(stream, words, lesson[1]), lesson[0], "tiny VLM")
    model.generation_config = GenerationConfig(pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id)
    model.save_pretrained(folder)
    lay_out_as_on_the_hub(folder)
    return loss


def vlm_config(words):
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": len(words),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "max_window_layers": 2,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},  # half of head_dim 32
        "tie_word_embeddings": True,
        "initializer_range": INITIAL_DEVIATION,
    }
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 2,
        "out_hidden_size": 96,
        "patch_size": lessons.PATCH,
        "spatial_merge_size": lessons.MERGE,
        "temporal_patch_size": lessons.TEMPORAL,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "initializer_range": INITIAL_DEVIATION,
    }
    return Qwen2_5_VLConfig(
        **text,
        vision_config=vision,
        bos_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
        vision_token_id=words.convert_tokens_to_ids("<|vision_pad|>"),
        torch_dtype="float32",
    )


def attend_within_pictures(visual) -> None:
    """Exchange the ViT's attention for one that takes equal pictures as a batch: same result, no wasted products.

    transformers' own builds one mask over the patches of all pictures, so that 48 pictures cost 48 times too much.
    A window of 112 pixels holds a picture of 84 whole, so every block sees exactly its picture.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    def forward(attention, hidden_states, cu_seqlens, rotary_pos_emb=None, position_embeddings=None):
        patches_in_all = hidden_states.shape[0]
        q, k, v = attention.qkv(hidden_states).reshape(patches_in_all, 3, attention.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (x.unflatten(0, (-1, lessons.GRID**2)).transpose(1, 2) for x in (q, k, v))
        output = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return attention.proj(output.reshape(patches_in_all, -1))

    for block in visual.blocks:
        block.attn.forward = forward.__get__(block.attn)


def lay_out_as_on_the_hub(folder: Path) -> None:
    """What Qwen2.5-VL's repositories hold and `save_pretrained` of 4.52 writes otherwise or not at all.

    Tensor names `visual.*` and `model.*`, text fields flat in config.json, preprocessor_config.json.
    """
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    tensors = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for name, value in config.pop("text_config", {}).items():
        if name not in ("model_type", "architectures", "vision_config", "torch_dtype"):
            config.setdefault(name, value)
    config["rope_scaling"] = {"type": "mrope", "mrope_section": config["rope_scaling"]["mrope_section"]}
    write_json(folder / "config.json", config)
    write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": lessons.PATCH,
            "temporal_patch_size": lessons.TEMPORAL,
            "merge_size": lessons.MERGE,
            "image_mean": lessons.PIXEL_MEAN,
            "image_std": lessons.PIXEL_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str]) -> int:
    makers = {"llm": make_llm, "vlm": make_vlm}
    if len(argv) not in (2, 3) or argv[0] not in makers:
        raise UserError("usage: python -m qwen_merge.demo.checkpoints llm|vlm DIR [SEED]")
    torch.set_num_threads(1)
    makers[argv[0]](Path(argv[1]), int(argv[2]) if len(argv) == 3 else 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
