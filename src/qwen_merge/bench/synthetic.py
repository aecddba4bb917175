"""Synthetic checkpoints for the benchmarks: real layouts and sizes, noise for weights, as large as the disk allows."""

import json
import math
from pathlib import Path

from qwen_merge.bench.real_sizes import QWEN2_5_VL, QWEN3, VISION_TOKEN_IDS, Shapes, llm_shapes, vlm_shapes
from qwen_merge.merger.safetensors_file import encode_header
from qwen_merge.merger.shards import INDEX_NAME

SHARD_BYTES = 4_000_000_000  # about what the published checkpoints have
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def make_llm(directory: Path, *, size: str = "0.6B", gb: float | None = None) -> Path:
    """A Qwen3 of a published size, with as many layers as give at least `gb` (None: all)."""
    config = dict(QWEN3[size])
    if gb is not None:
        config["num_hidden_layers"] = _layers_for(gb, config, llm_shapes)
    directory.mkdir(parents=True)
    added = [{"id": number, "content": token, "special": True} for token, number in VISION_TOKEN_IDS.items()]
    _write_json(
        directory / "tokenizer.json", {"added_tokens": added, "model": {"type": "BPE", "vocab": {}, "merges": []}}
    )
    _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    _write_json(directory / "generation_config.json", {"do_sample": True, "temperature": 0.6})
    _write_json(directory / "config.json", config)
    _write_weights(directory, llm_shapes(config))
    return directory


def make_vlm(directory: Path, *, size: str = "3B", gb: float | None = None, only_vision_files: bool = False) -> Path:
    """A Qwen2.5-VL of a published size. only_vision_files: the other files are only named in the index."""
    config = json.loads(json.dumps(QWEN2_5_VL[size]))
    if gb is not None:
        config["num_hidden_layers"] = _layers_for(gb, config, vlm_shapes)
    directory.mkdir(parents=True)
    _write_json(directory / "preprocessor_config.json", PREPROCESSOR)
    _write_json(directory / "config.json", config)
    shapes = vlm_shapes(config)
    ordered = sorted(shapes, key=lambda name: not name.startswith("visual."))  # as published: the first file or files
    _write_weights(directory, {name: shapes[name] for name in ordered}, "visual." if only_vision_files else "")
    return directory


def _layers_for(gb: float, config: dict, shapes_of) -> int:
    one, two = (_nbytes(shapes_of({**config, "num_hidden_layers": layers})) for layers in (1, 2))
    return max(1, 1 + math.ceil((gb * 1e9 - one) / (two - one)))


def _nbytes(shapes: Shapes) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values())


def _write_weights(directory: Path, shapes: Shapes, prefix: str = "") -> None:
    """Write bfloat16 shards and their index; a shard without a tensor that starts with `prefix` is left out."""
    import numpy

    noise = numpy.random.default_rng(0).normal(0, 0.02, 16 << 20).astype(numpy.float32).view(numpy.uint32) >> 16
    block = noise.astype(numpy.uint16).tobytes()
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if groups[-1] and filled + nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    weight_map = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        if not any(name.startswith(prefix) for name in names):
            continue
        header, nbytes = encode_header((name, "BF16", shapes[name]) for name in names)
        with (directory / file).open("wb") as opened:
            opened.write(header)
            for start in range(len(header), nbytes, len(block)):
                opened.write(block[: nbytes - start])
    _write_json(directory / INDEX_NAME, {"metadata": {"total_size": _nbytes(shapes)}, "weight_map": weight_map})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
