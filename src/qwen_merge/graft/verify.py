"""`qwen-merge verify DIR` for a graft: its tensors are its sources', and tower and LLM compute what they did there.

The sources are those of the checkpoint's manifest, or the ones that are named. Lines and verdicts are the merge's.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from qwen_merge.errors import UserError
from qwen_merge.graft import own_encoder
from qwen_merge.graft import plan as planning
from qwen_merge.graft.llms import class_of
from qwen_merge.graft.tokens import EMBEDDING, HEAD
from qwen_merge.graft.towers import OWN, tower_for
from qwen_merge.merger.companions import Companions
from qwen_merge.merger.initialise import initial_bytes
from qwen_merge.merger.merge import Prepared
from qwen_merge.merger.plan import MergePlan, NewRows
from qwen_merge.merger.safetensors_file import StoredTensor
from qwen_merge.merger.sources import Source
from qwen_merge.merger.verify import (
    FAIL,
    NOT_CHECKED,
    Results,
    check_copied,
    find_source,
    nothing_checked,
    read_manifest,
    sha256_of,
    stored_chunks,
)
from qwen_merge.merger.verify_forward import difference, local_directory, quiet, text_logits

FORWARD = ("text logits", "vision features")


def verify(merged: Source, *, vlm: str | None, llm: str | None, revision: str | None, forward: bool) -> int:
    """Check a graft and print the results; returns the exit code: 0 when nothing failed, 1 when something did.

    vlm: where the tower's checkpoint is; it and llm: None: as the manifest says.

    Raises:
        UserError: a source cannot be found or read: all of a graft's tensors follow from both.
    """
    from qwen_merge.architecture.configuration_qwen_merge_graft import QwenMergeGraftConfig

    manifest, results = read_manifest(merged), Results()
    found = [find_source(given, origin, revision, manifest) for given, origin in ((vlm, "vlm"), (llm, "llm"))]
    (vision, _), (language, _) = found
    if vision is None or language is None:
        raise nothing_checked(merged.directory, "; ".join(reason for _, reason in found if reason))
    try:
        config = QwenMergeGraftConfig.from_pretrained(merged.directory)
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        results.add(FAIL, "tensors", f"its config.json is no graft's: {error}")
        return results.conclude(merged.directory)
    own = config.vision_config.model_type == OWN.kind  # whose code is not run unasked
    with own_encoder.stood_in_for(vision) if own else nullcontext():
        return _verify(merged, vision, language, config, manifest, forward, results)


def _verify(
    merged: Source, vision: Source, language: Source, config: Any, manifest: dict, forward: bool, results: Results
) -> int:
    try:
        plan, drawn = _plan(vision, language, config, manifest)
        ready = Prepared(vision, language, Companions({}, [], {}, []), plan)
    except (UserError, ValueError, TypeError, KeyError) as error:
        results.add(FAIL, "tensors", f"these sources do not make this checkpoint: {error}")
        return results.conclude(merged.directory)
    stored = {name: tensor for name, tensor in merged.read_tensors().items() if tensor is not None}
    _check_names(stored, plan, results)
    plan.tensors[:] = [tensor for tensor in plan.tensors if tensor.name not in drawn]
    check_copied(merged, stored, ready, "vlm", "copied from VLM", results)
    check_copied(merged, stored, ready, "llm", "copied from LLM", results)
    _check_new(merged, stored, plan, manifest, results)
    if drawn:
        results.add(NOT_CHECKED, "new rows", f"{', '.join(drawn)}: some rows are drawn, about the mean of the others")
    if not forward or results.count(FAIL):
        for check in FORWARD:
            results.add(NOT_CHECKED, check, "an earlier check failed" if results.count(FAIL) else "--no-forward")
    else:
        _check_forward(merged, vision, language, config, bool(drawn), results)
    _check_files(merged, manifest, results)
    return results.conclude(merged.directory)


def _plan(vision: Source, language: Source, config, manifest: Mapping) -> tuple[MergePlan, list[str]]:
    """The plan made anew, and the names of copied tensors of which some rows are drawn."""
    vision_config, llm_config = vision.read_json("config.json"), language.read_json("config.json")
    tower = tower_for(vision_config.get("model_type"))
    if config.vision_config.model_type == OWN.kind:
        tower, vision_config = OWN, {**vision_config, "model_type": OWN.kind}
    if tower is None or tower.kind != config.vision_config.model_type:
        raise UserError(f"{vision.directory} has model_type {vision_config.get('model_type')!r}")
    lengths = {name: tensor.shape[0] for name, tensor in language.read_tensors().items() if tensor and tensor.shape}
    rows = {}
    for name, numbers in manifest.get("tensors", {}).get("new_rows", {}).items():
        end = name.removeprefix("model.")  # as its LLM's checkpoint spells it
        copied = next((length for source_name, length in lengths.items() if source_name.endswith(end)), None)
        if name not in (EMBEDDING, HEAD) or copied is None or not numbers:
            raise UserError(f"the manifest has new rows of {name}: {numbers}")
        rows[name] = NewRows(tuple(numbers), min(*numbers, copied), copied)
    sources = planning.Sources(vision, vision_config, tower, language, llm_config)
    return planning.graft_plan(sources, config, rows), list(rows)


def _check_names(stored: Mapping[str, StoredTensor], plan: MergePlan, results: Results) -> None:
    planned = {tensor.name: tensor for tensor in plan.tensors}
    differences = [f"missing {name}" for name in planned if name not in stored]
    differences += [f"unknown {name}" for name in stored if name not in planned]
    differences += [
        f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {planned[name].dtype} {list(planned[name].shape)}"
        for name, tensor in stored.items()
        if name in planned and (tensor.dtype, tensor.shape) != (planned[name].dtype, planned[name].shape)
    ]
    nbytes = sum(tensor.nbytes for tensor in stored.values())
    results.judge("tensors", differences, f"{len(stored)} with the right name, shape and dtype, {nbytes:,} bytes")


def _check_new(
    merged: Source, stored: Mapping[str, StoredTensor], plan: MergePlan, manifest: Mapping, results: Results
) -> None:
    seed, new = manifest.get("new_layer", {}).get("seed"), plan.of("new")
    if seed is None:
        results.add(NOT_CHECKED, "new tensors", "no manifest says their seed")
        return
    differences = [
        f"{tensor.name} is not what seed {seed} gives"
        for tensor in new
        if tensor.name not in stored
        or b"".join(stored_chunks(merged, stored[tensor.name])) != b"".join(initial_bytes(tensor, seed))
    ]
    results.judge("new tensors", differences, f"{len(new)} as seed {seed} gives them")


def _check_files(merged: Source, manifest: Mapping, results: Results) -> None:
    """Configuration, tokenizer, template, sizes of pictures and code: positions and token ids are in no tensor."""
    files = manifest.get("output", {}).get("files")
    if not files:
        results.add(NOT_CHECKED, "other files", "no manifest says what they were")
        return
    differences = [
        f"{name} is not what was written" for name, digest in files.items() if sha256_of(merged, name) != digest
    ]
    results.judge("other files", differences, f"{len(files)} as they were written")


@torch.no_grad()
def _check_forward(
    merged: Source, vision: Source, language: Source, config: Any, longer: bool, results: Results
) -> None:
    """Both models of a pair are loaded one after the other, in the checkpoint's dtype."""
    from qwen_merge.architecture.modeling_qwen_merge_graft import QwenMergeGraftForConditionalGeneration
    from qwen_merge.architecture.projectors_qwen_merge_graft import in_units
    from qwen_merge.architecture.towers_qwen_merge_graft import features_of

    try:
        own_class = class_of(language)
    except UserError as error:
        own_class, why = None, str(error)
    if longer or own_class is None:
        results.add(NOT_CHECKED, "text logits", "the vocabulary has new rows" if longer else why)
    else:
        logits = text_logits(QwenMergeGraftForConditionalGeneration, merged.directory)
        plain = text_logits(own_class, local_directory(language), dtype=logits.dtype)
        results.judge("text logits", *difference(logits, plain, "logits of a text"))

    if config.vision_config.model_type == OWN.kind:
        why = "the encoder is code of its user's own, which runs by trust_remote_code and not here"
        results.add(NOT_CHECKED, "vision features", why)
        return
    with quiet():
        model = QwenMergeGraftForConditionalGeneration.from_pretrained(merged.directory, torch_dtype="auto").eval()
    tower, side = model.model.visual, config.vision_config.patch_size
    rows = getattr(config.vision_config, "image_size", 4 * side) // side
    grids = [(1, rows, rows)] * 2
    channels = 3 if config.is_native else config.vision_config.num_channels
    drawn = torch.Generator().manual_seed(0)
    patches = torch.randn(2 * rows**2, channels * config.frames * side**2, generator=drawn).to(tower.dtype)
    features = features_of(tower, patches, grids, config)
    del model, tower
    if config.is_native:
        own = _own_vlm(vision, features.dtype)
        unit = config.vision_config.spatial_merge_size
        inputs: list[torch.Tensor] = []
        own.merger.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        own(in_units(patches, grids, unit), grid_thw=torch.tensor(grids))
        plain = inputs[0].flatten(0, -2)
        features = in_units(features[:, : plain.shape[-1]], grids, unit)  # without DeepStack's levels
    else:
        plain = _own_features(vision, patches, rows, config)
    results.judge("vision features", *difference(features, plain, "features of two pictures"))


