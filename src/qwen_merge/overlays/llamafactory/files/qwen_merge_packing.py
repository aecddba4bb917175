"""Packing for `qwen2_5_vl_merge` and grafts (`packing: true`, `neat_packing: true`): samples share a row and nothing else.

Put here by `qwen-merge overlay apply llamafactory`. LLaMA-Factory's own packing plans a thousand rows at a time, pads
every pack to cutoff_len, masks attention with a square of all its tokens, and copies all pictures into its cache twice.
Here lengths are measured once and cached (two numbers a sample), packs are planned over the whole epoch, and samples
are read, aligned and tokenised by the workers of the data loader when their turn comes. In a batch nothing is padded:
attention gets the offsets of the samples, positions are those that each sample has alone.
"""

import hashlib
import json
import os
import sys
from copy import copy
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Iterator, Optional

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from ..extras import logging
from ..extras.constants import IGNORE_INDEX
from .collator import MultiModalDataCollatorForSeq2Seq
from .converter import get_dataset_converter
from .data_utils import merge_dataset
from .parser import get_dataset_list
from .processor import SupervisedDatasetProcessor
from .qwen_merge_plan import Plan, PlanSampler, make_plan, patch_cost


if TYPE_CHECKING:
    from ..hparams import DataArguments


logger = logging.get_logger(__name__)

TEMPLATES = ("qwen_merge_vl", "qwen_merge_vl_pt")
STREAMED_STEPS = 16  # packs of this many steps are planned at a time when the data are streamed


def packs_samples(data_args: "DataArguments", stage: str) -> bool:
    r"""Whether packs are planned here. Also without `neat_packing`, where LLaMA-Factory lets samples see each other."""
    return bool(stage == "sft" and data_args.packing and data_args.template in TEMPLATES)


class Grids:
    r"""In place of the image processor: the grid of patches of each picture or video, from its size alone."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.patches = self.placeholders = 0  # of all that were seen since they were last set to 0

    def __getattr__(self, name: str) -> Any:
        if name == "real":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.real, name)

    def _grid(self, image: "Image.Image", frames: int) -> tuple[int, int, int]:
        if hasattr(self.real, "grid"):  # a graft's
            return -(-frames // self.real.temporal_patch_size), *self.real.grid(image.height, image.width)[1:]
        patch, size = self.real.patch_size, self.real.size
        height, width = smart_resize(
            image.height,
            image.width,
            factor=patch * self.real.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return -(-frames // self.real.temporal_patch_size), height // patch, width // patch

    def __call__(self, images: Optional[list], videos: Optional[list] = None, **kwargs) -> dict[str, "torch.Tensor"]:
        if videos is None:
            name, grids = "image_grid_thw", [self._grid(image, 1) for image in images or []]
        else:
            name, grids = "video_grid_thw", [self._grid(video[0], len(video)) for video in videos]
        patches = [frames * height * width for frames, height, width in grids]
        self.patches += sum(patches)
        of_graft = hasattr(self.real, "tokens")
        self.placeholders += sum(map(self.real.tokens, grids) if of_graft else (n // self.real.merge_size**2 for n in patches))
        return {name: torch.tensor(grids)}


def outline(image: Any) -> "Image.Image":
    r"""A blank picture of the size of `image`, of which no more than the header is read."""
    if isinstance(image, dict):
        image = image["path"] if image["bytes"] is None else image["bytes"]
    if not isinstance(image, Image.Image):
        image = Image.open(BytesIO(image) if isinstance(image, bytes) else image)
    return Image.new("L", image.size)


class Samples:
    r"""Rows of one data set as LLaMA-Factory's features, without a look at the pixels."""

    def __init__(self, align: Callable[[dict], dict], processor: SupervisedDatasetProcessor) -> None:
        self.align, self.processor = align, copy(processor)
        mm_processor = self.processor.processor = copy(processor.processor)
        self.grids = mm_processor.image_processor = Grids(mm_processor.image_processor)
        self.picture_ids = picture_ids(processor.template, processor.tokenizer, processor.processor)

    def encode(self, row: dict) -> Optional[dict[str, Any]]:
        r"""One feature, or None when the row is no conversation or `cutoff_len` cuts into a picture."""
        aligned = dict(self.align(row))
        images = aligned["_images"]
        aligned["_images"] = images and [outline(image) for image in images]
        features = self.processor.preprocess_dataset({name: [value] for name, value in aligned.items()})
        patches, self.grids.patches = self.grids.patches, 0
        placeholders, self.grids.placeholders = self.grids.placeholders, 0
        if not features.get("input_ids"):
            return None
        feature = {name: values[0] for name, values in features.items()}
        feature |= {"images": images, "patches": patches}
        found = sum(feature["input_ids"].count(number) for number in self.picture_ids)
        return feature if found == placeholders else None

    def measure(self, rows: dict[str, list]) -> dict[str, list[int]]:
        r"""Tokens and patches of each row of a batch; no tokens for a row that cannot be trained on."""
        features = [self.encode(dict(zip(rows, values))) for values in zip(*rows.values())]
        return {
            "tokens": [len(feature["input_ids"]) if feature else 0 for feature in features],
            "patches": [feature["patches"] if feature else 0 for feature in features],
        }


