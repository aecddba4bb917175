"""How a graft's tokens are numbered, said where vLLM looks for it.

vLLM finds M-RoPE by an `mrope_section` in the LLM's RoPE settings; a graft keeps its own at the top of its
configuration. And vLLM 0.9.1 numbers the tokens of every model by Qwen2.5-VL's rule with the tower's
`spatial_merge_size`, where a graft goes by its projector's `merge_size`; 0.12 asks the model class (`graft.py`).
"""

from collections.abc import Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

from qwen_merge.architecture.configuration_qwen_merge_graft import QwenMergeGraftConfig


class ServedGraftConfig(QwenMergeGraftConfig):
    """A graft's configuration as vLLM reads it: the LLM's RoPE settings have the sections of M-RoPE.

    Not where no token lies on a grid (1d, and a resampler's queries): equal times, heights and widths are a text's
    positions, which vLLM has faster kernels for.

    Raises:
        ValueError: M-RoPE for an LLM whose context is stretched, which vLLM 0.9.1 knows no rotary embedding for.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.positions != "mrope" or self.projector_config["kind"] == "resampler":
            return
        settings = {"rope_type": "default", **(getattr(self.text_config, "rope_scaling", None) or {})}
        if settings["rope_type"] != "default":
            raise ValueError(
                f"this graft has positions mrope and an LLM with rope_scaling of type {settings['rope_type']!r}; vLLM "
                "serves the two together for none. Take the LLM without it, or make the graft with positions: 1d."
            )
        self.text_config.rope_scaling = {**settings, "mrope_section": list(self.mrope_section or ())}


def number(config, tokens: Sequence[int], grids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, int]:
    """Positions (3, tokens) of a prompt, and what is added to a token's number behind it.

    grids: (frames, rows, columns) in patches of the prompt's pictures.
    """
    from qwen_merge.architecture.modeling_qwen_merge_graft import QwenMergeGraftModel

    of_config: Any = SimpleNamespace(config=config)  # all that it reads of a model
    pictures = torch.tensor(grids) if len(grids) else None
    positions, deltas = QwenMergeGraftModel.get_rope_index(of_config, torch.tensor([list(tokens)]), pictures)
    return positions[:, 0], int(deltas)


def hook() -> None:
    """Make vLLM read a graft's configuration as above and, in 0.9.1, number its tokens so; safe to call again."""
    from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    _CONFIG_REGISTRY[ServedGraftConfig.model_type] = ServedGraftConfig
    original = getattr(MRotaryEmbedding, "get_input_positions_tensor", None)  # gone in vLLM 0.12
    if original is None or getattr(original, "knows_grafts", False):
        return

    @wraps(original)
    def numbered(cls, input_tokens, hf_config, image_grid_thw, *args, context_len=0, seq_len=None, **kwargs):
        if hf_config.model_type != ServedGraftConfig.model_type:
            kwargs.update(context_len=context_len, seq_len=seq_len)
            return original(input_tokens, hf_config, image_grid_thw, *args, **kwargs)
        positions, delta = number(hf_config, input_tokens, image_grid_thw)
        return positions[:, context_len:seq_len], delta

    numbered.__dict__["knows_grafts"] = True
    MRotaryEmbedding.get_input_positions_tensor = classmethod(numbered)
