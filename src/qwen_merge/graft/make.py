"""A graft from its file to a complete directory. Everything that can be refused is refused before a byte is written."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_merge.architecture import GRAFT_CODE_FILES
from qwen_merge.errors import UserError
from qwen_merge.graft import llms, own_encoder, stock
from qwen_merge.graft import plan as planning
from qwen_merge.graft.recipe import STOCK, Recipe, Tokens, pixels
from qwen_merge.graft.tokens import add_missing
from qwen_merge.merger import companions as companion_files
from qwen_merge.merger.configuration import RopeOptions
from qwen_merge.merger.merge import MergeOptions, MergeReport, Prepared, merge, refuse_inside, write
from qwen_merge.merger.plan import MergePlan
from qwen_merge.merger.shards import parse_size
from qwen_merge.merger.sources import Source, open_source
from qwen_merge.merger.staging import remove_stale, resolved_output

PROCESSOR = "processor_config.json"


@dataclass(frozen=True)
class Drafted:
    """A graft that can be made at `output`. plan: None for Qwen-Merge's own form (step 1's merger)."""

    output: Path
    max_shard_bytes: int
    sources: planning.Sources
    plan: MergePlan | None
    companions: companion_files.Companions | None


def draft(recipe: Recipe) -> Drafted:
    """Open the sources and plan; reads configurations and headers only.

    Raises:
        UserError: whatever does not fit, the place of the output and the size of its files among it.
    """
    place = resolved_output(recipe.output), parse_size(recipe.max_shard_size)
    vision, llm = _opened(recipe)
    refuse_inside(place[0], vision, llm)
    sources = planning.identify(recipe, vision, llm)
    if recipe.architecture == STOCK:
        return Drafted(*place, sources, *stock.draft(recipe, sources))
    if planning.is_step_one(recipe, sources):
        return Drafted(*place, sources, None, None)
    companions = companion_files.of_the_llm(llm, {})
    rows, new_rows = add_missing(companions, recipe.tokens, llms.text_fields(sources.llm_config).get("vocab_size"))
    config = planning.graft_config(recipe, sources, companions.token_ids, rows)
    with own_encoder.known(recipe.vision.code, config.vision_config):
        plan = planning.graft_plan(sources, config, new_rows)
    plan.notes.extend(companions.notes)
    _add_files(companions, recipe, sources, config)
    return Drafted(*place, sources, plan, companions)


def _opened(recipe: Recipe) -> tuple[Source, Source]:
    """The tower's checkpoint and the LLM's.

    Raises:
        UserError: what is wrong with either, or with both.
    """
    opened, problems = [], []
    for role in ("vision", "llm"):
        part = getattr(recipe, role)
        try:
            opened.append(open_source(part.source, role, part.revision))
        except UserError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError.from_list("neither source can be read:", problems)
    return opened[0], opened[1]


def make(recipe: Recipe) -> MergeReport:
    """Make what the recipe says.

    Raises:
        UserError: whatever a user can mend; nothing is left at or beside the output then.
    """
    started = time.monotonic()
    drafted = draft(recipe)
    if drafted.output.parent.is_dir():
        remove_stale(drafted.output)  # before the space is looked at: a dead merge may take up what is needed
    if drafted.plan is None:
        return merge(step_one(recipe))
    assert drafted.companions is not None
    ready = Prepared(drafted.sources.vision, drafted.sources.llm, drafted.companions, drafted.plan)
    return write(drafted.output, ready, recipe.seed, drafted.max_shard_bytes, started)


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
    from qwen_merge.architecture.processing_qwen_merge_graft import AUTO_MAP, QwenMergeGraftImageProcessor

    name, own = _own_processor(sources)
    settings = sources.vision.read_json(companion_files.PREPROCESSOR)
    fixed = not sources.tower.any_size and recipe.vision.resolution != "interpolated"
    least, most = pixels(recipe.vision)
    carried = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")
    values = {
        "image_processor_type": "QwenMergeGraftImageProcessor",
        "processor_class": "QwenMergeGraftProcessor",
        "patch_size": config.vision_config.patch_size,
        "temporal_patch_size": config.frames,
        "merge_size": config.merge_size,
        "factor": config.factor,
        "queries": config.tokens((1, 1, 1)) if config.projector_config["kind"] == "resampler" else None,
        "min_pixels": least,
        "max_pixels": most,
        **{key: getattr(own, key) for key in carried if getattr(own, key, None) is not None},
        "tower_processor": {**settings, "image_processor_type": name} if fixed else None,
    }
    _check_pictures(QwenMergeGraftImageProcessor(**values), config, fixed)
    companions.files[companion_files.PREPROCESSOR] = companion_files.encode({**values, "auto_map": dict(AUTO_MAP)})
    processor = {
        "processor_class": "QwenMergeGraftProcessor",
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        **{f"{name}_token": spelling for name, spelling in vars(recipe.tokens).items()},
        "timestamps": config.mrope_interleaved,
    }
    companions.files[PROCESSOR] = companion_files.encode(processor)
    _spell_tokens(companions, recipe.tokens)
    for path in GRAFT_CODE_FILES:
        companions.files[path.name] = path.read_bytes()
    if recipe.vision.code is not None:
        companions.files[own_encoder.FILE] = Path(recipe.vision.code).read_bytes()


def _own_processor(sources: planning.Sources) -> tuple[str, Any]:
    """(class name, image processor) of the tower's checkpoint: the slow one, which gives arrays.

    Raises:
        UserError: none that transformers knows.
    """
    from qwen_merge.architecture.processing_qwen_merge_graft import image_processor_class

    settings = sources.vision.read_json(companion_files.PREPROCESSOR)
    old = str(settings.get("feature_extractor_type", "")).replace("FeatureExtractor", "ImageProcessor")
    name = str(settings.get("image_processor_type") or old).removesuffix("Fast")
    try:
        kind = image_processor_class(name)
    except ValueError as error:
        raise UserError(f"the tower's {companion_files.PREPROCESSOR}: {error}.") from None
    kinds = ("image_processor_type", "feature_extractor_type", "processor_class")
    try:
        return name, kind(**{key: value for key, value in settings.items() if key not in kinds})
    except (TypeError, ValueError) as error:
        raise UserError(f"the tower's {companion_files.PREPROCESSOR} makes no {name}: {error}") from None


def _check_pictures(processor, config, fixed: bool) -> None:
    """Cut two grey pictures as every later one will be.

    Raises:
        UserError: what comes out is nothing that tower and projector can take.
    """
    from PIL import Image

    try:
        grey = [Image.new("RGB", size, (128, 128, 128)) for size in ((640, 480), (480, 640))]
        grids = [tuple(int(side) for side in grid[1:]) for grid in processor(images=grey)["image_grid_thw"]]
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"the tower's {companion_files.PREPROCESSOR} gives no pictures: {error}") from None
    vision, problems = config.vision_config, []
    if fixed and grids[0] != grids[1]:
        problems.append(f"it gives pictures of several sizes, {grids[0]} and {grids[1]} patches: say interpolated")
    for rows, columns in dict.fromkeys(grids):
        if rows % config.factor or columns % config.factor:
            problems.append(
                f"the tower's pictures have {rows} x {columns} patches, which squares of {config.merge_size} do not "
                "fill: another projector.merge_size, or vision.resolution: interpolated"
            )
        if fixed and "dinov2" not in vision.model_type:
            own = vision.image_size // vision.patch_size
            if (rows, columns) != (own, own):
                problems.append(f"it gives {rows} x {columns} patches, and the tower has positions for {own} x {own}")
    if problems:
        raise UserError.from_list("this graft cannot be made:", problems)


def _spell_tokens(companions: companion_files.Companions, tokens: Tokens) -> None:
    """In the chat template, which writes Qwen's own."""
    if tokens == Tokens():
        return
    spelled = {own: getattr(tokens, name) for name, own in vars(Tokens()).items()}
    template = companions.files[companion_files.CHAT_TEMPLATE].decode()
    # All at once: one may be spelled as another was.
    template = re.sub("|".join(map(re.escape, spelled)), lambda found: spelled[found.group()], template)
    companions.files[companion_files.CHAT_TEMPLATE] = template.encode()
    settings = json.loads(companions.files["tokenizer_config.json"])
    companions.files["tokenizer_config.json"] = companion_files.encode({**settings, "chat_template": template})