def picture_ids(template, tokenizer, processor) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(template.mm_plugin.spelling(processor)))


@dataclass
class PackedDataset(TorchDataset):
    r"""The packs of a plan. `sources`: (rows, samples) of each set; `source`, `row`: where each planned sample is."""

    sources: list[tuple["Dataset", Samples]]
    source: np.ndarray
    row: np.ndarray
    plan: Plan
    seed: int
    is_packed: ClassVar[bool] = True

    @property
    def sampler(self) -> PlanSampler:
        r"""A new one for each training: it remembers how far its own has come."""
        return PlanSampler(self.plan, self.seed)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> dict[str, list[dict[str, Any]]]:
        features = []
        for sample in self.plan.pack(number):
            rows, samples = self.sources[self.source[sample]]
            features.append(samples.encode(rows[int(self.row[sample])]))
        return {"pack": features}


@dataclass
class StreamedPacks(IterableDataset):
    r"""Packs of a stream, planned for a few steps at a time; samples of packs with much room wait for the next ones.

    `rows`: what is read, in its own order; each round shuffles it otherwise. There is no end: Trainer counts all steps
    of a stream as one epoch, and one that is resumed must find the steps of all rounds in it.
    """

    rows: Any
    samples: Samples
    capacity: int
    group: int
    seed: int
    buffer: int
    patch_cost: float
    is_packed: ClassVar[bool] = True

    def __iter__(self) -> Iterator[dict[str, list[dict[str, Any]]]]:
        waiting: list[dict[str, Any]] = []
        wanted = STREAMED_STEPS * self.group * self.capacity
        for epoch in count():
            # Not by set_epoch: its number is one for all workers, of which some are ahead of others.
            rows = self.rows.shuffle(seed=self.seed + epoch, buffer_size=self.buffer)
            tokens, found = sum(len(feature["input_ids"]) for feature in waiting), False
            for feature in filter(None, map(self.samples.encode, rows)):
                found = True
                waiting.append(feature)
                tokens += len(feature["input_ids"])
                if tokens >= wanted:
                    packs, waiting = self._full_packs(waiting)
                    tokens = sum(len(feature["input_ids"]) for feature in waiting)
                    yield from packs
            if not found:  # a worker more than there are shards
                return

            # Nothing waits longer than its round, or short samples would for ever: they are what fills packs last.
            packs = self._packs(waiting)
            whole = len(packs) - len(packs) % self.group
            yield from packs[:whole]
            waiting = [feature for pack in packs[whole:] for feature in pack["pack"]]  # too few for a step

    def _packs(self, features: list[dict[str, Any]]) -> list[dict[str, list[dict[str, Any]]]]:
        lengths = np.array([len(feature["input_ids"]) for feature in features])
        patches = np.array([feature["patches"] for feature in features])
        plan = make_plan(lengths, patches, self.capacity, self.group, self.seed, self.patch_cost)
        return [{"pack": [features[i] for i in plan.pack(number)]} for number in range(len(plan))]

    def _full_packs(self, features: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        r"""Whole steps of packs, and the samples of the emptiest packs, which wait."""
        packs = self._packs(features)
        steps = [packs[i : i + self.group] for i in range(0, len(packs), self.group)]
        room = [
            max(self.capacity - sum(len(f["input_ids"]) for f in pack["pack"]) for pack in step) for step in steps
        ]
        emptiest = int(np.argmax(room))
        late = [feature for pack in steps.pop(emptiest) for feature in pack["pack"]]
        return [pack for step in steps for pack in step], late


def get_packed_dataset(template, model_args, data_args, training_args, tokenizer, processor) -> dict[str, Any]:
    r"""The data sets of a launch with packing, in place of `get_dataset`. An eval_dataset is not packed."""
    from .loader import _load_single_dataset as load
    from .loader import get_dataset

    module: dict[str, Any] = {}
    if data_args.eval_dataset is not None:
        plain = copy(data_args)
        plain.dataset, plain.packing, plain.neat_packing = None, False, False
        module = get_dataset(template, model_args, plain, training_args, "sft", tokenizer, processor)

    if data_args.val_size > 1e-6:
        _stop("val_size cannot be taken from packed data. Name a set of its own: eval_dataset.")
    if data_args.tokenized_path is not None:
        _stop("tokenized_path is not for packed data, whose pictures stay where they are. Remove it.")
    if data_args.streaming and training_args.max_steps <= 0:
        _stop("A stream has no end: max_steps must say how many steps are trained, for instance max_steps: 1000.")
    if not data_args.neat_packing:
        logger.warning_rank0(
            f"packing with template {data_args.template}: samples of a pack never see each other, as with neat_packing."
        )
    whole = copy(data_args)
    whole.cutoff_len += 1  # LLaMA-Factory takes one off for the padding of its own packs
    make = SupervisedDatasetProcessor(template=template, tokenizer=tokenizer, processor=processor, data_args=whole)
    training_args.accelerator_config.non_blocking = training_args.dataloader_pin_memory
    group = training_args.world_size * training_args.per_device_train_batch_size
    cost = _patch_cost(model_args, data_args)
    attributes = get_dataset_list(data_args.dataset, data_args.dataset_dir)
    if data_args.streaming:
        training_args.accelerator_config.dispatch_batches = False  # each rank reads the stream; packs do not travel
        sets = [load(attribute, model_args, data_args, training_args) for attribute in attributes]
        rows = merge_dataset(sets, data_args, training_args.seed)
        workers = training_args.dataloader_num_workers
        if workers and rows.num_shards % workers:
            logger.warning_rank0(
                f"The stream has {rows.num_shards} shards for {workers} workers, each of which goes round its own: some "
                "are read more often than others. Set dataloader_num_workers to a divisor."
            )
        samples = Samples(_identity, make)
        settings = (whole.cutoff_len, group, training_args.seed, data_args.buffer_size, cost)
        packs = StreamedPacks(rows, samples, *settings)
        return {**module, "train_dataset": packs}

    data_args = copy(data_args)
    data_args.align_when_read = True
    sources, references = [], []
    with training_args.main_process_first(desc="measure samples", local=(not data_args.data_shared_file_system)):
        for number, attribute in enumerate(attributes):
            rows = load(attribute, model_args, data_args, training_args)
            samples = Samples(get_dataset_converter(attribute.formatting, attribute, data_args), make)
            lengths = rows.map(
                samples.measure,
                batched=True,
                batch_size=data_args.preprocessing_batch_size,
                remove_columns=rows.column_names,
                num_proc=data_args.preprocessing_num_workers,
                load_from_cache_file=(not data_args.overwrite_cache) or (training_args.local_process_index != 0),
                desc="Measuring samples for packing",
            )
            sources.append((rows, samples))
            columns = {"source": np.full(len(rows), number), "row": np.arange(len(rows))}
            measured = {name: np.asarray(lengths[name]) for name in ("tokens", "patches")}
            references.append(Dataset.from_dict({**columns, **measured}))

    table = merge_dataset(references, data_args, training_args.seed)
    source, row, tokens, patches = (np.asarray(table[name]) for name in ("source", "row", "tokens", "patches"))
    kept = tokens > 0
    if not kept.all():
        logger.warning_rank0(
            f"{(~kept).sum():,} of {len(kept):,} samples are left out: no conversation, or a picture that cutoff_len "
            f"{whole.cutoff_len} cuts. First: row {row[~kept][0]} of {attributes[source[~kept][0]].dataset_name}."
        )
    if not kept.any():
        _stop("No sample is left to train on. `qwen-merge data check RECIPE` says why.")
    plan = make_plan(tokens[kept], patches[kept], whole.cutoff_len, group, training_args.seed, cost)
    logger.info_rank0(
        f"Packing: {len(plan.members):,} samples in {len(plan):,} packs of {plan.capacity:,} tokens, "
        f"{plan.fill:.1%} full."
    )
    _check_plan(plan, source[kept], row[kept], training_args)
    packs = PackedDataset(sources, source[kept], row[kept], plan, training_args.seed)
    return {**module, "train_dataset": packs}


def _patch_cost(model_args, data_args) -> float:
    from ..hparams import FinetuningArguments
    from ..model.loader import load_config
    from ..model.model_utils.qwen_merge_parts import PARTS

    config = load_config(model_args)
    if config.model_type not in PARTS:
        known = " and ".join(PARTS)
        _stop(f"packing with template {data_args.template} is for {known}, and this is {config.model_type}.")
    if config.text_config.model_type == "qwen3_moe":
        _stop(
            "Qwen3-MoE takes no packed samples: transformers' layers do not hand on where they end, and they would see "
            "each other. Remove neat_packing and packing; group_by_length: true saves padding."
        )
    recipe = getattr(data_args, "finetuning_args", None) or FinetuningArguments()  # set by train/sft/workflow.py
    adapts = recipe.finetuning_type == "lora"
    return patch_cost(
        config,
        not recipe.freeze_vision_tower,
        not recipe.freeze_multi_modal_projector,
        not recipe.freeze_language_model and not adapts,
        adapts,
    )


def _identity(row: dict) -> dict:
    return row


def _check_plan(plan: Plan, source: np.ndarray, row: np.ndarray, training_args) -> None:
    r"""Refuse to resume with another plan: steps would be skipped that were never taken, and others taken twice."""
    digest = hashlib.sha256()
    for array in (plan.members, plan.offsets, source, row):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    now: dict[str, Any] = {"packs": len(plan), "samples": len(plan.members), "group": plan.group}
    now |= {"patch_cost": plan.patch_cost, "sha256": digest.hexdigest()}
    path = os.path.join(training_args.output_dir, "packing.json")
    if training_args.resume_from_checkpoint and os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        if before != now:
            _stop(
                f"The run that is resumed packed its samples otherwise ({before}, now {now}): data, cutoff_len, seed, "
                "batch size, the number of ranks or what trains changed. Set them as they were, or begin anew in another output_dir."
            )
    if training_args.should_save:
        os.makedirs(training_args.output_dir, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(now, file)


def collate_packs(collator: MultiModalDataCollatorForSeq2Seq, packs: list[dict]) -> dict[str, Any]:
    r"""One row of all samples of all packs, each with the positions that it has alone.

    Returns input_ids and labels (1, tokens), position_ids (3, 1, tokens), the offsets of the samples (samples + 1),
    the longest sample, and the pictures in the order of their samples; and what the model would have to ask the device
    for (`KNOWN` in its module): lengths, grids, and the places of pictures' tokens and of labels.
    """
    features = [{k: v for k, v in feature.items() if k != "patches"} for pack in packs for feature in pack["pack"]]
    batch = MultiModalDataCollatorForSeq2Seq.__call__(collator, features)
    attention_mask = batch.pop("attention_mask").bool()
    # Where no sample has a picture, LLaMA-Factory puts one behind the mask, so that all ranks run the vision tower.
    kinds = picture_ids(collator.template, collator.tokenizer, collator.processor)
    keep = attention_mask | torch.isin(batch["input_ids"], torch.tensor(kinds))
    labels = batch["labels"].masked_fill(~attention_mask, IGNORE_INDEX)
    labels[torch.arange(len(labels)), keep.int().argmax(1)] = IGNORE_INDEX  # what stands before does not predict it
    lengths = keep.sum(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    batch.pop("rope_deltas", None)
    ids, labels = batch["input_ids"][keep], labels[keep]
    grids = [batch[name].tolist() for name in ("image_grid_thw", "video_grid_thw") if name in batch]
    batch.update(
        input_ids=ids[None],
        labels=labels[None],
        position_ids=batch["position_ids"][:, keep][:, None],
        cu_seq_lens_q=offsets,
        cu_seq_lens_k=offsets,
        max_length_q=longest,
        max_length_k=longest,
        samples=lengths.tolist(),
        grids=sum(grids, []),
        features=torch.cat([(ids == kind).nonzero().squeeze(1) for kind in kinds]),
        labelled=(labels[1:] != IGNORE_INDEX).nonzero().squeeze(1),
    )
    return {
        name: value.to(collator.compute_dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def _stop(message: str) -> None:
    logger.error(message)
    sys.exit(2)
