"""Which samples share a row (packing), and which rows share a step. Arithmetic on lengths only.

Put here by `qwen-merge overlay apply llamafactory`; used by `qwen_merge_packing`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


# Rows of like cost meet in one step. They are looked for among this many steps, not in the whole epoch, so that a step
# stays a mixture of what the data are.
STEPS_TO_MATCH = 64


@dataclass(frozen=True)
class Plan:
    r"""Packs in the order in which steps take them: step s of an epoch takes `group` of them, one after the other.

    members: numbers of samples, pack by pack. offsets: where each pack begins in it, and the end (packs + 1).
    """

    members: np.ndarray
    offsets: np.ndarray
    group: int
    capacity: int
    tokens: int
    patch_cost: float

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, number: int) -> np.ndarray:
        return self.members[self.offsets[number] : self.offsets[number + 1]]

    @property
    def fill(self) -> float:
        r"""Share of all places that hold a token."""
        return self.tokens / (len(self) * self.capacity)


def best_fit(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    r"""Numbers of samples for each pack. Longest first, each into the fullest pack that still has room for it.

    Samples of one length take their turns in random order. Raises ValueError for a length over the capacity.
    """
    if len(lengths) and (lengths.max() > capacity or lengths.min() < 1):
        raise ValueError(f"lengths of 1 to {capacity} tokens are needed, got {lengths.min()} to {lengths.max()}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by what is left in them
    rooms = 0  # bit n: some pack has exactly n tokens left
    for number, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit that is set
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            pack, room = len(packs), capacity
            packs.append([])
        packs[pack].append(number)
        left = room - length
        if left:
            with_room[left].append(pack)
            rooms |= 1 << left
    return packs


def divided(packs: list[list[int]], group: int) -> list[list[int]]:
    r"""The packs, those with the most samples halved until their number is a multiple of `group`.

    Otherwise a launch would show the first packs once more to the ranks that have none left in the last step.
    """
    packs = sorted(packs, key=len)
    while len(packs) % group and len(packs[-1]) > 1:
        largest = packs.pop()
        packs = [*packs, largest[::2], largest[1::2]]
        packs.sort(key=len)
    return packs


def patch_cost(
    config, vision_trains: bool, projector_trains: bool, llm_trains: bool, llm_adapts: bool = False
) -> float:
    r"""Work of one patch in the vision tower and the projector, in tokens of the LLM, by the weights each goes through.

    config: a Qwen2_5_VL_MergeConfig or QwenMergeGraftConfig. What trains costs three forwards; what is frozen costs one, and two where it
    passes a gradient on: the LLM to the projector, and to its own adapters (`llm_adapts`), whose work is left out as
    attention's own products are.
    """
    graft = getattr(config, "projector_config", None)
    tower, projector = _qwen_merge_weights(config) if graft is None else _graft_weights(config, graft)
    head_width = getattr(config.text_config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads + config.num_key_value_heads) * head_width
    llm = config.num_hidden_layers * config.hidden_size * (2 * heads + 3 * config.intermediate_size)
    before = (3 if vision_trains else 1) * tower + (3 if projector_trains else 2 if vision_trains else 1) * projector
    return before / ((3 if llm_trains else 2 if vision_trains or projector_trains or llm_adapts else 1) * llm)


def _qwen_merge_weights(config) -> tuple[float, float]:
    vision, width = config.vision_config, config.vision_config.hidden_size
    tower = vision.depth * width * (4 * width + 3 * vision.intermediate_size)
    unit = vision.spatial_merge_size**2
    hidden, out = unit * width, vision.out_hidden_size
    return tower, (hidden * hidden + hidden * out + out * vision.out_hidden_size2) / unit


def _graft_weights(config, projector: dict) -> tuple[float, float]:
    r"""Weights of the tower and of the projector that a patch goes through; a resampler's queries are left out."""
    vision, width, out = config.vision_config, config.vision_width, config.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(vision.mlp_ratio * width)
    gates = 3 if vision.model_type == "qwen2_5_vl" else 2
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    unit = config.merge_size**2
    hidden = unit * width
    kind = projector["kind"]
    if kind == "mlp":
        between = projector.get("hidden_size") or out
        weights = (hidden * between + between * out) / unit
    elif kind == "resampler":
        weights = width * out + 2 * out * out
    elif kind == "linear":
        weights = width * out
    else:
        first = projector.get("out_hidden_size", out)
        weights = (hidden * hidden + hidden * first + (first * out if kind == "extended" else 0)) / unit
    return layers * width * (4 * width + gates * inner), weights


def make_plan(
    lengths: np.ndarray, patches: np.ndarray, capacity: int, group: int, seed: int, patch_cost: float
) -> Plan:
    r"""A plan of one epoch over samples of `lengths` tokens and `patches` vision patches each.

    group: ranks times packs a rank takes in a step. Within a step the packs cost nearly the same; a patch costs
    `patch_cost` tokens.
    """
    rng = np.random.default_rng(seed)
    packs = divided(best_fit(lengths, capacity, seed), group)
    packs = [packs[number] for number in rng.permutation(len(packs))]
    cost = np.array([(lengths[pack] + patch_cost * patches[pack]).sum() for pack in packs])
    groups: list[np.ndarray] = []
    window = STEPS_TO_MATCH * group
    for first in range(0, len(packs), window):
        matched = first + np.argsort(cost[first : first + window], kind="stable")
        groups += [matched[i : i + group] for i in range(0, len(matched), group)]
    last = groups.pop() if groups and len(groups[-1]) < group else None  # what could not be divided stays at the end
    order = [number for i in rng.permutation(len(groups)) for number in rng.permutation(groups[i])]
    order += [] if last is None else last.tolist()
    ordered = [packs[number] for number in order]
    offsets = np.cumsum([0, *map(len, ordered)])
    members = np.concatenate([*ordered, []]).astype(np.int64)
    return Plan(members, offsets, group, capacity, int(lengths[members].sum()), patch_cost)


class PlanSampler(Sampler[int]):
    r"""Numbers of packs for one epoch: the plan's steps, from the second epoch on in another order.

    One serves one training from its first epoch on, or from where it is resumed.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.seed, self.epoch = plan, seed, 0

    def set_epoch(self, epoch: int) -> None:
        r"""Never goes back: Accelerate's loader for the rest of an epoch counts from 0, behind Trainer's own call."""
        self.epoch = max(self.epoch, epoch)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[int]:
        steps, rest = divmod(len(self.plan), self.plan.group)
        order = np.arange(steps)
        if self.epoch:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(steps)
        numbers = (order[:, None] * self.plan.group + np.arange(self.plan.group)).ravel()
        return iter([*numbers.tolist(), *range(len(self.plan) - rest, len(self.plan))])
