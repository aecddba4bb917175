"""What a set is and how it was made: `<output>/<file_name>.manifest.json`, beside the folder, never in it.

LLaMA-Factory wants one file type in a set's folder. The manifest holds no time and no host: the same input and options
give the same manifest. A restart compares its options with the ones recorded and refuses a difference.
"""

import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, field, fields
from pathlib import Path

from qwen_merge.data.counts import Counts
from qwen_merge.data.disk import told
from qwen_merge.data.journal import write_whole
from qwen_merge.data.shards import ShardInfo
from qwen_merge.errors import UserError

PACKAGES = ("qwen-merge", "datasets", "pyarrow", "pillow")


def package_versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that decide what a set's bytes are; a missing one is left out."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass
class Manifest:
    """`source`: hub id or local path; `revision`: the hub's commit, or each local file's place, size and digest."""

    name: str
    source: str
    revision: object
    options: dict
    seed: int
    counts: Counts
    shards: list[ShardInfo]
    versions: dict[str, str] = field(default_factory=package_versions)
    extra: dict = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file complete or not at all.

        Raises:
            ValueError: the counts do not add up, which only a bug can bring about.
        """
        in_shards = sum(shard.rows for shard in self.shards)
        if self.counts.rows_out != in_shards:
            raise ValueError(f"{self.name}: {self.counts.rows_out} rows were counted, the shards hold {in_shards}")
        if self.counts.rows_in != self.counts.rows_out + self.counts.dropped:
            raise ValueError(f"{self.name}: {self.counts.to_json()} does not account for every row")
        write_json(path, self.to_json())

    def to_json(self) -> dict:
        return {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "options": self.options,
            "seed": self.seed,
            **self.counts.to_json(),
            "shards": [shard.to_json() for shard in self.shards],
            "versions": self.versions,
            "extra": self.extra,
        }

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest.

        Raises:
            UserError: the file is not a manifest of this kit.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            counts = Counts.from_json({key: data.pop(key) for key in ("rows_in", "rows_out", "drops")})
            shards = [ShardInfo(**shard) for shard in data.pop("shards")]
            if not all(isinstance(number, int) for number in (counts.rows_in, counts.rows_out)):
                raise TypeError("rows_in and rows_out are not numbers")
            return cls(counts=counts, shards=shards, **{key: data[key] for key in _PLAIN})
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a manifest of `qwen-merge data` ({error!r}). Remove it, or make the set anew with "
                "--overwrite."
            ) from None


_PLAIN = [entry.name for entry in fields(Manifest) if entry.name not in ("counts", "shards")]


def manifest_path(output: Path, file_name: str) -> Path:
    """Beside the set's folder: <output>/<file_name>.manifest.json; `file_name` may hold a folder."""
    return Path(output) / f"{file_name}.manifest.json"


def option_changes(old: dict, new: dict) -> list[str]:
    """One line for each option that differs: its name, the old and the new value."""
    lines = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            flag = name if " " in name else "--" + name.replace("_", "-")
            lines.append(f"{flag}: {_shown(old, name)} before, {_shown(new, name)} now")
    return lines


def _shown(options: dict, name: str) -> str:
    text = json.dumps(options[name], ensure_ascii=False) if options.get(name) is not None else "not given"
    return text if len(text) <= 120 else text[:117] + "..."


def write_json(path: Path, data: object) -> None:
    """Write a JSON file complete or not at all.

    Raises:
        UserError: the disk is full, or the folder cannot be made or written to.
    """
    text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(text.encode()))


def require_writable(path: Path) -> None:
    """Find out before the work whether write_json can write there; makes the folder.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected the name of a file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.filename}: {error.strerror}.") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission to make files in {path.parent}.")
