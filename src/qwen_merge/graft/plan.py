"""From a recipe and the sources' configurations and headers to every tensor of the result. No weights are read.

Which tensors a graft has is asked of its own class on PyTorch's meta device; where each comes from follows from
`towers.TOWERS` and the LLM's own names. Pairs that cannot work are refused here, all at once.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qwen_merge.architecture.kinds_qwen_merge_graft import OF_THE_SOURCE
from qwen_merge.errors import UserError
from qwen_merge.graft import llms
from qwen_merge.graft.llms import NOT_CARRIED, Found, of_the_llm, text_fields
from qwen_merge.graft.recipe import Recipe, Tokens, Vision, pixels
from qwen_merge.graft.towers import OWN, TOWERS, Tower, deepstack_note, mergers_of, of_the_tower, tower_for
from qwen_merge.merger.plan import LISTED, READABLE, SHOWN, MergePlan, NewRows, PlannedTensor, settle_dtype
from qwen_merge.merger.sources import Source

NEW_PROJECTOR = ("projector.",)


@dataclass(frozen=True)
class Sources:
    """Both checkpoints with their `config.json`, and the tower's row."""

    vision: Source
    vision_config: dict
    tower: Tower
    llm: Source
    llm_config: dict


def identify(recipe: Recipe, vision: Source, llm: Source) -> Sources:
    """What the sources are, and whether the recipe's choices fit them.

    Raises:
        UserError: all that does not fit.
    """
    vision_config, llm_config = vision.read_json("config.json"), llm.read_json("config.json")
    tower, problems = tower_for(vision_config.get("model_type")), []
    if recipe.vision.code is not None:
        tower, vision_config = OWN, {**vision_config, "model_type": OWN.kind}
    if tower is None:
        known = sorted({name for row in TOWERS for name in row.sources})
        problems.append(f"vision: model_type {vision_config.get('model_type')!r}; expected one of {', '.join(known)}")
    if llm_config.get("model_type") not in llms.SOURCES:
        problems.append(f"llm: model_type {llm_config.get('model_type')!r}; expected one of {', '.join(llms.SOURCES)}")
    for role, config in (("vision", vision_config), ("llm", llm_config)):
        if config.get("quantization_config"):
            problems.append(f"{role}: the checkpoint is quantised; a graft copies plain weights")
    if tower is not None:
        problems += _pair_problems(recipe, tower)
    if problems:
        raise UserError.from_list("this graft cannot be made:", problems)
    assert tower is not None
    return Sources(vision, vision_config, tower, llm, llm_config)


def _pair_problems(recipe: Recipe, tower: Tower) -> list[str]:
    from qwen_merge.architecture.configuration_qwen_merge_graft import check_version

    problems, vision, kind = [], recipe.vision, recipe.projector["kind"]
    try:
        check_version(tower.kind)
    except ValueError as error:
        problems.append(f"vision: {error}")
    if kind in OF_THE_SOURCE and not tower.merger:
        problems.append(
            f"projector.kind {kind} continues the patch merger of a Qwen VLM, and {tower.kind} has none: take mlp "
            "with merge_size 2, or patch_merger"
        )
    if vision.deepstack and not tower.deepstack:
        problems.append(f"vision.deepstack: {tower.kind} has none; it is Qwen3-VL's")
    if vision.deepstack and kind == "resampler":
        problems.append("vision.deepstack: a resampler's tokens lie at no place of the picture; take another projector")
    if tower.any_size and vision.resolution in ("fixed", "interpolated"):
        problems.append(f"vision.resolution {vision.resolution}: {tower.kind} takes any size; leave it out, or native")
    if not tower.any_size and vision.resolution == "native":
        problems.append(f"vision.resolution native: {tower.kind} was trained at one size; say fixed or interpolated")
    if not tower.any_size and vision.resolution != "interpolated" and (vision.min_pixels or vision.max_pixels):
        problems.append(f"vision.min_pixels, max_pixels: {tower.kind} takes one size; say resolution: interpolated")
    if (tower.merger or tower is OWN) and vision.layer != -1:
        problems.append(f"vision.layer {vision.layer}: of {tower.kind} only the result can be taken")
    return problems


def is_step_one(recipe: Recipe, sources: Sources) -> bool:
    """Whether this is Qwen-Merge itself, which is written in its own form.

    Raises:
        UserError: it is, and the file sets what that form takes from its sources.
    """
    parts = (sources.tower.kind, recipe.projector["kind"], sources.llm_config["model_type"], recipe.positions)
    if parts != ("qwen2_5_vl", "extended", "qwen3", "mrope"):
        return False
    plain = Vision(recipe.vision.source, recipe.vision.revision)
    changed = [f"vision.{name}" for name, value in vars(recipe.vision).items() if value != getattr(plain, name)]
    changed += ["tokens"] * (recipe.tokens != Tokens())
    if changed:
        raise UserError(
            f"{', '.join(changed)}: this graft is Qwen-Merge itself, as `qwen-merge merge` makes it; it takes these "
            "from its sources. Leave them out."
        )
    return True


