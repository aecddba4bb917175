"""From a recipe and the sources' configurations and headers to every tensor of the result. No weights are read.

Which tensors a graft has is asked of its own class on PyTorch's meta device; where each comes from follows from
`towers.TOWERS` and the LLM's own names. Pairs that cannot work are refused here, all at once.
"""

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_merge.errors import UserError
from qwen_merge.graft.recipe import Recipe, Tokens, Vision, pixels
from qwen_merge.graft.towers import TOWERS, Tower, tower_for
from qwen_merge.merger.plan import LISTED, READABLE, SHOWN, MergePlan, PlannedTensor, settle_dtype
from qwen_merge.merger.safetensors_file import StoredTensor
from qwen_merge.merger.sources import Source

LLMS = ("qwen3", "qwen3_moe", "qwen2")
# What a source's configuration says of the checkpoint and not of the model.
_NOT_CARRIED = {"_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version"}
LEFT_OUT = "the stock architecture has no place for q/k norms"
NEW_PROJECTOR = ("projector.",)
Found = dict[str, tuple[str, str, StoredTensor | None]]  # name on the disk -> (origin, source name, where it lies)


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
    if tower is None:
        known = sorted({name for row in TOWERS for name in row.sources})
        problems.append(f"vision: model_type {vision_config.get('model_type')!r}; expected one of {', '.join(known)}")
    if llm_config.get("model_type") not in LLMS:
        problems.append(f"llm: model_type {llm_config.get('model_type')!r}; expected one of {', '.join(LLMS)}")
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
    problems, vision = [], recipe.vision
    if recipe.projector["kind"] == "extended" and not tower.is_native:
        problems.append(
            f"projector.kind extended continues the patch merger of a Qwen VLM, and {tower.kind} has none: take mlp "
            "with merge_size 2, or patch_merger"
        )
    if tower.is_native and vision.resolution in ("fixed", "interpolated"):
        problems.append(f"vision.resolution {vision.resolution}: {tower.kind} takes any size; leave it out, or native")
    if not tower.is_native and vision.resolution == "native":
        problems.append(f"vision.resolution native: {tower.kind} was trained at one size; say fixed or interpolated")
    if not tower.is_native and vision.resolution != "interpolated" and (vision.min_pixels or vision.max_pixels):
        problems.append(f"vision.min_pixels, max_pixels: {tower.kind} takes one size; say resolution: interpolated")
    if tower.is_native and vision.layer != -1:
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
    fields = {name: value for name, value in values.items() if name not in _NOT_CARRIED}
    return {**fields, "model_type": sources.tower.kind}


def text_fields(llm_config: dict) -> dict[str, Any]:
    """The LLM's own fields; transformers 5 keeps all of its RoPE in `rope_parameters`."""
    text = {name: value for name, value in llm_config.items() if name not in (*_NOT_CARRIED, "rope_parameters")}
    parameters = dict(llm_config.get("rope_parameters") or {})
    if "rope_theta" in parameters:
        text["rope_theta"] = parameters.pop("rope_theta")
    if parameters.get("rope_type", "default") != "default":
        text["rope_scaling"] = parameters
    return text


def graft_config(recipe: Recipe, sources: Sources, token_ids: dict[str, int]):
    """The result's configuration object.

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
    if projector["kind"] == "extended":
        tower = vision_config_of(vision)
        width = tower.hidden_size if sources.tower.kind == "qwen2_vl" else tower.out_hidden_size
        projector.update(merge_size=tower.spatial_merge_size, out_hidden_size=width)
    elif projector["kind"] in ("patch_merger", "mlp"):
        projector.setdefault("merge_size", 2)
    text = text_fields(sources.llm_config)
    ids, problems = _token_ids(recipe, token_ids, text.get("vocab_size"))
    try:
        config = QwenMergeGraftConfig(
            vision_config=vision,
            projector_config=projector,
            text_config=text,
            positions="1d" if recipe.positions == "1d" else "mrope",
            mrope_section=list(recipe.mrope_section) if recipe.mrope_section else None,
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
        ids[f"{name}_token_id"] = token_ids.get(token, -1)
        if token not in token_ids:
            problems.append(f"tokens.{name}: the LLM's tokenizer has no {token}")
        elif type(rows) is int and token_ids[token] >= rows:
            problems.append(f"tokens.{name}: {token} is {token_ids[token]}, and the LLM's embeddings have {rows} rows")
    return ids, problems


def _size_problems(recipe: Recipe, sources: Sources, config) -> list[str]:
    problems = []
    most, smallest = pixels(recipe.vision)[1], (config.vision_config.patch_size * config.factor) ** 2
    if most < smallest:
        problems.append(f"vision.max_pixels is {most}; the smallest picture has {smallest}")
    layers = getattr(config.vision_config, "num_hidden_layers", 0)
    if not sources.tower.is_native and not -layers - 1 <= recipe.vision.layer <= layers:
        problems.append(f"vision.layer is {recipe.vision.layer}; the tower has {layers} layers, -1 is its result")
    width = config.hidden_size
    heads = config.projector_config.get("heads") or max(1, width // 128)
    if config.projector_config["kind"] == "resampler" and width % heads:
        problems.append(f"projector.heads is {heads}, which does not divide the LLM's hidden_size {width}")
    return problems


def meta_model(config):
    """The graft's own class without weights."""
    import torch

    from qwen_merge.architecture.modeling_qwen_merge_graft import QwenMergeGraftForConditionalGeneration

    with torch.device("meta"):
        return QwenMergeGraftForConditionalGeneration(config)


