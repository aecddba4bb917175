"""Where a set is and what its files say without reading a row: shards, rows, bytes, columns, manifest.

    qwen-merge data check STAGE.yaml

dataset_info.json is read by LLaMA-Factory's own parser. What its loader would refuse (a missing folder, a second file
type, shards of different columns) is found here in a second instead of after the model was loaded.
"""

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_merge.data.dataset_info import NAME
from qwen_merge.data.manifest import Manifest
from qwen_merge.errors import UserError


@dataclass
class Shard:
    """A parquet file: rows of each row group, bytes of the file."""

    path: Path
    groups: list[int]
    bytes: int

    @property
    def rows(self) -> int:
        return sum(self.groups)


@dataclass
class SetFiles:
    """A set as found. `attributes`: LLaMA-Factory's DatasetAttr; `problems` and `notes` name the set already."""

    name: str
    attributes: Any = None
    place: Path | None = None
    shards: list[Shard] = field(default_factory=list)
    manifest: Manifest | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def columns(self) -> list[str]:
        """The columns that LLaMA-Factory will read, in its order."""
        shared = ["system", "tools", "images", "videos", "audios"]
        own = ["messages"] if self.attributes.formatting == "sharegpt" else ["prompt", "query", "response", "history"]
        return [value for key in own + shared if (value := getattr(self.attributes, key))]


def find_sets(names: list[str], dataset_dir: str) -> tuple[list[SetFiles], list[str]]:
    """Each named set, and what is wrong with dataset_info.json itself."""
    path = Path(dataset_dir) / NAME
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(info, dict):
            raise ValueError(f"it holds {type(info).__name__}, not an object")
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror}). dataset_dir counts from the folder the run starts in."
        return [], [problem]
    except ValueError as error:
        return [], [f"{path} is not the list of sets: {error}"]
    found, problems = [], []
    for index, name in enumerate(names):
        if name in names[:index]:
            problems.append(f"{name} is named twice in dataset; its rows would count twice.")
        elif name not in info:
            near = difflib.get_close_matches(name, info, 1)
            problems.append(f"{name} is not in {path}" + (f"; did you mean {near[0]}?" if near else "."))
        else:
            found.append(find_set(name, dataset_dir))
    return found, problems


def _defects(entry: object) -> list[str]:
    """What LLaMA-Factory's parser would stumble over in a set's entry."""
    if not isinstance(entry, dict):
        return [f"it is {entry!r}"[:100] + "; expected an object with file_name, columns and tags"]
    places = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
    said = [entry[key] for key in places if key in entry]
    defects = []
    if not said:
        defects.append("it has no file_name")
    if not all(isinstance(value, str) and value for value in said):
        defects.append(f"its place is {said!r}"[:100] + "; expected a text")
    for key in ("columns", "tags"):
        value = entry.get(key, {})
        if not isinstance(value, dict) or not all(isinstance(name, str | None) for name in value.values()):
            defects.append(f"{key} is {value!r}"[:100] + "; expected an object of texts")
    if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt"):
        defects.append(f"formatting is {entry['formatting']!r}"[:100] + "; expected sharegpt")
    if not isinstance(entry.get("num_samples"), int | None):
        defects.append(f"num_samples is {entry['num_samples']!r}"[:100] + "; expected a number")
    return defects


def find_set(name: str, dataset_dir: str) -> SetFiles:
    """A set that dataset_info.json names. Every defect is in its `problems`."""
    from llamafactory.data.parser import get_dataset_list

    path = Path(dataset_dir) / NAME
    defects = _defects(json.loads(path.read_text(encoding="utf-8"))[name])
    if defects:
        return SetFiles(name, problems=[f"{name}: its entry in {path} cannot be used: {'; '.join(defects)}."])
    (attributes,) = get_dataset_list([name], dataset_dir)
    result = SetFiles(name, attributes)
    if attributes.load_from != "file":
        result.problems.append(
            f"{name}: comes from {attributes.load_from}; only files are checked. Make files of it by `qwen-merge data "
            "convert`."
        )
        return result
    _read_files(result, Path(dataset_dir) / attributes.dataset_name)
    return result


