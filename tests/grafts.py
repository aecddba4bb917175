"""Tiny source checkpoints of every tower and LLM that a graft can be made of: real architectures, random weights.

vision = make_tower(tmp_path / "siglip", "siglip")
llm = make_language_model(tmp_path / "moe", "qwen3_moe")
checkpoint = Grafts(tmp_path)("siglip", "mlp", "qwen3_moe", "mrope")
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from checkpoints import (
    LLM_CONFIG,
    TOKEN_IDS,
    VLM_CONFIG,
    make_llm,
    make_tokenizer,
    make_vlm,
    random_weights,
    save_weights,
    write_json,
)

HAS_QWEN3_VL = find_spec("transformers.models.qwen3_vl") is not None  # from 4.57 on; its decoder alone is a Qwen3's
TOWERS = ("qwen2_5_vl", "qwen2_vl", "clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers")
TOWERS += ("qwen3_vl",) * HAS_QWEN3_VL
LLMS = ("qwen3", "qwen3_moe", "qwen2", "qwen3_vl")
PROJECTORS: dict[str, dict[str, Any]] = {
    "own": {},
    "extended": {},
    "patch_merger": {},
    "linear": {},
    "mlp": {"merge_size": 2},
    "resampler": {"queries": 16, "heads": 2},
}
PROMPT = "<|vision_start|><|image_pad|><|vision_end|>What is it?"
SIZE = 56  # pixels on the side of a picture, for towers that take one size
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": SIZE}
_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
# As the published checkpoints spell them: an old name, a size that patches do not fill, a fast class.
LEFT_OVER = 4
QWEN3_VL_VISION: dict[str, Any] = {
    "model_type": "qwen3_vl", "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1], "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIZE, "crop_size": SIZE, "do_center_crop": True},
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": SIZE + LEFT_OVER, "width": SIZE + LEFT_OVER},
    },
    "siglip2": {"image_processor_type": "Siglip2ImageProcessorFast", "patch_size": 14, "max_num_patches": 16},
    "qwen3_vl": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 32 * 32, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessorFast",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}


def draw(model, seed: int) -> None:
    """Every weight, norms and biases too: one that is left out or swapped then makes a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(values + float("norm" in name and name.endswith("weight")))


def make_tower(folder: Path, kind: str, dtype: str = "float32") -> Path:
    import transformers

    if kind == "qwen2_5_vl":
        return make_vlm(folder, dtype=dtype)
    if kind == "qwen3_vl":
        return make_qwen3_vl(folder, dtype=dtype)
    if kind == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2}
        text = {name: VLM_CONFIG[name] for name in ("intermediate_size", "num_hidden_layers", "vocab_size")}
        text |= {"hidden_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
        text |= {name: VLM_CONFIG[name] for name in VLM_CONFIG if name.endswith("token_id")}
        text["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 4, 4]}
        config = transformers.Qwen2VLConfig(**text, vision_config=vision, tie_word_embeddings=False)
        model = transformers.Qwen2VLForConditionalGeneration(config)
        preprocessor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
    elif kind in ("clip", "siglip", "siglip2"):
        name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[kind]
        vision, text = {**_VIT, "intermediate_size": 48}, {**_TEXT, "projection_dim": 16, "projection_size": 16}
        vision["num_patches"] = 16
        vision["image_size"] = SIZE + (LEFT_OVER if kind == "siglip" else 0)
        config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text)
        model = getattr(transformers, f"{name}Model")(config)
        preprocessor = PREPROCESSORS[kind]
    else:
        name = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[kind]
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**_VIT, mlp_ratio=2))
        preprocessor = PREPROCESSORS["dinov2"]
    draw(model, seed=len(kind))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", preprocessor)
    return folder


def make_language_model(folder: Path, kind: str, tied: bool = False, dtype: str = "float32") -> Path:
    import transformers

    if kind == "qwen3":
        return make_llm(folder, tied=tied, dtype=dtype)
    if kind == "qwen3_vl":
        return make_qwen3_vl(folder, tied=tied, dtype=dtype)
    shared = {name: value for name, value in LLM_CONFIG.items() if name not in ("architectures", "model_type")}
    shared |= {"tie_word_embeddings": tied, "torch_dtype": dtype}
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shared, **experts))
    else:
        del shared["head_dim"], shared["attention_bias"]
        shared |= {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32: vLLM has no kernel for smaller
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shared))
    model.load_state_dict(random_weights(model, "float32", seed=7))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_qwen3_vl(folder: Path, tied: bool = False, dtype: str = "float32") -> Path:
    """A Qwen3-VL as it is published. Where transformers does not know it, its decoder, and one tensor of the tower."""
    import transformers

    text = {name: value for name, value in LLM_CONFIG.items() if name not in ("architectures", "torch_dtype")}
    text |= {"model_type": "qwen3_vl_text", "tie_word_embeddings": tied, "rope_theta": 5000000, "dtype": dtype}
    text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": {**QWEN3_VL_VISION, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": tied,
        **{f"{name}_token_id": TOKEN_IDS[f"<|{name}_pad|>"] for name in ("image", "video")},
        **{f"vision_{name}_token_id": TOKEN_IDS[f"<|vision_{name}|>"] for name in ("start", "end")},
    }
    if HAS_QWEN3_VL:
        whole = transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(**json.loads(json.dumps(config)))
        )
        draw(whole, seed=8)
        weights = whole.state_dict()
    else:
        decoder = transformers.Qwen3ForCausalLM(qwen3_config(config))
        draw(decoder, seed=8)
        weights = {
            name.replace("model.", "model.language_model.", 1): tensor for name, tensor in decoder.state_dict().items()
        }
        weights["model.visual.pos_embed.weight"] = torch.zeros(4, 4)
    if tied:
        del weights["lm_head.weight"]
    save_weights(folder, {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.items()})
    write_json(folder / "config.json", config)
    make_tokenizer(folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSORS["qwen3_vl"])
    return folder


