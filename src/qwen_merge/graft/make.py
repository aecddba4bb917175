"""A graft from its file to a complete directory. Everything that can be refused is refused before a byte is written."""

import time
from dataclasses import dataclass

from qwen_merge.architecture import GRAFT_CODE_FILES
from qwen_merge.graft import plan as planning
from qwen_merge.graft.recipe import Recipe
from qwen_merge.merger import companions as companion_files
from qwen_merge.merger.configuration import RopeOptions
from qwen_merge.merger.merge import MergeOptions, MergeReport, Prepared, merge, write
from qwen_merge.merger.plan import MergePlan
from qwen_merge.merger.shards import parse_size
from qwen_merge.merger.sources import open_source
from qwen_merge.merger.staging import resolved_output

PROCESSOR = "processor_config.json"


@dataclass(frozen=True)
class Drafted:
    """A graft that can be made. config: its configuration object; None for Qwen-Merge's own form (step 1's merger)."""

    config: object | None
    sources: planning.Sources
    plan: MergePlan | None
    companions: companion_files.Companions | None


def draft(recipe: Recipe) -> Drafted:
    """Open the sources and plan; reads configurations and headers only.

    Raises:
        UserError: whatever does not fit.
    """
    vision = open_source(recipe.vision.source, "vision", recipe.vision.revision)
    llm = open_source(recipe.llm.source, "llm", recipe.llm.revision)
    sources = planning.identify(recipe, vision, llm)
    if planning.is_step_one(recipe, sources):
        return Drafted(None, sources, None, None)
    companions = companion_files.of_the_llm(llm, {})
    config = planning.graft_config(recipe, sources, companions.token_ids)
    plan = planning.graft_plan(sources, config)
    plan.notes.extend(companions.notes)
    _add_files(companions, recipe, sources, config)
    return Drafted(config, sources, plan, companions)


def make(recipe: Recipe) -> MergeReport:
    """Make what the recipe says.

    Raises:
        UserError: whatever a user can mend; nothing is left at or beside the output then.
    """
    started = time.monotonic()
    output, max_shard_bytes = resolved_output(recipe.output.expanduser()), parse_size(recipe.max_shard_size)
    drafted = draft(recipe)
    if drafted.plan is None:
        return merge(step_one(recipe))
    assert drafted.companions is not None
    ready = Prepared(drafted.sources.vision, drafted.sources.llm, drafted.companions, drafted.plan)
    return write(output, ready, recipe.seed, max_shard_bytes, started)


def step_one(recipe: Recipe) -> MergeOptions:
    """The same merge as `qwen-merge merge` would make."""
    return MergeOptions(
        vlm=recipe.vision.source,
        llm=recipe.llm.source,
        output=recipe.output,
        vlm_revision=recipe.vision.revision,
        llm_revision=recipe.llm.revision,
        max_shard_size=recipe.max_shard_size,
        seed=recipe.seed,
        rope=RopeOptions(recipe.mrope_section),
    )


def _add_files(companions: companion_files.Companions, recipe: Recipe, sources: planning.Sources, config) -> None:
    from qwen_merge.architecture.processing_qwen_merge_graft import AUTO_MAP

    own = sources.vision.read_json(companion_files.PREPROCESSOR)
    fixed = not sources.tower.is_native and recipe.vision.resolution != "interpolated"
    vision = config.vision_config
    values = {
        "image_processor_type": "QwenMergeGraftImageProcessor",
        "processor_class": "QwenMergeGraftProcessor",
        "auto_map": dict(AUTO_MAP),
        "patch_size": vision.patch_size,
        "temporal_patch_size": config.frames,
        "merge_size": config.merge_size,
        "factor": config.factor,
        "queries": config.tokens((1, 1, 1)) if config.projector_config["kind"] == "resampler" else None,
        "min_pixels": recipe.vision.min_pixels,
        "max_pixels": recipe.vision.max_pixels,
        **{name: own[name] for name in ("image_mean", "image_std", "resample", "rescale_factor") if name in own},
        "tower_processor": own if fixed else None,
    }
    companions.files[companion_files.PREPROCESSOR] = companion_files.encode(values)
    processor = {
        "processor_class": "QwenMergeGraftProcessor",
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        "image_token": recipe.tokens.image,
    }
    companions.files[PROCESSOR] = companion_files.encode(processor)
    for path in GRAFT_CODE_FILES:
        companions.files[path.name] = path.read_bytes()
