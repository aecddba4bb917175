"""`qwen-merge verify`: proves that a checkpoint on the disk is the merge of its two sources.

One line per check: PASS, FAIL with what differs, or NOT CHECKED with the reason. A check that could not be made never
counts as passed, and the last line says how many there were of each kind.

    qwen-merge verify Qwen-Merge-VL-4B-base [--vlm-path … --llm-path …] [--no-forward]
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import cast

from qwen_merge import __version__
from qwen_merge.architecture import CODE_FILES
from qwen_merge.errors import UserError
from qwen_merge.merger.companions import CHAT_TEMPLATE, PREPROCESSOR, VIDEO_PREPROCESSOR
from qwen_merge.merger.configuration import MODEL_TYPE, RopeOptions
from qwen_merge.merger.convert import convert
from qwen_merge.merger.copying import BUFFER, read_exactly
from qwen_merge.merger.initialise import initial_bytes
from qwen_merge.merger.key_map import layout
from qwen_merge.merger.merge import MANIFEST, Prepared, prepare
from qwen_merge.merger.plan import FLOATS, PlannedTensor, layer_problems
from qwen_merge.merger.safetensors_file import ITEM_BYTES, StoredTensor
from qwen_merge.merger.sources import Source, open_source

GRAFT = "qwen_merge_graft"
SHOWN = 5  # differences of one kind that are spelled out
PASS, FAIL, NOT_CHECKED = "PASS", "FAIL", "NOT CHECKED"
SCOPE = (
    "it is for what qwen-merge merge and graft wrote, before training: a checkpoint that was trained, exported or "
    "split since has other weights than its sources, and no manifest"
)
# What is read of a manifest; a part stands behind the part that it is in.
MANIFEST_TYPES: dict[str, type | UnionType] = {
    "sources": dict,
    **{f"sources.{origin}": dict for origin in ("vlm", "llm")},
    **{f"sources.{origin}.{name}": str for origin in ("vlm", "llm") for name in ("path", "repo", "revision")},
    "options": dict,
    "options.dtype": str | None,
    "options.mrope_section": list | None,  # a graft that has positions of a text
    "new_layer": dict,
    "new_layer.seed": int,
    "overridden_by_materials": dict,
    "tensors": dict,
    "tensors.new_rows": dict,
    "output": dict,
    "output.files": dict,
    "versions": dict,
}
# Companions that this kit writes itself, or adapts: another version of it may write them otherwise.
OF_THIS_KIT = {"tokenizer_config.json", CHAT_TEMPLATE, PREPROCESSOR, VIDEO_PREPROCESSOR}
OF_THIS_KIT |= {path.name for path in CODE_FILES}


@dataclass
class Results:
    """What was found, printed as it comes."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, verdict: str, check: str, detail: str) -> None:
        self.lines.append((verdict, check, detail))
        print(f"{verdict:<12} {check:<16} {detail}", flush=True)

    def judge(self, check: str, differences: list[str], passed: str) -> None:
        """FAIL with the differences, or PASS with what was compared."""
        if not differences:
            self.add(PASS, check, passed)
            return
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        self.add(FAIL, check, "; ".join(differences[:SHOWN]) + more)

    def count(self, verdict: str) -> int:
        return sum(seen == verdict for seen, _, _ in self.lines)

    def conclude(self, directory: Path) -> int:
        """Print how many there were of each kind, and what is compared, where little was as it says; returns the code.

        Raises:
            UserError: nothing at all could be checked.
        """
        failed, skipped = self.count(FAIL), self.count(NOT_CHECKED)
        if skipped == len(self.lines):
            raise nothing_checked(directory, "; ".join(dict.fromkeys(why for _, _, why in self.lines)))
        if failed or skipped > self.count(PASS):
            print(f"{'NOTE':<12} {'verify':<16} {SCOPE}")
        print(f"{directory}: {self.count(PASS)} passed, {failed} failed, {skipped} not checked")
        return 1 if failed else 0


