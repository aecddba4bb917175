"""Tiny source checkpoints for tests: real Qwen3 and Qwen2.5-VL architectures, random weights, a byte-level BPE.

Why not fixtures in the repository: real layouts (flat and re-saved configs, both spellings of the tensor names, single
and sharded files, tied and untied heads) are needed in many combinations, and each takes a fraction of a second to
make. Every weight is drawn, the norms and biases too: a test that swaps or drops one then sees a difference.

    vlm = make_vlm(tmp_path / "vlm")
    llm = make_llm(tmp_path / "llm", tied=False)
"""

import json
from pathlib import Path

# Qwen3's added tokens in the order of their ids (151643 ... 151668 in the published tokenizers).
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
BASE_VOCABULARY = 320  # 256 bytes and 64 merges; the added tokens follow, as in Qwen's tokenizers
VOCABULARY = 384  # padded, as Qwen's embeddings are
TOKEN_IDS = {token: BASE_VOCABULARY + i for i, token in enumerate(SPECIAL_TOKENS + PLAIN_ADDED_TOKENS)}

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "What colour is the shape in the picture? The shape in the picture is a red circle, a green square or a blue "
    "triangle. Describe the picture. Read the number in the picture. Answer with one word. Think step by step. "
) * 8

# The LLM: heads * head_dim (128) differs from hidden_size, as in Qwen3-0.6B, 4B and 32B.
LLM_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": TOKEN_IDS["<|endoftext|>"],
    "eos_token_id": TOKEN_IDS["<|im_end|>"],
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 112,
    "max_position_embeddings": 4096,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}

# The VLM's own text model has head_dim 96 / 3 = 32, so its sections fit the tiny LLM's.
VLM_CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": TOKEN_IDS["<|endoftext|>"],
    "eos_token_id": TOKEN_IDS["<|im_end|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
    "vision_token_id": TOKEN_IDS["<|vision_pad|>"],
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 4096,
    "max_window_layers": 2,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 96,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vocab_size": VOCABULARY,
}

PREPROCESSOR_CONFIG = {
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


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_tokenizer(directory: Path) -> Path:
    """Write a byte-level BPE with Qwen's split and all its added tokens, in the files that Qwen publishes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_ADDED_TOKENS])
    assert all(tokenizer.token_to_id(token) == number for token, number in TOKEN_IDS.items())
    tokenizer.save(str(directory / "tokenizer.json"))

    saved = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(directory / "vocab.json", saved["model"]["vocab"])
    merges = (" ".join(merge) if isinstance(merge, list) else merge for merge in saved["model"]["merges"])
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(number): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": token in SPECIAL_TOKENS,
                }
                for token, number in TOKEN_IDS.items()
            },
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            # Not Qwen3's: whoever keeps the source's template instead of the kit's is seen to.
            "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 4096,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    return directory


def make_llm(
    directory: Path, *, tied: bool = True, dtype: str = "bfloat16", seed: int = 1, shards: int = 1, **config
) -> Path:
    """Write a Qwen3 checkpoint. `config` overrides fields of LLM_CONFIG. Returns the directory."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    fields = {**LLM_CONFIG, "tie_word_embeddings": tied, "torch_dtype": dtype, **config}
    make_tokenizer(directory)
    write_json(directory / "config.json", fields)
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": TOKEN_IDS["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
            "pad_token_id": TOKEN_IDS["<|endoftext|>"],
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.51.0",
        },
    )
    weights = random_weights(Qwen3ForCausalLM(Qwen3Config(**fields)), dtype, seed)
    if tied:
        weights.pop("lm_head.weight", None)
    save_weights(directory, weights, shards)
    return directory


def make_vlm(
    directory: Path, *, resaved: bool = False, dtype: str = "bfloat16", seed: int = 2, shards: int = 1, **config
) -> Path:
    """Write a Qwen2.5-VL checkpoint. `config` overrides fields of VLM_CONFIG; `vision_config` is merged into its own.

    resaved=False: as published (flat config, `visual.*` and `model.*`); True: as transformers >= 4.52 saves it
    (nested `text_config`, `model.visual.*` and `model.language_model.*`).
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {**VLM_CONFIG["vision_config"], **config.pop("vision_config", {})}
    fields = {**VLM_CONFIG, "torch_dtype": dtype, **config, "vision_config": vision}
    make_tokenizer(directory)
    write_json(directory / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    # A copy: transformers writes into the dicts that it is given (rope_scaling's type becomes "default").
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(json.dumps(fields))))
    weights = random_weights(model, dtype, seed)
    if resaved:
        model.config.torch_dtype = dtype
        model.config.save_pretrained(directory)
    else:
        write_json(directory / "config.json", fields)
        weights = {
            name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1): weight
            for name, weight in weights.items()
        }
    save_weights(directory, weights, shards)
    return directory


def random_weights(model, dtype: str, seed: int) -> dict:
    """Draw every parameter of `model` (norms near 1, biases near 0) and return its state dict in `dtype`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in sorted(model.state_dict().items()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = (0.0 if name.endswith("bias") else 1.0) + 0.1 * noise
        else:
            value = noise * parameter[0].numel() ** -0.5
        weights[name] = value.to(getattr(torch, dtype))
    return weights


def save_weights(directory: Path, weights: dict, shards: int = 1) -> None:
    """Write `weights` as model.safetensors, or as `shards` files and their index, in the order of the names."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    if shards == 1:
        save_file({name: weights[name] for name in names}, directory / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: weights[name] for name in part}, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(weight.numel() * weight.element_size() for weight in weights.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
