"""`qwen-merge graft --plan FILE`: what would be made, from configurations and headers alone."""

import json
import math
from collections.abc import Mapping
from typing import Any

from qwen_merge.errors import UserError
from qwen_merge.graft.command import in_the_files_words
from qwen_merge.graft.make import draft, step_one
from qwen_merge.graft.recipe import STOCK, Recipe
from qwen_merge.merger import companions as companion_files
from qwen_merge.merger.merge import prepare

PARTS = (("vision tower", "visual."), ("projector", "projector."), ("LLM", "model."), ("head", "lm_head."))


def show(recipe: Recipe, picture: tuple[int, int]) -> None:
    """Parts, their parameters and bytes, the projector's shapes, and the tokens of a picture of that size.

    Raises:
        UserError: what makes the graft itself impossible.
    """
    drafted = draft(recipe)
    if drafted.plan is None:
        ready = prepare(drafted.sources.vision, drafted.sources.llm, {}, step_one(recipe).rope, None)
        plan, files = ready.plan, ready.companions.files
    else:
        assert drafted.companions is not None
        plan, files = drafted.plan, drafted.companions.files
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
    settings = json.loads(files[companion_files.PREPROCESSOR])
    tokens, _ = _cut(settings, picture)
    print(f"  pictures: {sizes(recipe, settings)}")
    print(f"  a picture of {picture[0]} x {picture[1]} takes {tokens} tokens")
    for note in plan.notes:
        print(f"  note: {in_the_files_words(note)}")


def sizes(recipe: Recipe, settings: Mapping[str, Any]) -> str:
    """What becomes of a picture's size, in words. settings: the result's `preprocessor_config.json`."""
    if settings.get("tower_processor"):
        _, (width, height) = _cut(settings, (640, 480))  # any will do
        return f"all {width} x {height} pixels, the tower's own size; vision.resolution: interpolated takes others"
    edges = settings.get("size") or {}
    least, most = (
        settings.get(name) or edges.get(edge, "?")
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    )
    bounds = f"{least:,} to {most:,} pixels" if isinstance(least, int) and isinstance(most, int) else "of any size"
    if recipe.vision.min_pixels or recipe.vision.max_pixels:
        return f"{bounds}, as the file says"
    if "factor" not in settings:
        can = "; vision.min_pixels, max_pixels change it" if recipe.architecture == STOCK else ""
        return f"{bounds}, as in the tower's VLM{can}"
    return (
        f"{bounds}, as in the training recipes, larger ones are made smaller; vision.min_pixels, max_pixels change it"
    )


def _cut(settings: Mapping[str, Any], picture: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """As the result's own image processor cuts a grey picture of that size: its tokens, and its width and height then.

    Raises:
        UserError: it takes no such picture.
    """
    from PIL import Image
    from transformers import Qwen2VLImageProcessor

    from qwen_merge.architecture.processing_qwen_merge_graft import QwenMergeGraftImageProcessor

    kind = QwenMergeGraftImageProcessor if "factor" in settings else Qwen2VLImageProcessor
    processor = kind(**{key: value for key, value in settings.items() if key != "auto_map"})
    try:
        grid = processor(images=Image.new("RGB", picture, (128, 128, 128)))["image_grid_thw"][0]
    except ValueError as error:
        raise UserError(f"--picture {picture[0]}x{picture[1]}: {error}") from None
    size = int(grid[2]) * processor.patch_size, int(grid[1]) * processor.patch_size
    merged = int(grid.prod()) // processor.merge_size**2
    return processor.tokens(grid) if hasattr(processor, "tokens") else merged, size