def nothing_checked(directory: Path, why: str) -> UserError:
    """For a checkpoint that there is nothing to compare with."""
    return UserError(
        f"nothing of {directory} could be checked: {why}.\nverify compares a checkpoint with its two sources; {SCOPE}. "
        "Verify the base that it was trained from, or name its sources with --vlm-path and --llm-path."
    )


def verify(
    directory: Path,
    *,
    vlm: str | None = None,
    llm: str | None = None,
    revision: str | None = None,
    forward: bool = True,
) -> int:
    """Check a merged checkpoint and print the results. vlm, llm: where its sources are; None: as its manifest says.

    Returns the exit code: 0 when nothing failed, 1 when something did.

    Raises:
        UserError: `directory` is no merged checkpoint at all, a source that was named cannot be read, or there is
            nothing to compare with.
    """
    merged = Source(directory, "merged")
    config = merged.read_json("config.json")
    if config.get("model_type") == GRAFT:
        from qwen_merge.graft.verify import verify as verify_graft

        return verify_graft(merged, vlm=vlm, llm=llm, revision=revision, forward=forward)
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{directory} has model_type {config.get('model_type')!r}; expected {MODEL_TYPE!r}, a merge's, or {GRAFT}."
        )
    manifest = read_manifest(merged)
    results = Results()
    tensors = _check_tensors(merged, config, results)
    vlm_source, vlm_reason = find_source(vlm, "vlm", revision, manifest)
    llm_source, llm_reason = find_source(llm, "llm", revision, manifest)
    reason = "; ".join(filter(None, (vlm_reason, llm_reason)))

    ready = _prepare_again(merged, vlm_source, llm_source, manifest, config, results, reason)
    _check_companions(merged, ready, manifest, reason, results)
    for origin, role in (("vlm", "VLM"), ("llm", "LLM")):
        check = f"copied from {role}"
        if tensors is None or ready is None:
            results.add(NOT_CHECKED, check, reason or "an earlier check failed")
        else:
            check_copied(merged, tensors, ready, origin, check, results)
    _check_new_layer(merged, tensors, config, manifest, results)
    _check_forward(directory, vlm_source, llm_source, (vlm_reason, llm_reason), forward, tensors is not None, results)

    return results.conclude(directory)


def read_manifest(merged: Source) -> dict:
    """The checkpoint's manifest; {} when it has none. One that says less is less of use, but no error.

    Raises:
        UserError: what it says is not what a merge writes there.
    """
    manifest = merged.read_json(MANIFEST) if merged.has(MANIFEST) else {}
    for place, kind in MANIFEST_TYPES.items():
        *parents, name = place.split(".")
        part = manifest
        for parent in parents:
            part = part.get(parent, {})
        if name in part and not isinstance(part[name], kind):
            raise UserError(
                f"{merged.path(MANIFEST)} has {place} {part[name]!r}, which no merge writes. Take the merge's own "
                "manifest, or remove the file: what rests on it is then not checked."
            )
    return manifest


def _check_tensors(merged: Source, config: dict, results: Results) -> dict[str, StoredTensor] | None:
    """Every tensor that the configuration describes is there, with the right shape and dtype, and no other."""
    try:
        tensors = cast("dict[str, StoredTensor]", merged.read_tensors())
        differences = layer_problems(config, len(tensors), len(tensors))
        expected = {} if differences else {name: shape for _, name, shape in layout(config)}
    except (UserError, KeyError, TypeError) as error:
        what = {KeyError: "config.json lacks ", TypeError: "config.json has fields of a wrong type: "}
        results.add(FAIL, "tensors", what.get(type(error), "") + str(error))
        return None
    said = next((stored for name, stored in FLOATS.items() if name == config.get("torch_dtype")), None)
    differences += [f"missing {name}" for name in expected if name not in tensors]
    differences += [f"unknown {name}" for name in tensors if name not in expected]
    differences += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    differences += [
        f"{name} has dtype {tensor.dtype}, config.json says {config.get('torch_dtype')}"
        for name, tensor in tensors.items()
        if tensor.dtype != said
    ]
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    results.judge("tensors", differences, f"{len(tensors)} with the right name, shape and dtype, {nbytes:,} bytes")
    return None if differences else tensors


