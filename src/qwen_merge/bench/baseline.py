"""The plain way to merge, as the yardstick: load both models, put one together, save it.

    python -m qwen_merge.bench.baseline VLM LLM MERGED_CONFIG_DIRECTORY OUTPUT

Kinder than what it stands for: bfloat16 throughout, weights shared instead of copied, the VLM's text model let go.
"""

import sys


def main(vlm_path: str, llm_path: str, config_path: str, output: str) -> None:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM

    from qwen_merge.architecture.configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeConfig
    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import Qwen2_5_VL_MergeForConditionalGeneration

    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(vlm_path, torch_dtype=torch.bfloat16)
    llm = Qwen3ForCausalLM.from_pretrained(llm_path, torch_dtype=torch.bfloat16)
    config = Qwen2_5_VL_MergeConfig.from_pretrained(config_path)
    with torch.device("meta"):
        merged = Qwen2_5_VL_MergeForConditionalGeneration(config)
    weights = {name: weight for name, weight in vlm.state_dict().items() if name.startswith("model.visual.")}
    weights.update(llm.state_dict())
    del vlm
    hidden, projector = config.text_config.hidden_size, config.vision_config.out_hidden_size
    new_layer = torch.nn.Linear(projector, hidden, dtype=torch.bfloat16)
    torch.nn.init.normal_(new_layer.weight, std=0.02)
    torch.nn.init.zeros_(new_layer.bias)
    weights["visual.merger.mlp.4.weight"], weights["visual.merger.mlp.4.bias"] = new_layer.weight, new_layer.bias
    merged.load_state_dict(weights, assign=True)
    merged.tie_weights()
    merged.save_pretrained(output, max_shard_size="5GB")


if __name__ == "__main__":
    main(*sys.argv[1:])
