"""How a graft's tokens are numbered, said where vLLM looks for it.

vLLM finds M-RoPE by an `mrope_section` in the LLM's RoPE settings; a graft keeps its own at the top of its
configuration. And vLLM 0.9.1 numbers the tokens of every model by Qwen2.5-VL's rule with the tower's
`spatial_merge_size`, where a graft goes by its projector's `merge_size`; 0.12 asks the model class (`graft.py`).
"""

import inspect
from collections.abc import Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from qwen_merge.architecture.configuration_qwen_merge_graft import QwenMergeGraftConfig


class ServedGraftConfig(QwenMergeGraftConfig):
    """A graft's configuration as vLLM reads it: the LLM's RoPE settings have the sections of M-RoPE.

    Not where no token lies on a grid (1d, and a resampler's queries): equal times, heights and widths are a text's
    positions, which vLLM has faster kernels for.

    Raises:
        ValueError: M-RoPE for an LLM whose context is stretched, which vLLM 0.9.1 knows no rotary embedding for; or
            DeepStack before an LLM that is no Qwen3.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.deepstack and self.text_config.model_type not in ("qwen3", "qwen3_moe"):
            raise ValueError(
                f"this graft has DeepStack and an LLM of type {self.text_config.model_type}; vLLM has it for Qwen3 and "
                "Qwen3-MoE. Make the graft with vision.deepstack: false, or with one of these LLMs."
            )
        if self.positions != "mrope" or self.projector_config["kind"] == "resampler":
            return
        settings = {"rope_type": "default", **(getattr(self.text_config, "rope_scaling", None) or {})}
        if settings["rope_type"] != "default":
            raise ValueError(
                f"this graft has positions mrope and an LLM with rope_scaling of type {settings['rope_type']!r}; vLLM "
                "serves the two together for none. Take the LLM without it, or make the graft with positions: 1d."
            )
        turns = {"mrope_interleaved": True} if self.mrope_interleaved else {}
        self.text_config.rope_scaling = {**settings, "mrope_section": list(self.mrope_section or ()), **turns}


def interleave(language_model: nn.Module) -> None:
    """Teach vLLM's LLM the turns of Qwen3-VL's interleaved sections where it does not know or cannot compile them.

    vLLM 0.9.1 has none. 0.12 knows them by `mrope_interleaved`, but for CPUs PyTorch 2.9 does not compile its slices
    with a step, which are indices here.
    """
    from vllm.model_executor.layers import rotary_embedding
    from vllm.platforms import current_platform

    embedding: Any = rotary_embedding.MRotaryEmbedding
    known = "mrope_interleaved" in inspect.signature(embedding.__init__).parameters
    if known and not current_platform.is_cpu():
        return
    try:
        from vllm.model_executor.layers.rotary_embedding.common import apply_rotary_emb_torch as turned
    except ImportError:  # vLLM 0.9.1
        turned = rotary_embedding._apply_rotary_emb

    class InterleavedMRotaryEmbedding(embedding):
        def forward(self, positions, query, key=None, *_):
            """(tokens,) or (3, tokens) positions -> query and key, turned."""
            cos, sin = self.cos_sin_cache[positions].chunk(2, dim=-1)
            if positions.ndim == 2:
                cos, sin = (values[self.axes, :, self.places].T for values in (cos, sin))
            heads = (x.view(positions.shape[-1], -1, self.head_size) for x in (query, key))
            query_rot, key_rot = (turned(x, cos, sin, self.is_neox_style) for x in heads)
            return query_rot.reshape(query.shape), key_rot.reshape(key.shape)

    for module in language_model.modules():
        if type(module) is embedding:
            half, device = module.rotary_dim // 2, module.cos_sin_cache.device
            axes = [place % 3 if place < 3 * module.mrope_section[place % 3] else 0 for place in range(half)]
            module.register_buffer("axes", torch.tensor(axes, device=device), persistent=False)
            module.register_buffer("places", torch.arange(half, device=device), persistent=False)
            module.__class__ = InterleavedMRotaryEmbedding


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