def find_source(given: str | None, origin: str, revision: str | None, manifest: Mapping) -> tuple[Source | None, str]:
    """The source, or None and why there is none. One that the user names must exist."""
    role = origin.upper()
    if given:
        return open_source(given, role, None if os.path.isdir(os.path.expanduser(given)) else revision), ""
    known = manifest.get("sources", {}).get(origin, {})
    if "path" in known:
        if Path(known["path"]).is_dir():
            return open_source(known["path"], role), ""
        return None, f"the {role} is no longer at {known['path']} (say where with --{origin}-path)"
    if "repo" in known:
        from qwen_merge.merger.hub import HubSource

        try:
            return HubSource(known["repo"], role, known.get("revision"), offline=True), ""
        except UserError:
            return None, f"the {role} {known['repo']} is not in the local cache (download it with --{origin}-path)"
    return None, f"no {MANIFEST} says where the {role} is (say so with --{origin}-path)"


def _prepare_again(
    merged: Source,
    vlm: Source | None,
    llm: Source | None,
    manifest: Mapping,
    config: dict,
    results: Results,
    reason: str,
) -> Prepared | None:
    """Plan the merge anew from the sources; its configuration must be the one on the disk."""
    if vlm is None or llm is None:
        results.add(NOT_CHECKED, "configuration", reason)
        return None
    options = manifest.get("options", {})
    sections = options.get("mrope_section")  # config.json's own would agree with itself whatever they are
    dtype = options.get("dtype")
    # Where the materials were is not known, but what they gave is here. What was changed since counts for nothing.
    overrides = {
        name: merged.path(name).read_bytes()
        for name, digest in manifest.get("overridden_by_materials", {}).items()
        if sha256_of(merged, name) == digest
    }
    try:
        rope = RopeOptions(tuple(sections) if sections else None, drop_rope_scaling=True)
        ready = prepare(vlm, llm, overrides, rope, dtype if dtype in FLOATS else None)
    except UserError as error:
        results.add(FAIL, "configuration", f"these sources do not make this checkpoint: {error}")
        return None
    expected = ready.plan.config
    # A trainer or a save by transformers may add fields; those of the merge must have the merge's values.
    differences = [
        f"{name} is {config.get(name)!r}, the sources give {value!r}"
        for name, value in expected.items()
        if config.get(name) != value and name not in ("torch_dtype", "vision_config")
    ]
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    differences += [
        f"vision_config.{name} is {vision.get(name)!r}, the sources give {value!r}"
        for name, value in expected["vision_config"].items()
        if vision.get(name) != value
    ]
    if not differences and expected["torch_dtype"] != config.get("torch_dtype"):
        differences.append(f"torch_dtype is {config.get('torch_dtype')}, the sources give {expected['torch_dtype']}")
    results.judge("configuration", differences, "every field as the two sources give it, token ids as the tokenizer's")
    return ready


def _check_companions(merged: Source, ready: Prepared | None, manifest: Mapping, reason: str, results: Results) -> None:
    """Every file that the merge writes beside the weights is there, with the same bytes."""
    files = ready.companions.files if ready else {}
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    expected |= manifest.get("overridden_by_materials", {})
    differences = [f"missing {name}" for name in expected if not merged.has(name)]
    differing = [name for name in expected if merged.has(name) and sha256_of(merged, name) != expected[name]]
    made_by = manifest.get("versions", {}).get("qwen_merge", __version__)
    unknown = sorted(OF_THIS_KIT.intersection(differing)) if made_by != __version__ else []
    differences += [f"{name} is not what the merge writes" for name in differing if name not in unknown]
    if not differences and ready is None:
        results.add(NOT_CHECKED, "companion files", reason or "an earlier check failed")
    elif not differences and unknown:
        results.add(NOT_CHECKED, "companion files", f"{made_by} wrote {', '.join(unknown)}, this is {__version__}")
    else:
        results.judge("companion files", differences, f"{len(expected)} files, equal byte for byte")


