"""The part of `qwen-merge verify` that runs the models: what the merge computes against what its sources compute.

Both models of a pair are loaded one after the other, in the checkpoint's dtype, so the memory needed is that of the
larger one. Only the VLM's vision tower is built, from its own files: the 72B's text model is never needed.
"""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qwen_merge.merger.key_map import disk_name, is_vision
from qwen_merge.merger.sources import Source

TOKENS = 24  # of the text that is compared; two rows of it, one padded on the left
GRIDS = ((1, 4, 6), (1, 10, 12), (2, 6, 4))  # two pictures (one of several windows) and a video, in patches
# Differences that are rounding, as a share of the largest value: kernels may add in another order.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def compare_text(directory: Path, llm: Source) -> tuple[list[str], str]:
    """Logits of the same text by the merged model and by the LLM. Returns (differences, what passed)."""
    from transformers import Qwen3ForCausalLM

    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import Qwen2_5_VL_MergeForConditionalGeneration

    merged = _text_logits(Qwen2_5_VL_MergeForConditionalGeneration, directory)
    plain = _text_logits(Qwen3ForCausalLM, local_directory(llm), dtype=merged.dtype)
    return _difference(merged, plain, f"logits of 2 × {TOKENS} tokens")


def _text_logits(model_class: Any, directory: Path, dtype: "torch.dtype | str" = "auto") -> torch.Tensor:
    """(2 × tokens, vocabulary) logits where a token is; the second row's first tokens are padding."""
    with quiet():
        model = model_class.from_pretrained(directory, torch_dtype=dtype, attn_implementation="sdpa").eval()
    vocabulary = min(model.config.get_text_config().vocab_size, 1000)
    ids = torch.randint(vocabulary // 2, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : TOKENS // 3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    del model
    gc.collect()
    return logits[mask.bool()]


def compare_vision(directory: Path, vlm: Source) -> tuple[list[str], str]:
    """Features behind the VLM's own patch merger, before the new layer, of pictures and a video."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    from qwen_merge.architecture.configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeVisionConfig
    from qwen_merge.architecture.vision_qwen2_5_vl_merge import Qwen2_5_VL_MergeVisionTransformer

    merged_source = Source(directory, "merged")
    merged_config = Qwen2_5_VL_MergeVisionConfig(**merged_source.read_json("config.json")["vision_config"])
    merged_tower = Qwen2_5_VL_MergeVisionTransformer._from_config(merged_config)
    dtype = _load_weights(merged_tower, merged_source)
    merged_tower.merger.mlp = merged_tower.merger.mlp[:3]  # stop before GELU and the new Linear
    plain_config = vlm.read_json("config.json")["vision_config"]
    plain_config = Qwen2_5_VLVisionConfig(**{**merged_config.to_dict(), **plain_config})
    plain_tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(plain_config)
    _load_weights(plain_tower, vlm, dtype)
    return _difference(
        _features(merged_tower), _features(plain_tower), f"features of {len(GRIDS)} pictures and videos at once"
    )


def _load_weights(tower: nn.Module, source: Source, dtype: torch.dtype | None = None) -> torch.dtype:
    """Load a vision tower from the files that hold `visual.*`, in their dtype or in `dtype`; return it."""
    files: dict[str, list[str]] = {}
    for name, stored in source.read_tensors(is_vision).items():
        if stored is not None and is_vision(name):
            files.setdefault(stored.file, []).append(name)
    weights = {}
    for file, names in files.items():
        with safe_open(source.path(file), framework="pt") as opened:
            for name in names:
                weight = opened.get_tensor(name)
                weights[(disk_name("vlm", name) or name).removeprefix("visual.")] = weight.to(dtype or weight.dtype)
    # Assigned, not copied: the tower's buffers (rotary frequencies) stay float32, as from_pretrained leaves them.
    tower.load_state_dict(weights, assign=True)
    tower.eval()
    return next(tower.parameters()).dtype


def _features(tower: nn.Module) -> torch.Tensor:
    """(patches / merge size², width) of random pixels, all of GRIDS in one call."""
    grid = torch.tensor(GRIDS)
    config = tower.config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(int(grid.prod(-1).sum()), width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return tower(pixels.to(next(tower.parameters()).dtype), grid_thw=grid)


def _difference(merged: torch.Tensor, plain: torch.Tensor, what: str) -> tuple[list[str], str]:
    if merged.shape != plain.shape:
        return [f"{what}: shape {list(merged.shape)}, the source's {list(plain.shape)}"], ""
    if torch.equal(merged, plain):
        return [], f"{what} equal bit for bit ({str(merged.dtype).removeprefix('torch.')})"
    largest = plain.float().abs().max().item()
    apart = (merged.float() - plain.float()).abs().max().item()
    allowed = ROUNDING[merged.dtype] * max(largest, 1.0)
    text = f"{what} differ by at most {apart:.3g} (values up to {largest:.3g}, rounding allows {allowed:.3g})"
    return ([], text) if apart <= allowed else ([text], "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars and no notices of transformers between the lines of a verification."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def local_directory(source: Source) -> Path:
    """The directory of a source with all its files in it (a hub source downloads what is missing)."""
    for name in ("config.json", *{stored.file for stored in source.read_tensors().values() if stored}):
        source.path(name)
    return source.directory