def vision_fields(sources: Sources) -> dict[str, Any]:
    """The tower's own configuration out of its checkpoint's.

    Raises:
        UserError: there is none.
    """
    config = sources.vision_config
    values = config.get("vision_config", config if config["model_type"] == sources.tower.kind else None)
    if not isinstance(values, dict):
        raise UserError(f"the tower's config.json has vision_config {values!r}; expected a JSON object.")
    fields = {name: value for name, value in values.items() if name not in NOT_CARRIED}
    return {**fields, "model_type": sources.tower.kind}


def graft_config(recipe: Recipe, sources: Sources, token_ids: dict[str, int], rows: Any):
    """The result's configuration object. rows: of its embeddings.

    Raises:
        UserError: fields that do not fit each other.
    """
    from qwen_merge.architecture.configuration_qwen_merge_graft import (
        QwenMergeGraftConfig,
        head_dim_of,
        vision_config_of,
    )

    vision = vision_fields(sources)
    if "in_chans" in vision:  # Qwen's published spelling; transformers reads in_channels
        vision.setdefault("in_channels", vision["in_chans"])
    projector = dict(recipe.projector)
    wanted = recipe.vision.deepstack
    if sources.tower.deepstack and not (projector["kind"] == "own" if wanted is None else wanted):
        vision["deepstack_visual_indexes"] = []
    if projector["kind"] in OF_THE_SOURCE:
        tower = vision_config_of(vision)
        width = tower.hidden_size if sources.tower.kind == "qwen2_vl" else tower.out_hidden_size
        projector.update(merge_size=tower.spatial_merge_size, out_hidden_size=width)
    elif projector["kind"] in ("patch_merger", "mlp"):
        projector.setdefault("merge_size", 2)
    text = text_fields(sources.llm_config)
    section, interleaved = llms.sections(sources.llm_config) if recipe.positions == "mrope" else (None, False)
    text["vocab_size"] = rows
    ids, problems = _token_ids(recipe, token_ids, rows)
    try:
        config = QwenMergeGraftConfig(
            vision_config=vision,
            projector_config=projector,
            text_config=text,
            positions="1d" if recipe.positions == "1d" else "mrope",
            mrope_section=list(recipe.mrope_section) if recipe.mrope_section else section,
            mrope_interleaved=interleaved,
            vision_feature_layer=recipe.vision.layer,
            freeze_vision=recipe.vision.frozen,
            **ids,
        )
        if recipe.positions == "mrope-2d":
            half = head_dim_of(config.text_config) // 2
            config.mrope_section = [0, half - half // 2, half // 2]
    except (ValueError, KeyError, TypeError) as error:
        problems.append(str(error))
    else:
        problems += _size_problems(recipe, sources, config)
    if problems:
        raise UserError.from_list("this graft cannot be made:", problems)
    config.architectures = ["QwenMergeGraftForConditionalGeneration"]
    return config


def _token_ids(recipe: Recipe, token_ids: dict[str, int], rows: Any) -> tuple[dict[str, int], list[str]]:
    ids, problems = {}, []
    if type(rows) is not int:
        problems.append(f"the LLM's config.json has vocab_size {rows!r}; expected a whole number")
    for name in ("image", "video", "vision_start", "vision_end"):
        token = getattr(recipe.tokens, name)
        ids[f"{name}_token_id"] = number = token_ids.get(token, -1)
        if type(rows) is int and number >= rows:
            problems.append(f"tokens.{name}: {token} is {number}, and the LLM's embeddings have {rows} rows")
    return ids, problems


def _size_problems(recipe: Recipe, sources: Sources, config) -> list[str]:
    problems = []
    most, smallest = pixels(recipe.vision)[1], (config.vision_config.patch_size * config.factor) ** 2
    if most < smallest:
        problems.append(f"vision.max_pixels is {most}; the smallest picture has {smallest}")
    projector, width = config.projector_config, config.hidden_size
    if projector["kind"] == "own" and projector["out_hidden_size"] != width:
        problems.append(
            f"projector.kind own: the tower's patch merger gives {projector['out_hidden_size']} values a token, and "
            f"the LLM's are {width} wide: take extended, or patch_merger"
        )
    if config.deepstack > config.num_hidden_layers:
        problems.append(
            f"vision.deepstack: {config.deepstack} levels, and the LLM has {config.num_hidden_layers} layers"
        )
    layers = getattr(config.vision_config, "num_hidden_layers", 0)
    if not sources.tower.merger and not -layers - 1 <= recipe.vision.layer <= layers:
        problems.append(f"vision.layer is {recipe.vision.layer}; the tower has {layers} layers, -1 is its result")
    heads = projector.get("heads") or max(1, width // 128)
    if projector["kind"] == "resampler" and width % heads:
        problems.append(f"projector.heads is {heads}, which does not divide the LLM's hidden_size {width}")
    return problems


def meta_model(config):
    """The graft's own class without weights."""
    import torch

    from qwen_merge.architecture.modeling_qwen_merge_graft import QwenMergeGraftForConditionalGeneration

    with torch.device("meta"):
        return QwenMergeGraftForConditionalGeneration(config)


def graft_plan(sources: Sources, config, new_rows: Mapping[str, NewRows]) -> MergePlan:
    """Every tensor of the result with its source. new_rows: of which tensors some rows are drawn.

    Raises:
        UserError: tensors that are missing, unknown, or of another shape.
    """
    dropped: dict[str, Counter[str]] = {"vlm": Counter(), "llm": Counter()}
    mergers = mergers_of(sources.tower, config)
    found = of_the_tower(sources.vision, sources.tower, mergers, dropped["vlm"])
    tied = config.tie_word_embeddings
    found.update(of_the_llm(sources.llm, sources.llm_config["model_type"], tied, dropped["llm"]))
    check_depth(config.text_config, config.vision_config, len(found))
    tensors = joined(found, lambda: meta_model(config), tied, NEW_PROJECTOR, tuple(mergers.values()), new_rows)
    plan = MergePlan(config.to_dict(), tensors, {role: dict(count) for role, count in dropped.items()})
    if sources.tower.deepstack:
        plan.notes.append(deepstack_note(sources.tower, config, mergers))
    settle_dtype(plan)
    return plan


def joined(
    found: Found,
    make: Callable[[], Any],
    tied: bool,
    new: tuple[str, ...],
    copied: tuple[str, ...] = (),
    new_rows: Mapping[str, NewRows] = MappingProxyType({}),
) -> list[PlannedTensor]:
    """Every tensor of a model with its source: the tower's, the LLM's, then those that are initialised.

    found: what the sources have. make: gives the model on the meta device. tied: the head is the embedding. new: how
    tensors begin or end that may be missing. copied: how those of them begin that may not. new_rows: of copied tensors
    the rows that are drawn.

    Raises:
        UserError: tensors that are missing, unknown, or of another shape.
    """
    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import disk_name

    try:
        model = make()
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the sources' config.json describe no model: {error!r}. Take complete checkpoints.") from None
    ones = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Norm", "RMSNorm"))
    }
    problems: list[str] = []
    tensors: dict[str, list[PlannedTensor]] = {"vlm": [], "llm": [], "new": []}
    for memory_name, parameter in model.state_dict().items():
        name, shape = disk_name(memory_name), tuple(parameter.shape)
        if name == "lm_head.weight" and tied:
            continue
        origin, source_name, stored = found.pop(name, ("", "", None))
        if stored is None:
            if name.startswith(copied) or not (name.startswith(new) or name.endswith(new)):
                problems.append(f"missing tensor {name}, expected shape {list(shape)}")
            stream = None if memory_name in ones else zlib.crc32(name.encode())
            tensors["new"].append(PlannedTensor(name, "", shape, "new", stream=stream))
        elif stored.shape != (expected := (new_rows[name].copied, *shape[1:]) if name in new_rows else shape):
            problems.append(f"tensor {source_name} has shape {list(stored.shape)}, expected {list(expected)}")
        elif stored.dtype not in READABLE.values():
            problems.append(f"tensor {source_name} has dtype {stored.dtype}; take an unquantised checkpoint")
        else:
            rows, stream = new_rows.get(name), zlib.crc32(name.encode())
            tensors[origin].append(PlannedTensor(name, stored.dtype, shape, origin, source_name, stored, stream, rows))
    problems += [
        f"unknown tensor {source_name}: this graft has no place for it" for _, source_name, _ in found.values()
    ]
    if problems:
        more = ["... and more of this kind"] * (len(problems) > SHOWN)
        raise UserError.from_list("the tensors of these checkpoints do not fit:", problems[:SHOWN] + more)
    for role in ("vlm", "llm"):
        tensors[role].sort(key=lambda tensor: (tensor.stored.file, tensor.stored.start))  # type: ignore[union-attr]
    drawn = [
        PlannedTensor(
            t.name, tensors["llm" if t.name.startswith("model.") else "vlm"][0].dtype, t.shape, "new", stream=t.stream
        )
        for t in tensors["new"]
    ]
    return tensors["vlm"] + tensors["llm"] + drawn


def check_depth(text, vision, tensors: int) -> None:
    """More layers or experts than tensors: asked before so many are built."""
    counts = {f"the LLM's {name}": getattr(text, name, 0) for name in ("num_hidden_layers", "num_experts")}
    counts["the tower's depth"] = getattr(vision, "depth", getattr(vision, "num_hidden_layers", 0))
    for name, count in counts.items():
        if type(count) is not int or count > max(tensors, LISTED):
            raise UserError(f"{name} is {count!r}, but there are only {tensors} tensors.")