def find_path(path: Path) -> SetFiles:
    """A folder or file of parquet in the record format, named by its path. Every defect is in its `problems`."""
    from llamafactory.data.parser import DatasetAttr

    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    unused = dict.fromkeys(("observation_tag", "function_tag", "system_tag", "prompt", "query", "response"))
    attributes = DatasetAttr(
        "file", str(path), formatting="sharegpt", messages="messages", images="images", **tags, **unused
    )
    result = SetFiles(path.name, attributes)
    _read_files(result, path)
    return result


def to_json(attributes: Any) -> dict:
    """A DatasetAttr as what a worker can be sent."""
    return dataclasses.asdict(attributes)


def _read_files(result: SetFiles, place: Path) -> None:
    result.place = place
    name, say = result.name, result.problems.append
    if place.is_dir():
        files = [place / file for file in sorted(os.listdir(place))]
        if not files:
            say(f"{name}: {place} is empty.{_how_to_make(name)}")
        others = [file.name for file in files if file.suffix != ".parquet" or file.is_dir()]
        if others:
            say(
                f"{name}: {place} also holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}; "
                "LLaMA-Factory takes a folder of one file type only. Move it out."
            )
        files = [file for file in files if file.name not in others]
    elif place.is_file():
        files = [place]
        if place.suffix != ".parquet":
            say(f"{name}: {place} is not parquet; only parquet is checked.")
            files = []
    else:
        say(f"{name}: {place} does not exist.{_how_to_make(name)}")
        return
    _read_footers(result, files)
    _read_manifest(result, place)


def _how_to_make(name: str) -> str:
    from qwen_merge.data.sets import SETS

    distilled = {"text2image": "text2image convert", "image_thinking": "image-thinking judge"}
    command = f"convert {name}" if name in SETS else distilled.get(name)
    return f" Make the set with `qwen-merge data {command}`." if command else " Check file_name in dataset_info.json."


def _read_footers(result: SetFiles, files: list[Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = None
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                schema, footer = parquet.schema_arrow, parquet.metadata
        except (pa.ArrowException, OSError) as error:
            result.problems.append(f"{result.name}: {file.name} is not readable parquet: {error}. Make the set anew.")
            continue
        missing = [column for column in result.columns if column not in schema.names]
        if missing:
            result.problems.append(
                f"{result.name}: {file.name} has the columns {', '.join(schema.names)}; {NAME} says "
                f"{', '.join(missing)} too."
            )
            continue
        if first is None:
            first = file, schema
            if b"huggingface" in (schema.metadata or {}) and b'"Image"' in schema.metadata[b"huggingface"]:
                result.notes.append(
                    f"{result.name}: the files carry Hugging Face's feature metadata, so the loader decodes every "
                    "picture, turns it by its EXIF orientation and encodes it anew; `qwen-merge data convert` leaves "
                    "the metadata out."
                )
        elif not schema.equals(first[1], check_metadata=False):
            result.problems.append(
                f"{result.name}: {file.name} and {first[0].name} differ in their columns or types; the loader wants "
                "one schema."
            )
            continue
        groups = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        result.shards.append(Shard(file, groups, file.stat().st_size))
    if result.shards and result.rows == 0:
        result.problems.append(f"{result.name}: {result.place} holds no row.")


def _read_manifest(result: SetFiles, place: Path) -> None:
    path = place.with_name(f"{place.name}.manifest.json")
    if not path.is_file():
        result.notes.append(f"{result.name}: no manifest ({path}); where its rows came from is not recorded.")
        return
    try:
        result.manifest = Manifest.read(path)
    except UserError as error:
        result.problems.append(f"{result.name}: {error}")
        return
    said = {shard.name: (shard.rows, shard.bytes) for shard in result.manifest.shards}
    seen = {shard.path.name: (shard.rows, shard.bytes) for shard in result.shards}
    wrong = sorted(name for name in {*said, *seen} if said.get(name) != seen.get(name))
    if wrong:
        first = wrong[0]
        result.problems.append(
            f"{result.name}: {len(wrong)} shards are not those of {path.name}; {first} has {_shard(seen.get(first))}, "
            f"the manifest says {_shard(said.get(first))}. Finish the conversion with --resume, or make the set anew."
        )


def _shard(rows_bytes: tuple[int, int] | None) -> str:
    return "nothing" if rows_bytes is None else f"{rows_bytes[0]} rows in {rows_bytes[1]} bytes"
