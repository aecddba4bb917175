"""The whole merge before a byte is moved: every tensor of the result with its source, every source tensor's fate.

`merge_plan` needs no weights, only configurations and headers, so a 32B + 72B merge can be planned and tested on any
machine. It fails on the first thing that would make a wrong checkpoint and names all the tensors concerned.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from qwen_merge.errors import UserError
from qwen_merge.merger.configuration import AS_THE_VLM, RopeOptions, merged_config
from qwen_merge.merger.key_map import DROPS, conditions, disk_name, layout
from qwen_merge.merger.safetensors_file import ITEM_BYTES, StoredTensor

# dtype names: safetensors' by the library's. These are what weights may be stored and written in.
FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
READABLE = {**FLOATS, "float64": "F64"}
ROLES = {"vlm": "VLM", "llm": "LLM"}
LISTED = 1000  # so many layers may be missing and are told by the names of their tensors
SHOWN = 10  # problems of one kind that are spelled out


@dataclass(frozen=True)
class NewRows:
    """Rows of a copied matrix that are drawn instead: about the mean of its first `known` rows.

    numbers: which, in order. copied: how many the source has; those behind them make the result longer.
    """

    numbers: tuple[int, ...]
    known: int
    copied: int


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result. `stored` is None for what is initialised.

    stream: which of the seed's streams of random numbers it is drawn from; None: it is all ones. rows: what of a copied
    one is drawn.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: str  # "vlm", "llm" or "new"
    source_name: str | None = None
    stored: StoredTensor | None = None
    stream: int | None = 0
    rows: NewRows | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass
class MergePlan:
    """config: the merged config.json. dropped: for each source, how many tensors for which reason."""

    config: dict
    tensors: list[PlannedTensor]
    dropped: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def of(self, origin: str) -> list[PlannedTensor]:
        return [tensor for tensor in self.tensors if tensor.origin == origin]


def merge_plan(
    vlm_config: dict,
    vlm_tensors: Mapping[str, StoredTensor | None],
    llm_config: dict,
    llm_tensors: Mapping[str, StoredTensor],
    *,
    token_ids: Mapping[str, int] | None = None,
    rope: RopeOptions = AS_THE_VLM,
    dtype: str | None = None,
) -> MergePlan:
    """Plan a merge from two configurations and what the checkpoints' headers say.

    vlm_tensors, llm_tensors: source name -> where it lies. None for a VLM tensor in a file that was not opened
    because its index names nothing of the vision tower in it. dtype: "bfloat16", "float16", "float32" to convert
    everything, None to keep each source's.

    Raises:
        UserError: the sources do not fit; the message names every tensor, or field, with what was expected.
    """
    fates = _Fates()
    vision = fates.candidates("vlm", vlm_tensors, frozenset())
    merged = merged_config(
        vlm_config,
        llm_config,
        {name: stored for name, (_, stored) in vision.items() if stored is not None},
        token_ids,
        rope,
    )
    problems = layer_problems(merged.config, len(vision), len(llm_tensors))
    if problems:
        raise UserError.from_list("the tensors of these checkpoints do not fit:", problems)
    candidates = {"vlm": vision, "llm": fates.candidates("llm", llm_tensors, conditions(merged.config))}
    tensors = fates.planned(merged.config, candidates, FLOATS[dtype] if dtype else None)
    if fates.problems:
        raise UserError.from_list("the tensors of these checkpoints do not fit:", fates.problems)

    plan = MergePlan(merged.config, tensors, {role: dict(count) for role, count in fates.dropped.items()}, merged.notes)
    settle_dtype(plan)
    return plan


def layer_problems(config: dict, vision_tensors: int, text_tensors: int) -> list[str]:
    """Layers that cannot be there: more than there are tensors. Whoever lists their names asks this first."""
    counts = (
        ("vision_config's depth", config["vision_config"]["depth"], vision_tensors),
        ("num_hidden_layers", config["num_hidden_layers"], text_tensors),
    )
    return [
        f"{name} is {count}, but there are only {tensors} tensors"
        for name, count, tensors in counts
        if count > max(tensors, LISTED)
    ]


class _Fates:
    """Collects what becomes of each source tensor, and everything that is wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.dropped: dict[str, Counter[str]] = {"vlm": Counter(), "llm": Counter()}

    def candidates(
        self, role: str, tensors: Mapping[str, StoredTensor | None], held: frozenset[str]
    ) -> dict[str, tuple[str, StoredTensor | None]]:
        """Name on the disk -> (source name, stored); drops are counted, what nothing covers is a problem."""
        found: dict[str, tuple[str, StoredTensor | None]] = {}
        for name, stored in tensors.items():
            drop = next(
                (d for d in DROPS if d.origin == role and name.startswith(d.prefix) and (not d.when or d.when in held)),
                None,
            )
            target = disk_name(role, name)
            if drop:
                self.dropped[role][drop.reason] += 1
            elif target is None:
                self.problem(f"{ROLES[role]}: unknown tensor {name}; the key map (key_map.py) has no place for it")
            elif target in found:
                self.problem(f"{ROLES[role]}: {found[target][0]} and {name} are the same tensor, {target}")
            else:
                found[target] = (name, stored)
        return found

    def planned(
        self, config: dict, candidates: dict[str, dict[str, tuple[str, StoredTensor | None]]], dtype: str | None
    ) -> list[PlannedTensor]:
        """The result's tensors: each source's in the order of its files and bytes, the new ones last."""
        tensors: dict[str, list[PlannedTensor]] = {"vlm": [], "new": [], "llm": []}
        for row, name, shape in layout(config):
            if row.origin == "new":
                tensors["new"].append(PlannedTensor(name, "", shape, "new"))
                continue
            source_name, stored = candidates[row.origin].pop(name, (None, None))
            if stored is None:
                hint = " (tie_word_embeddings is false, so the head must be there)" if row.when == "untied" else ""
                self.problem(f"{ROLES[row.origin]}: missing tensor {name}, expected shape {list(shape)}{hint}")
            elif stored.shape != shape:
                self.problem(
                    f"{ROLES[row.origin]}: tensor {source_name} has shape {list(stored.shape)}, expected {list(shape)} "
                    "from config.json"
                )
            elif stored.dtype not in READABLE.values():
                self.problem(
                    f"{ROLES[row.origin]}: tensor {source_name} has dtype {stored.dtype}, expected one of "
                    f"{', '.join(READABLE.values())}; take an unquantised checkpoint"
                )
            else:
                tensors[row.origin].append(
                    PlannedTensor(name, dtype or stored.dtype, shape, row.origin, source_name, stored)
                )
        for role, left in candidates.items():
            for source_name, _ in left.values():
                self.problem(f"{ROLES[role]}: unknown tensor {source_name}; config.json describes no such tensor")
        for role in ("vlm", "llm"):
            tensors[role].sort(key=_position)
        new_dtype = tensors["vlm"][0].dtype if tensors["vlm"] else dtype or "BF16"
        new = [PlannedTensor(tensor.name, new_dtype, tensor.shape, "new") for tensor in tensors["new"]]
        return tensors["vlm"] + tensors["llm"] + new

    def problem(self, text: str) -> None:
        if len(self.problems) < SHOWN:
            self.problems.append(text)
        elif len(self.problems) == SHOWN:
            self.problems.append("... and more of this kind")


def _position(tensor: PlannedTensor) -> tuple[str, int]:
    assert tensor.stored is not None
    return tensor.stored.file, tensor.stored.start


def settle_dtype(plan: MergePlan) -> None:
    """`torch_dtype` is what most of the bytes are written in: the text tower's. Say so when the sources differ."""
    names = {stored: library for library, stored in READABLE.items()}
    nbytes: Counter[str] = Counter()
    for tensor in plan.of("llm"):
        nbytes[tensor.dtype] += tensor.nbytes
    main = nbytes.most_common(1)[0][0]
    plan.config["torch_dtype"] = names[main]
    others = sorted({tensor.dtype for tensor in plan.tensors} - {main})
    if others:
        plan.notes.append(
            f"the sources' dtypes differ ({main} and {', '.join(others)}) and are kept; config.json says "
            f"{names[main]}, which is what a loader will make of all of them. --dtype writes one dtype"
        )