def _own_vlm(vision: Source, dtype: torch.dtype):
    """The tower of a Qwen VLM, as transformers loads it."""
    from transformers import AutoModelForImageTextToText

    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(local_directory(vision), torch_dtype=dtype).eval()
    return model.model.visual


def _own_features(vision: Source, patches: torch.Tensor, rows: int, config: Any) -> torch.Tensor:
    """Of square pictures, (patches, width): what the tower's own checkpoint gives behind its class tokens."""
    from transformers import AutoModel

    from qwen_merge.architecture.towers_qwen_merge_graft import _arguments

    with quiet():
        own = AutoModel.from_pretrained(local_directory(vision), torch_dtype=patches.dtype).eval()
    own = getattr(own, "vision_model", own)
    side = config.vision_config.patch_size
    squares = patches.unflatten(1, (-1, side, side)).unflatten(0, (-1, rows**2))
    arguments = _arguments(config.vision_config, squares, rows, rows)
    own_names = {"pixel_attention_mask": "attention_mask"}  # SigLIP 2's, below the model that AutoModel gives
    output = own(**{own_names.get(name, name): value for name, value in arguments.items()}, output_hidden_states=True)
    layer = config.vision_feature_layer
    states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    return states[:, -(rows**2) :].flatten(0, 1)
