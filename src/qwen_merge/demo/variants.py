"""What `qwen-merge demo --ablate NAME` compares, as data: variants of one graft, and the budget that all of them get.

A variant is a graft (`graft.yaml`, without its sources) and what its second stage changes in the demo's recipe.
Variants with the same graft share its first stage, in which the projector alone learns to caption. Imports nothing
heavy.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Graft:
    """projector, positions: as in `graft.yaml`. pixels: that every picture is brought to; None leaves it as it is."""

    name: str
    projector: Mapping[str, Any]
    positions: str = "mrope"
    pixels: int | None = None


@dataclass(frozen=True)
class Variant:
    """changes: of the second stage's recipe, `key: value`; None: nothing is trained at all."""

    name: str
    graft: Graft
    changes: Mapping[str, Any] | None = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """steps: of the two stages. seeds: how often each variant is made and trained. rows: of the two data sets.

    asked: held-out questions on each topic.
    """

    steps: tuple[int, int] = (150, 250)
    seeds: int = 2
    rows: tuple[int, int] = (2400, 3200)
    asked: Mapping[str, int] = field(default_factory=lambda: {"colour": 200, "shape": 200, "number": 200})


QWEN_MERGE = Graft("extended", {"kind": "extended"})  # in the form of step 1
MERGER = {"kind": "patch_merger"}  # fresh, in the form of any graft: the same first weights whatever else differs
_LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_target": "all"}


def _projectors() -> list[Variant]:
    kinds: list[dict[str, Any]] = [
        {"kind": "extended"},
        {"kind": "patch_merger"},
        {"kind": "linear"},
        {"kind": "mlp", "merge_size": 2},
        {"kind": "resampler", "queries": 9, "heads": 4},  # as many tokens as the others have
        {"kind": "own"},  # made for the LLM of the tower's VLM, which is narrower: refused
    ]
    return [Variant(kind["kind"], Graft(kind["kind"], kind)) for kind in kinds]


def _freezing() -> list[Variant]:
    everything = {"freeze_vision_tower": "false"}
    changes: dict[str, dict[str, Any]] = {
        "projector": {"freeze_language_model": "true"},
        "projector+LoRA": dict(_LORA),
        "projector+LLM": {},
        "everything": everything,
        "everything-tower-slow": {**everything, "vision_learning_rate": "0.0001"},  # a tenth of the others' rate
    }
    return [Variant(name, QWEN_MERGE, change) for name, change in changes.items()]


def _resolutions() -> list[Variant]:
    return [Variant(f"{side}x{side}", Graft(f"{side}x{side}", MERGER, pixels=side**2)) for side in (56, 84, 112)]


def _positions() -> list[Variant]:
    return [Variant(name, Graft(name, MERGER, positions=name)) for name in ("mrope", "mrope-2d", "1d")]


ABLATIONS: dict[str, tuple[str, list[Variant]]] = {
    "projector": ("which projector joins tower and LLM", _projectors()),
    "freeze": ("what trains in the second stage", _freezing()),
    "resolution": ("how large the tower sees the pictures", _resolutions()),
    "positions": ("how the tokens of a picture are numbered", _positions()),
}
UNTRAINED = "untrained"


def with_control(variants: list[Variant]) -> list[Variant]:
    """And the first one's graft before any training, which can only guess."""
    return [*variants, Variant(UNTRAINED, variants[0].graft, None)]


@dataclass(frozen=True)
class Plan:
    """All that a trial needs to know. vlm, llm: checkpoints of the parents; data: folder of the data sets."""

    ablation: str
    variants: list[Variant]
    budget: Budget
    seed: int
    vlm: str
    llm: str
    data: str

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.budget.seeds)

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def load(text: str) -> "Plan":
        values = json.loads(text)
        budget = values.pop("budget")
        budget = Budget(tuple(budget["steps"]), budget["seeds"], tuple(budget["rows"]), budget["asked"])
        variants = [Variant(row["name"], Graft(**row["graft"]), row["changes"]) for row in values.pop("variants")]
        return Plan(**values, variants=variants, budget=budget)


def result_file(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / f"seed{seed}" / f"{variant.name}.json"