def graft_plan(sources: Sources, config) -> MergePlan:
    """Every tensor of the result with its source.

    Raises:
        UserError: tensors that are missing, unknown, or of another shape.
    """
    dropped: dict[str, Counter[str]] = {"vlm": Counter(), "llm": Counter()}
    found = of_the_tower(sources, config.projector_config["kind"] == "extended", dropped["vlm"])
    found.update(of_the_llm(sources, config.tie_word_embeddings, dropped["llm"]))
    check_depth(config.text_config, config.vision_config, len(found))
    tensors = joined(found, lambda: meta_model(config), config.tie_word_embeddings, NEW_PROJECTOR)
    plan = MergePlan(config.to_dict(), tensors, {role: dict(count) for role, count in dropped.items()})
    settle_dtype(plan)
    return plan


def joined(found: Found, make: Callable[[], Any], tied: bool, new: tuple[str, ...]) -> list[PlannedTensor]:
    """Every tensor of a model with its source: the tower's, the LLM's, then those that are initialised.

    found: what the sources have. make: gives the model on the meta device. tied: the head is the embedding. new: how
    tensors begin or end that may be missing.

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
            if not (name.startswith(new) or name.endswith(new)):
                problems.append(f"missing tensor {name}, expected shape {list(shape)}")
            stream = None if memory_name in ones else zlib.crc32(name.encode())
            tensors["new"].append(PlannedTensor(name, "", shape, "new", stream=stream))
        elif stored.shape != shape:
            problems.append(f"tensor {source_name} has shape {list(stored.shape)}, expected {list(shape)}")
        elif stored.dtype not in READABLE.values():
            problems.append(f"tensor {source_name} has dtype {stored.dtype}; take an unquantised checkpoint")
        else:
            tensors[origin].append(PlannedTensor(name, stored.dtype, shape, origin, source_name, stored))
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


def of_the_tower(sources: Sources, keeps_merger: bool, dropped: Counter[str]) -> Found:
    tower, found = sources.tower, Found()

    def is_wanted(name: str) -> bool:
        return any(name.startswith(spelling) for spelling, _ in tower.spellings)

    for name, stored in sources.vision.read_tensors(is_wanted).items():
        spelling, stem = next((pair for pair in tower.spellings if name.startswith(pair[0])), (None, ""))
        drop = next((reason for prefix, reason in tower.drops if name.startswith(prefix)), None)
        if spelling is None or (drop and not (tower.is_native and spelling)):
            dropped[drop or "not the tower's"] += 1
            continue
        target = stem + name[len(spelling) :]
        if f"visual.{target}" in found or f"projector.{target}" in found:
            raise UserError(f"the tower's checkpoint has {target} twice, once as {name}. Copy or download it again.")
        if tower.merger and target.startswith(tower.merger):
            if not keeps_merger:
                dropped["the VLM's patch merger"] += 1
                continue
            found[f"projector.{target}"] = ("vlm", name, stored)
        else:
            found[f"visual.{target}"] = ("vlm", name, stored)
    return found


def of_the_llm(sources: Sources, tied: bool, dropped: Counter[str], left_out: tuple[str, ...] = ()) -> Found:
    """left_out: how names end for which the result has no place."""
    found = Found()
    for name, stored in sources.llm.read_tensors().items():
        if name == "lm_head.weight" and tied:
            dropped["the head is tied to the embeddings"] += 1
        elif name.endswith(left_out or ("\0",)):
            dropped[LEFT_OUT] += 1
        else:
            found[name] = ("llm", name, stored)
    return found
