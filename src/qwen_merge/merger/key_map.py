"""Where every tensor goes, as data: the rows of the merged checkpoint, and what is left behind and why.

A row names a tensor of the merged checkpoint by its name on the disk, its shape in named dimensions and its origin.
`{layer}` and `{block}` run over the text layers and the ViT blocks. A name that no row and no drop covers is an error
for whoever plans a merge (plan.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One tensor, or one per layer. `when` names a condition of `conditions()`; empty: always there."""

    origin: str  # "vlm", "llm" or "new"
    name: str
    shape: tuple[str, ...]
    when: str = ""


@dataclass(frozen=True)
class Drop:
    """Source tensors that are left behind on purpose: those whose name starts with `prefix`."""

    origin: str
    prefix: str
    reason: str
    when: str = ""


ROWS = (
    # Vision tower: Qwen2.5-VL's ViT.
    Row("vlm", "visual.patch_embed.proj.weight", ("vit", "channels", "frames", "patch", "patch")),
    Row("vlm", "visual.blocks.{block}.norm1.weight", ("vit",)),
    Row("vlm", "visual.blocks.{block}.norm2.weight", ("vit",)),
    Row("vlm", "visual.blocks.{block}.attn.qkv.weight", ("3vit", "vit")),
    Row("vlm", "visual.blocks.{block}.attn.qkv.bias", ("3vit",)),
    Row("vlm", "visual.blocks.{block}.attn.proj.weight", ("vit", "vit")),
    Row("vlm", "visual.blocks.{block}.attn.proj.bias", ("vit",)),
    Row("vlm", "visual.blocks.{block}.mlp.gate_proj.weight", ("vit_mlp", "vit")),
    Row("vlm", "visual.blocks.{block}.mlp.gate_proj.bias", ("vit_mlp",)),
    Row("vlm", "visual.blocks.{block}.mlp.up_proj.weight", ("vit_mlp", "vit")),
    Row("vlm", "visual.blocks.{block}.mlp.up_proj.bias", ("vit_mlp",)),
    Row("vlm", "visual.blocks.{block}.mlp.down_proj.weight", ("vit", "vit_mlp")),
    Row("vlm", "visual.blocks.{block}.mlp.down_proj.bias", ("vit",)),
    # Projector: Qwen2.5-VL's patch merger, then GELU (no weights) and one new Linear.
    Row("vlm", "visual.merger.ln_q.weight", ("vit",)),
    Row("vlm", "visual.merger.mlp.0.weight", ("merged_patch", "merged_patch")),
    Row("vlm", "visual.merger.mlp.0.bias", ("merged_patch",)),
    Row("vlm", "visual.merger.mlp.2.weight", ("projector", "merged_patch")),
    Row("vlm", "visual.merger.mlp.2.bias", ("projector",)),
    Row("new", "visual.merger.mlp.4.weight", ("hidden", "projector")),
    Row("new", "visual.merger.mlp.4.bias", ("hidden",)),
    # Text tower: Qwen3.
    Row("llm", "model.embed_tokens.weight", ("vocabulary", "hidden")),
    Row("llm", "model.layers.{layer}.input_layernorm.weight", ("hidden",)),
    Row("llm", "model.layers.{layer}.self_attn.q_proj.weight", ("q", "hidden")),
    Row("llm", "model.layers.{layer}.self_attn.q_proj.bias", ("q",), when="attention_bias"),
    Row("llm", "model.layers.{layer}.self_attn.k_proj.weight", ("kv", "hidden")),
    Row("llm", "model.layers.{layer}.self_attn.k_proj.bias", ("kv",), when="attention_bias"),
    Row("llm", "model.layers.{layer}.self_attn.v_proj.weight", ("kv", "hidden")),
    Row("llm", "model.layers.{layer}.self_attn.v_proj.bias", ("kv",), when="attention_bias"),
    Row("llm", "model.layers.{layer}.self_attn.o_proj.weight", ("hidden", "q")),
    Row("llm", "model.layers.{layer}.self_attn.o_proj.bias", ("hidden",), when="attention_bias"),
    Row("llm", "model.layers.{layer}.self_attn.q_norm.weight", ("head_dim",)),
    Row("llm", "model.layers.{layer}.self_attn.k_norm.weight", ("head_dim",)),
    Row("llm", "model.layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
    Row("llm", "model.layers.{layer}.mlp.gate_proj.weight", ("mlp", "hidden")),
    Row("llm", "model.layers.{layer}.mlp.up_proj.weight", ("mlp", "hidden")),
    Row("llm", "model.layers.{layer}.mlp.down_proj.weight", ("hidden", "mlp")),
    Row("llm", "model.norm.weight", ("hidden",)),
    Row("llm", "lm_head.weight", ("vocabulary", "hidden"), when="untied"),
)

# Spellings of a source name, and the name on the disk it stands for. transformers >= 4.52 saves `model.visual.*`.
SPELLINGS = {
    "vlm": (("model.visual.", "visual."), ("visual.", "visual.")),
    "llm": (("model.", "model."), ("lm_head.", "lm_head.")),
}

DROPS = (
    Drop("vlm", "model.embed_tokens.", "the VLM's own text model"),
    Drop("vlm", "model.layers.", "the VLM's own text model"),
    Drop("vlm", "model.norm.", "the VLM's own text model"),
    Drop("vlm", "model.language_model.", "the VLM's own text model"),
    Drop("vlm", "lm_head.", "the VLM's own text model"),
    Drop("llm", "lm_head.weight", "the head is tied to the embeddings", when="tied"),
)


def is_vision(name: str) -> bool:
    """Whether a tensor of the VLM is wanted, by its name alone: what decides which of its files are read."""
    return any(name.startswith(spelling) for spelling, _ in SPELLINGS["vlm"])


def disk_name(origin: str, name: str) -> str | None:
    """The merged checkpoint's name for a source tensor; None when no spelling fits."""
    for spelling, prefix in SPELLINGS[origin]:
        if name.startswith(spelling):
            return prefix + name[len(spelling) :]
    return None


def conditions(config: dict) -> frozenset[str]:
    """The conditions that hold for a merged configuration."""
    held = {"tied" if config["tie_word_embeddings"] else "untied"}
    if config["attention_bias"]:
        held.add("attention_bias")
    return frozenset(held)


def dimensions(config: dict) -> dict[str, int]:
    """The named dimensions of a merged configuration."""
    vision = config["vision_config"]
    return {
        "vit": vision["hidden_size"],
        "3vit": 3 * vision["hidden_size"],
        "vit_mlp": vision["intermediate_size"],
        "channels": vision["in_channels"],
        "frames": vision["temporal_patch_size"],
        "patch": vision["patch_size"],
        "merged_patch": vision["hidden_size"] * vision["spatial_merge_size"] ** 2,
        "projector": vision["out_hidden_size"],
        "hidden": config["hidden_size"],
        "vocabulary": config["vocab_size"],
        "head_dim": config["head_dim"],
        "q": config["num_attention_heads"] * config["head_dim"],
        "kv": config["num_key_value_heads"] * config["head_dim"],
        "mlp": config["intermediate_size"],
    }


def layout(config: dict) -> Iterator[tuple[Row, str, tuple[int, ...]]]:
    """Every tensor of a merged checkpoint: (row, name on the disk, shape)."""
    sizes, held = dimensions(config), conditions(config)
    counts = {"{block}": config["vision_config"]["depth"], "{layer}": config["num_hidden_layers"]}
    for row in ROWS:
        if row.when and row.when not in held:
            continue
        shape = tuple(sizes[dimension] for dimension in row.shape)
        placeholder = next((key for key in counts if key in row.name), None)
        for number in range(counts[placeholder] if placeholder else 1):
            yield row, row.name.replace(placeholder, str(number)) if placeholder else row.name, shape


def parameter_count(config: dict) -> int:
    """Parameters of a merged model with this configuration."""
    return sum(math.prod(shape) for _, _, shape in layout(config))