def sha256_of(merged: Source, file: str) -> str | None:
    """None: there is no such file."""
    return hashlib.sha256(merged.path(file).read_bytes()).hexdigest() if merged.has(file) else None


def check_copied(
    merged: Source, tensors: Mapping[str, StoredTensor], ready: Prepared, origin: str, check: str, results: Results
) -> None:
    """Each copied tensor against its source, byte by byte (through the same conversion where one was asked for)."""
    source = ready.vlm if origin == "vlm" else ready.llm
    differences, nbytes = [], 0
    planned = ready.plan.of(origin)
    for tensor in planned:
        found = tensors.get(tensor.name)
        if found is None or found.dtype != tensor.dtype or found.shape != tensor.shape:
            differences.append(f"{tensor.name} is not there as planned")
        elif not _equal(stored_chunks(merged, found), _planned_chunks(source, tensor)):
            differences.append(f"{tensor.name} differs from its source")
        nbytes += tensor.nbytes
    how = (
        "converted as the merge does"
        if any(t.stored and t.stored.dtype != t.dtype for t in planned)
        else "byte for byte"
    )
    results.judge(check, differences, f"{len(planned)} tensors, {nbytes:,} bytes, equal {how}")


def stored_chunks(source: Source, tensor: StoredTensor, step: int = BUFFER) -> Iterator[bytes]:
    path = source.path(tensor.file)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start in range(tensor.start, tensor.end, step):
            yield read_exactly(descriptor, start, min(step, tensor.end - start), path)
    finally:
        os.close(descriptor)


def _planned_chunks(source: Source, tensor: PlannedTensor) -> Iterator[bytes]:
    assert tensor.stored is not None
    if tensor.dtype == tensor.stored.dtype:
        return stored_chunks(source, tensor.stored)
    stored = tensor.stored.dtype
    step = BUFFER // ITEM_BYTES[tensor.dtype] * ITEM_BYTES[stored]  # gives BUFFER bytes once converted
    return (convert(chunk, stored, tensor.dtype, tensor.name) for chunk in stored_chunks(source, tensor.stored, step))


def _equal(first: Iterator[bytes], second: Iterator[bytes]) -> bool:
    return all(a == b for a, b in itertools.zip_longest(first, second))


def _check_new_layer(
    merged: Source, tensors: Mapping[str, StoredTensor] | None, config: dict, manifest: Mapping, results: Results
) -> None:
    """The new layer is what the manifest's seed gives."""
    if tensors is None:
        results.add(NOT_CHECKED, "new layer", "an earlier check failed")
        return
    seed, differences = manifest.get("new_layer", {}).get("seed"), []
    if seed is None:
        results.add(NOT_CHECKED, "new layer", f"no {MANIFEST} says its seed")
        return
    for row, name, shape in layout(config):
        if row.origin != "new":
            continue
        expected = initial_bytes(PlannedTensor(name, tensors[name].dtype, shape, "new"), seed)
        if b"".join(stored_chunks(merged, tensors[name])) != b"".join(expected):
            differences.append(f"{name} is not what seed {seed} gives")
    results.judge("new layer", differences, f"as seed {seed} gives it")


def _check_forward(
    directory: Path,
    vlm: Source | None,
    llm: Source | None,
    reasons: tuple[str, str],
    wanted: bool,
    sound: bool,
    results: Results,
) -> None:
    """What the models compute: text logits against the LLM's, vision features against the VLM's."""
    checks: tuple[tuple[str, Source | None, str], ...] = (
        ("text logits", llm, reasons[1]),
        ("vision features", vlm, reasons[0]),
    )
    if not wanted or not sound:
        why = "--no-forward" if not wanted else "an earlier check failed"
        for check, _, _ in checks:
            results.add(NOT_CHECKED, check, why)
        return
    from qwen_merge.merger import verify_forward

    compare: dict[str, Callable] = {
        "text logits": verify_forward.compare_text,
        "vision features": verify_forward.compare_vision,
    }
    for check, source, reason in checks:
        if source is None:
            results.add(NOT_CHECKED, check, reason)
        else:
            differences, passed = compare[check](directory, source)
            results.judge(check, differences, passed)
