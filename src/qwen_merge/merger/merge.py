"""A merge from its sources to a complete directory: the order of events.

Everything that can be refused is refused before the first byte is written; what is written appears at the output path
in one step (staging.py), with a manifest that says where each part came from.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from qwen_merge import __version__
from qwen_merge.errors import UserError
from qwen_merge.merger import companions as companion_files
from qwen_merge.merger.configuration import RopeOptions, check_kinds
from qwen_merge.merger.copying import Hasher, HashJob, write_shard
from qwen_merge.merger.initialise import GENERATOR, STANDARD_DEVIATION
from qwen_merge.merger.key_map import is_vision
from qwen_merge.merger.plan import FLOATS, MergePlan, merge_plan
from qwen_merge.merger.progress import Progress
from qwen_merge.merger.shards import INDEX_NAME, Shard, index_json, parse_size, split_shards
from qwen_merge.merger.sources import Source, open_source
from qwen_merge.merger.staging import check_space, remove_stale, resolved_output, staged

MANIFEST = "merge_manifest.json"
DEFAULT_SEED = 42
SPARE_BYTES = 64 << 20  # for small files and the file system's own needs


@dataclass(frozen=True)
class MergeOptions:
    """What a user may choose. Paths are local directories or, for the two sources, hub ids."""

    vlm: str
    llm: str
    output: Path
    materials: Path | None = None
    vlm_revision: str | None = None
    llm_revision: str | None = None
    max_shard_size: str = "5GB"
    seed: int = DEFAULT_SEED
    dtype: str | None = None
    rope: RopeOptions = field(default_factory=RopeOptions)


@dataclass(frozen=True)
class Prepared:
    """Both sources, read and found to fit."""

    vlm: Source
    llm: Source
    companions: companion_files.Companions
    plan: MergePlan


@dataclass(frozen=True)
class MergeReport:
    """What was done, for whoever asked. seconds: wall time, downloads included."""

    output: Path
    plan: MergePlan
    shards: list[str]
    nbytes: int
    seconds: float


def prepare(vlm: Source, llm: Source, overrides: Mapping[str, bytes], rope: RopeOptions, dtype: str | None) -> Prepared:
    """Read configurations, tokenizer and headers of both sources and plan the merge. Writes nothing.

    overrides: companion files that replace the sources', by name.

    Raises:
        UserError: the sources are broken or do not fit.
    """
    vlm_config, llm_config = vlm.read_json("config.json"), llm.read_json("config.json")
    check_kinds(vlm_config, llm_config)  # before the other files: of swapped sources those are missing too
    companions = companion_files.gather(vlm, llm, overrides)
    vlm_tensors = vlm.read_tensors(is_vision)
    llm_tensors = cast(Mapping, llm.read_tensors())  # every file was opened: no None
    plan = merge_plan(
        vlm_config, vlm_tensors, llm_config, llm_tensors, token_ids=companions.token_ids, rope=rope, dtype=dtype
    )
    problems = companion_files.patch_problems(companions.files, plan.config["vision_config"])
    if problems:
        raise UserError.from_list("the preprocessor and the vision tower do not fit:", problems)
    plan.notes.extend(companions.notes)
    return Prepared(vlm, llm, companions, plan)


def merge(options: MergeOptions) -> MergeReport:
    """Merge two checkpoints into `options.output`.

    Raises:
        UserError: whatever a user can mend; nothing is left at or beside the output then.
    """
    started = time.monotonic()
    output = resolved_output(Path(os.path.expanduser(options.output)))
    max_shard_bytes = parse_size(options.max_shard_size)
    if options.dtype is not None and options.dtype not in FLOATS:
        raise UserError(f"--dtype is {options.dtype!r}; expected one of {', '.join(FLOATS)}.")
    if not 0 <= options.seed < 2**64:
        raise UserError(f"--seed is {options.seed}; expected a number from 0 to 2**64 - 1.")
    if output.parent.is_dir():
        remove_stale(output)  # before the space is looked at: a dead merge may take up what is needed
    vlm = open_source(options.vlm, "VLM", options.vlm_revision)
    llm = open_source(options.llm, "LLM", options.llm_revision)
    refuse_inside(output, vlm, llm)
    overrides = companion_files.read_materials(options.materials)
    ready = prepare(vlm, llm, overrides, options.rope, options.dtype)
    return write(output, ready, options.seed, max_shard_bytes, started)


def refuse_inside(output: Path, *sources: Source) -> None:
    """Raises UserError when the output lies in a source, which stays as it is."""
    for source in sources:
        place = source.origin().get("path")  # a hub source has none
        if place is not None and output.is_relative_to(place):
            raise UserError(
                f"--output-path {output} is inside the {source.role} {place}, which a merge leaves as it is. "
                "Choose a place outside."
            )


def write(output: Path, ready: Prepared, seed: int, max_shard_bytes: int, started: float) -> MergeReport:
    """Write what was planned; it appears at `output` complete or not at all. started: `time.monotonic()` back then."""
    shards = split_shards(ready.plan.tensors, max_shard_bytes)
    nbytes = sum(shard.nbytes for shard in shards)
    check_space(output, nbytes + sum(map(len, ready.companions.files.values())) + SPARE_BYTES)

    files = dict(ready.companions.files)
    files["config.json"] = (json.dumps(ready.plan.config, indent=2, ensure_ascii=False) + "\n").encode()
    index = index_json(shards)
    if index:
        files[INDEX_NAME] = index.encode()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    with staged(output) as staging:
        _write_weights(staging, shards, ready, seed, digests)
        for name, content in files.items():
            (staging / name).write_bytes(content)
    return MergeReport(output, ready.plan, [shard.name for shard in shards], nbytes, time.monotonic() - started)


def _write_weights(staging: Path, shards: list[Shard], ready: Prepared, seed: int, files: dict[str, str]) -> None:
    """Write the shards while the sources are hashed, then the manifest that says so. files: digests of the others."""
    sources = {"vlm": ready.vlm, "llm": ready.llm}
    paths: dict[tuple[str, str], Path] = {}

    def source_path(origin: str, file: str) -> Path:
        if (origin, file) not in paths:
            paths[origin, file] = sources[origin].path(file)
        return paths[origin, file]

    jobs = _hash_jobs(ready.plan, source_path)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    with Progress(total, "writing weights") as progress, Hasher(jobs, lambda: progress.done) as hasher:
        for shard in shards:
            write_shard(staging, shard, source_path, seed, progress.update)
        hasher.wait()
    manifest = _manifest(ready, shards, jobs, hasher.digests, seed)
    manifest["output"]["files"] = files
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hash_jobs(plan: MergePlan, source_path: Callable[[str, str], Path]) -> list[HashJob]:
    """The LLM's files are hashed whole; of a VLM's file only the header and the vision tower's ranges are read."""
    ranges: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for tensor in plan.tensors:
        if tensor.stored is None:
            continue
        key = (tensor.origin, tensor.stored.file)
        if key not in ranges:
            with source_path(*key).open("rb") as opened:
                ranges[key] = [(0, 8 + int.from_bytes(opened.read(8), "little"))]
        first, last = ranges[key][-1]
        if last == tensor.stored.start:
            ranges[key][-1] = (first, tensor.stored.end)
        else:
            ranges[key].append((tensor.stored.start, tensor.stored.end))
    jobs = []
    for key, read in ranges.items():
        path = source_path(*key)
        jobs.append(HashJob(key, path, ((0, path.stat().st_size),) if key[0] == "llm" else tuple(read)))
    return jobs


