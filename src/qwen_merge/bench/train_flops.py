"""Floating-point operations of one training step, counted as the literature does: work that has to be done, once.

A multiplication and an addition per parameter and token in the forward (2N); as much again to pass the gradient on (4N,
a frozen part behind a trained one); as much again for the gradient of the weights (6N, a trained part). A frozen part
that nothing trained stands before does the forward alone (2N). The output head is counted on labelled positions only,
attention apart, and nothing that is computed a second time (activation checkpointing) counts.
"""

from dataclasses import dataclass

# Dense bfloat16, from NVIDIA's data sheets (SXM).
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass
class Counts:
    """What was in the batches: `tokens` without padding, `places` with it; `squares`: sums of squared lengths."""

    samples: int = 0
    tokens: int = 0
    places: int = 0
    labelled: int = 0
    patches: int = 0
    squares: int = 0
    window_squares: int = 0
    frame_squares: int = 0

    def __iadd__(self, other: "Counts") -> "Counts":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass(frozen=True)
class Sizes:
    """Parameters of each part without embeddings, whether each trains, and what attention's cost depends on."""

    vision: int
    projector: int
    llm: int
    head: int
    vision_trains: bool
    projector_trains: bool
    llm_trains: bool
    merge: int  # patches a token
    layers: int
    attention_width: int  # heads x head_dim
    vision_width: int
    window_layers: int
    frame_layers: int

    @classmethod
    def of(cls, model) -> "Sizes":
        tower, text, config = model.model.visual, model.model.language_model, model.config

        def count(*modules) -> int:
            return sum(numel(parameter) for module in modules for parameter in module.parameters())

        def trains(module) -> bool:
            return any(parameter.requires_grad for parameter in module.parameters())

        frames = len(tower.fullatt_block_indexes)
        return cls(
            vision=count(tower.patch_embed, tower.blocks),
            projector=count(tower.merger),
            llm=count(text.layers),
            head=numel(model.lm_head.weight),
            vision_trains=trains(tower.blocks),
            projector_trains=trains(tower.merger),
            llm_trains=trains(text.layers),
            merge=tower.spatial_merge_unit,
            layers=config.num_hidden_layers,
            attention_width=config.num_attention_heads * config.head_dim,
            vision_width=config.vision_config.hidden_size,
            window_layers=len(tower.blocks) - frames,
            frame_layers=frames,
        )


def numel(parameter) -> int:
    """As a whole: under ZeRO-3 a rank holds an empty shell."""
    return getattr(parameter, "ds_numel", parameter.numel())


def factors(sizes: Sizes) -> dict[str, int]:
    """Operations a parameter and token of each part: 2, 4 or 6."""
    before = sizes.vision_trains or sizes.projector_trains  # something in front of the LLM waits for a gradient
    return {
        "vision": 6 if sizes.vision_trains else 2,
        "projector": 6 if sizes.projector_trains else 4 if sizes.vision_trains else 2,
        "llm": 6 if sizes.llm_trains else 4 if before else 2,
        "head": 6 if sizes.llm_trains else 4,
    }


def matrix_flops(sizes: Sizes, counts: Counts) -> float:
    """Of all weights."""
    times = factors(sizes)
    return float(
        times["vision"] * sizes.vision * counts.patches
        + times["projector"] * sizes.projector * counts.patches / sizes.merge
        + times["llm"] * sizes.llm * counts.tokens
        + times["head"] * sizes.head * counts.labelled
    )


def formula(sizes: Sizes, counts: Counts) -> str:
    """What `matrix_flops` adds up, with its numbers."""
    times = factors(sizes)
    parts = (
        ("vision", sizes.vision, "patches", counts.patches),
        ("projector", sizes.projector, f"patches / {sizes.merge}", counts.patches / sizes.merge),
        ("llm", sizes.llm, "tokens", counts.tokens),
        ("head", sizes.head, "labelled positions", counts.labelled),
    )
    return " + ".join(
        f"{times[name]}N x {number:,.0f} {unit} ({name}, N = {size / 1e6:,.4g} million)"
        for name, size, unit, number in parts
    )


def attention_flops(sizes: Sizes, counts: Counts) -> float:
    """Of the products between tokens: two of them, half behind the causal mask; with a backward three times that."""
    text = 2 * sizes.layers * sizes.attention_width * counts.squares
    tower = sizes.window_layers * counts.window_squares + sizes.frame_layers * counts.frame_squares
    vision = 4 * sizes.vision_width * tower
    before = sizes.llm_trains or sizes.vision_trains or sizes.projector_trains
    return float(text * (3 if before else 1) + vision * (3 if sizes.vision_trains else 1))
