"""DeepStack for grafts in vLLM 0.12: what Qwen3-VL's tower saw on the way is added behind the LLM's first layers.

A picture's tokens leave the projector (1 + levels) x LLM width wide. Their first part stands in the prompt; the levels
wait here until the LLM runs, which has to be the LLM of vLLM's Qwen3-VL: its layers take them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors


def language_model(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Qwen3 or Qwen3-MoE that takes levels."""
    if vllm_config.model_config.hf_config.text_config.model_type == "qwen3_moe":
        from vllm.model_executor.models.qwen3_vl_moe import Qwen3MoeLLMForCausalLM

        return Qwen3MoeLLMForCausalLM(vllm_config=vllm_config, prefix=prefix)
    from vllm.model_executor.models.qwen3_vl import Qwen3LLMForCausalLM

    return Qwen3LLMForCausalLM(vllm_config=vllm_config, prefix=prefix)


class Levels(nn.Module):
    """The levels of the tokens of one step, zero where a text is.

    A buffer: its memory stays where CUDA graphs read it, and an engine that sleeps keeps what is in it.
    """

    values: Tensor

    def __init__(self, vllm_config: VllmConfig, count: int, width: int):
        super().__init__()
        self.width = width
        values = torch.zeros(count, vllm_config.scheduler_config.max_num_batched_tokens, width)
        self.register_buffer("values", values, persistent=False)

    def keep(self, pictures: Sequence[Tensor], places: Tensor) -> list[Tensor]:
        """What stands in the prompt, (tokens, width) for each picture.

        Args:
            pictures: the tokens of each, (tokens, (1 + levels) x width).
            places: which of the step's tokens they are, (all tokens,) of bool.
        """
        levels = torch.cat(list(pictures)).split(self.width, dim=-1)[1:]
        for values, level in zip(self.values, levels, strict=True):
            # Not an assignment by the mask, for which a GPU would wait.
            values[: len(places)].masked_scatter_(places.unsqueeze(-1), level.to(values.dtype))
        return [picture[:, : self.width] for picture in pictures]

    def run(self, decoder: nn.Module, inputs_embeds: Tensor, **inputs) -> Tensor | IntermediateTensors:
        """The decoder's result for the step's tokens, (all tokens, width); what was kept is forgotten."""
        step = self.values[:, : len(inputs_embeds)]
        levels = {f"deepstack_input_embeds_{number}": values for number, values in enumerate(step)}
        result = decoder(inputs_embeds=inputs_embeds, deepstack_input_embeds=IntermediateTensors(levels), **inputs)
        step.zero_()
        return result