def _manifest(
    ready: Prepared, shards: list[Shard], jobs: list[HashJob], digests: dict[tuple[str, str], str], seed: int
) -> dict:
    """Where every part came from. No times and no host: the same merge writes the same bytes."""
    import numpy

    plan = ready.plan
    new_rows = {tensor.name: list(tensor.rows.numbers) for tensor in plan.tensors if tensor.rows is not None}
    sources = {}
    for origin, source in (("vlm", ready.vlm), ("llm", ready.llm)):
        files: dict[str, dict] = {}
        for name in _small_files(origin, source, ready):
            content = source.path(name).read_bytes()
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for job in jobs:
            if job.key[0] != origin:
                continue
            size = job.path.stat().st_size
            if job.ranges == ((0, size),):
                files[job.key[1]] = {"bytes": size, "sha256": digests[job.key]}
            else:  # not the file's own sha256: the rest of the file was never read
                files[job.key[1]] = {
                    "bytes": size,
                    "sha256_of_ranges": digests[job.key],
                    "ranges": [list(pair) for pair in job.ranges],
                }
        sources[origin] = {**source.origin(), "files": files}
    return {
        "format": 1,
        "versions": {"qwen_merge": __version__, "python": platform.python_version(), "numpy": numpy.__version__},
        "sources": sources,
        "tensors": {
            "copied": {origin: len(plan.of(origin)) for origin in ("vlm", "llm")},
            "initialised": [tensor.name for tensor in plan.of("new")],
            "dropped": plan.dropped,
            **({"new_rows": new_rows} if new_rows else {}),
        },
        "new_layer": {"seed": seed, "standard_deviation": STANDARD_DEVIATION, "generator": GENERATOR},
        "options": {
            "dtype": _converted_to(plan),
            "mrope_section": (plan.config.get("rope_scaling") or plan.config)["mrope_section"],
        },
        "overridden_by_materials": {
            name: hashlib.sha256(ready.companions.files[name]).hexdigest() for name in ready.companions.overridden
        },
        "output": {
            "bytes": sum(shard.nbytes for shard in shards),
            "parameters_in_bytes": plan.nbytes,
            "shards": [shard.name for shard in shards],
        },
        "notes": plan.notes,
    }


def _small_files(origin: str, source: Source, ready: Prepared) -> list[str]:
    names = ["config.json", INDEX_NAME]
    if origin == "llm":
        names += [*companion_files.TOKENIZER_FILES, companion_files.GENERATION]
    else:
        names += [companion_files.PREPROCESSOR, companion_files.VIDEO_PREPROCESSOR]
    return [name for name in names if source.has(name) and name not in ready.companions.overridden]


def _converted_to(plan: MergePlan) -> str | None:
    """The dtype that everything was converted to, or None when each source's was kept."""
    kept = all(tensor.stored is None or tensor.stored.dtype == tensor.dtype for tensor in plan.tensors)
    return None if kept else plan.config["torch_dtype"]