def qwen3_config(config: dict):
    """Of the decoder in a Qwen3-VL, as a plain Qwen3."""
    import transformers

    fields = {name: value for name, value in config["text_config"].items() if name not in ("model_type", "dtype")}
    return transformers.Qwen3Config(**{**fields, "rope_scaling": None})


def language_model(folder: Path):
    """The LLM of a source as a causal LM of transformers: of a Qwen3-VL its decoder as a plain Qwen3."""
    import transformers
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen3_vl":
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model = transformers.Qwen3ForCausalLM(qwen3_config(config))
    weights = {
        name.replace("language_model.", "", 1): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not name.startswith("model.visual.")
    }
    model.load_state_dict(weights)
    return model.eval()


def write_recipe(path: Path, tower: Path, kind: str, language_model: Path, output: Path, **values: Any) -> Path:
    content = {
        "vision": {"source": str(tower), **values.pop("vision", {})},
        "projector": {"kind": kind, **PROJECTORS[kind], **values.pop("projector", {})},
        "llm": {"source": str(language_model)},
        "output": str(output),
        **values,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


class Grafts:
    """Tiny grafts, each made once: a folder with their sources, named by their kinds."""

    def __init__(self, folder: Path):
        self.folder = folder
        for kind in TOWERS:
            if not (folder / kind).exists():
                make_tower(folder / kind, kind)
        for number, kind in enumerate(LLMS):
            if not (folder / kind).exists():
                make_language_model(folder / kind, kind, tied=number == 0)

    def __call__(self, tower: str, projector: str, llm: str, positions: str, name: str = "", **values: Any) -> Path:
        """Its checkpoint. name: tells it from others of these kinds; values: more of the recipe.

        Raises:
            UserError: there is no such graft.
        """
        from qwen_merge.graft.make import make
        from qwen_merge.graft.recipe import read

        output = self.folder / "-".join(filter(None, (tower, projector, llm, positions, name)))
        if not output.exists():
            file = self.folder / f"{output.name}.yaml"
            sources = (self.folder / tower, projector, self.folder / llm)
            make(read(write_recipe(file, *sources, output, positions=positions, **values)))
        return output


def with_projector(checkpoint: Path, target: Path, seed: int, silent: str | None = None) -> Path:
    """A copy whose projector is drawn wide, so that each picture changes what the LLM says, and by `seed`.

    silent: a prefix of tensors that are zero.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, target)
    weights = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        if name.startswith("projector.") and weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=generator)
            weights[name] = (2 * noise * weight[0].numel() ** -0.5).to(weight.dtype)
        if silent and name.startswith(silent):
            weights[name] = torch.zeros_like(weight)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def pictures(*sizes: tuple[int, int]) -> list:
    """Noise of these (width, height)."""
    import numpy as np
    from PIL import Image

    dice = np.random.default_rng(0)
    return [Image.fromarray(dice.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]


def losses_alone_and_packed(model, processor) -> tuple[float, float, float]:
    """The loss of three samples one by one, in one row, and in one row without saying where they begin."""
    samples = []
    for number, text in enumerate((PROMPT, "Hello there.", PROMPT + PROMPT)):
        images = pictures(*[(56, 56)] * text.count("<|image_pad|>")) or None
        inputs = processor(text=[text], images=images, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 320, -100)
        labels[:, 0] = -100
        positions, _ = model.model.get_rope_index(inputs["input_ids"], inputs.get("image_grid_thw"), None, None, None)
        pixels = {
            name: inputs[name] + number * ("pixel" in name) for name in inputs if "pixel" in name or "grid" in name
        }
        samples.append({"input_ids": inputs["input_ids"], "labels": labels, "position_ids": positions, **pixels})
    counts = [int((sample["labels"] != -100).sum()) for sample in samples]
    losses = [model(**sample).loss for sample in samples]
    alone = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    ends = torch.tensor([0, *[sample["input_ids"].shape[1] for sample in samples]]).cumsum(0).int()
    row = {name: torch.cat([s[name] for s in samples], -1) for name in ("input_ids", "labels", "position_ids")}
    row |= {name: torch.cat([s[name] for s in samples if name in s]) for name in ("pixel_values", "image_grid_thw")}
    longest = int(ends.diff().max())
    offsets = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return alone.item(), model(**row, **offsets).loss.item(), model(**row).loss.item()
