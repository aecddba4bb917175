"""`qwen-merge graft --plan FILE`: what would be made, from configurations and headers alone."""

import json
import math

from qwen_merge.graft.make import Drafted, draft, step_one
from qwen_merge.graft.recipe import Recipe
from qwen_merge.merger import companions as companion_files
from qwen_merge.merger.merge import prepare
from qwen_merge.merger.plan import MergePlan

PARTS = (("vision tower", "visual."), ("projector", "projector."), ("LLM", "model."), ("head", "lm_head."))


def show(recipe: Recipe, picture: tuple[int, int]) -> None:
    """Parts, their parameters and bytes, the projector's shapes, and the tokens of a picture of that size.

    Raises:
        UserError: what makes the graft itself impossible.
    """
    drafted = draft(recipe)
    plan = drafted.plan or _step_one_plan(recipe, drafted)
    is_own_form = drafted.plan is None
    parts: dict[str, list] = {name: [] for name, _ in PARTS}
    for tensor in plan.tensors:
        name = (
            "projector"
            if tensor.name.startswith("visual.merger.")
            else next(name for name, prefix in PARTS if tensor.name.startswith(prefix))
        )
        parts[name].append(tensor)
    print(f"{recipe.output}: {plan.config['model_type']}")
    for name, tensors in parts.items():
        if tensors:
            parameters = sum(math.prod(tensor.shape) for tensor in tensors)
            origins = sorted({{"vlm": "copied", "llm": "copied", "new": "new"}[tensor.origin] for tensor in tensors})
            nbytes = sum(tensor.nbytes for tensor in tensors)
            print(f"  {name:13} {parameters:>15,} parameters  {nbytes:>15,} bytes  {', '.join(origins)}")
    print(f"  {'total':13} {sum(math.prod(t.shape) for t in plan.tensors):>15,} parameters  {plan.nbytes:>15,} bytes")
    print(
        "  to train all of it with AdamW, float32 states and master weights, without activations: "
        f"{16 * sum(math.prod(t.shape) for t in plan.tensors) / 2**30:.1f} GiB"
    )
    for tensor in parts["projector"]:
        print(f"    {tensor.name:40} {list(tensor.shape)}{'  new' if tensor.origin == 'new' else ''}")
    if is_own_form:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        vision = plan.config["vision_config"]
        side = vision["patch_size"] * vision["spatial_merge_size"]
        height, width = smart_resize(picture[1], picture[0], side, recipe.vision.min_pixels, recipe.vision.max_pixels)
        tokens = height // side * (width // side)
    else:
        tokens = _tokens(drafted, picture)
    print(f"  a picture of {picture[0]} x {picture[1]} takes {tokens} tokens")
    for note in plan.notes:
        print(f"  note: {note}")


def _tokens(drafted: Drafted, picture: tuple[int, int]) -> int:
    """As the result's own image processor cuts a grey picture of that size."""
    from PIL import Image

    from qwen_merge.architecture.processing_qwen_merge_graft import QwenMergeGraftImageProcessor

    assert drafted.companions is not None
    settings = json.loads(drafted.companions.files[companion_files.PREPROCESSOR])
    processor = QwenMergeGraftImageProcessor(**{key: value for key, value in settings.items() if key != "auto_map"})
    return processor.tokens(processor(images=Image.new("RGB", picture, (128, 128, 128)))["image_grid_thw"][0])


def _step_one_plan(recipe: Recipe, drafted: Drafted) -> MergePlan:
    options = step_one(recipe)
    return prepare(drafted.sources.vision, drafted.sources.llm, {}, options.rope, options.dtype).plan
