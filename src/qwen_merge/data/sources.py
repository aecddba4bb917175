"""Where rows come from: a hub data set or a local copy, streamed through `datasets`, one unit of work a source file.

    qwen-merge data convert geo3k                               from the hub
    qwen-merge data convert geo3k --input copies/geo3k          a file, folder or glob of parquet, arrow or tar files

Pictures are handed on as encoded bytes (`Image(decode=False)`); of parquet only the wanted columns are read. A tar file
(WebDataset) gives one row a key: its picture file, and the fields of its JSON file as columns. The hub's files, Arrow
and tar files go through `datasets`' streaming; local parquet is read by Arrow, as _parquet_rows() explains.
"""

import contextlib
import functools
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_merge.data.sets import PublicSet
from qwen_merge.errors import UserError

ENDINGS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
PICTURES = ("image", "images")
WEBDATASET_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "image")
BATCH = 64  # rows decoded at a time; a picture set's default of a whole row group can be gigabytes
_OTHER_SPLIT = re.compile(r"(?:validation|valid|val|test|dev)[-_.]")


@dataclass(frozen=True)
class Source:
    """`builder`: "hub", "parquet", "arrow" or "webdataset"; `files`: absolute paths, in order; JSON-able by asdict."""

    builder: str
    name: str  # hub id, or what --input said
    config: str | None = None
    split: str = "train"
    revision: str | None = None  # the hub's commit
    files: list[str] = field(default_factory=list)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "Source":
        return cls(**data)

    def recorded_revision(self) -> object:
        """What identifies the data: the hub's commit, or the name and size of each local file."""
        if self.builder == "hub":
            return self.revision
        return [{"file": os.path.basename(path), "bytes": os.path.getsize(path)} for path in self.files]


def hub_source(entry: PublicSet, revision: str | None = None) -> Source:
    """A set on the hub, at the commit that `revision` (or main) is now.

    Raises:
        UserError: the hub cannot be reached, or has no such data set or revision.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = huggingface_hub.HfApi().dataset_info(entry.hub, revision=revision, timeout=60).sha
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{entry.name}: the hub's data set {entry.hub} cannot be read ({first}). Check the network, HF_TOKEN and "
            "--revision, or give a local copy with --input."
        ) from None
    return Source("hub", entry.hub, entry.config, entry.split, commit)


def local_source(given: Path, split: str = "train") -> Source:
    """Local files: one file, all of a folder (and below) of one kind, or a glob.

    In a folder, files named after another split (validation-…, test-…) are left out, as in a copy of a hub repository;
    a glob takes what it names.

    Raises:
        UserError: nothing there, or files of several kinds.
    """
    path = Path(given)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in ENDINGS and _visible(file.relative_to(path))]
        files = [file for file in files if not _OTHER_SPLIT.match(file.name)]
    else:
        files = [Path(match) for match in glob.glob(str(given), recursive=True) if os.path.isfile(match)]
    kinds = {ENDINGS.get(file.suffix) for file in files}
    expected = "expected files that end in .parquet, .arrow or .tar"
    if not files:
        raise UserError(f"--input {given}: nothing found; {expected} (a file, a folder, or a glob in quotes).")
    if None in kinds:
        other = sorted(str(file) for file in files if file.suffix not in ENDINGS)
        raise UserError(f"--input {given}: {other[0]} is none of the kinds that can be read; {expected}.")
    if len(kinds) > 1:
        found = ", ".join(sorted(map(str, kinds)))
        raise UserError(f"--input {given}: {expected}, all of one kind, found {found}. Name them with a glob.")
    return Source(str(kinds.pop()), str(given), split=split, files=sorted(str(file.absolute()) for file in files))


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def unit_count(source: Source) -> int:
    """How many units: local files, or the files of the hub's split."""
    return _hub_dataset(_key(source), None).num_shards if source.builder == "hub" else len(source.files)


def total_rows(source: Source) -> int | None:
    """Rows in all, where that is known without reading them; else None."""
    if source.builder == "parquet":
        return sum(_parquet(path).num_rows for path in source.files)
    if source.builder == "hub":
        with _explained(source.name):
            splits = _hub_builder(_key(source), None).info.splits or {}
        return splits[source.split].num_examples or None if source.split in splits else None
    return None


def rows(source: Source, unit: int, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of one unit in order, with those of `columns` that exist; pictures as {"bytes", "path"}.

    Raises:
        UserError: a file cannot be read, which names it.
    """
    name = f"{source.name} (file {unit})" if source.builder == "hub" else source.files[unit]
    with _explained(name):
        if source.builder == "parquet":
            yield from _parquet_rows(source.files[unit], columns)
            return
        if source.builder == "hub":
            dataset = _hub_dataset(_key(source), columns)
            with _without_torch():
                dataset = dataset.shard(dataset.num_shards, unit)
        else:
            dataset = _local_dataset(source.builder, source.files[unit])
        for row in dataset:
            yield _from_tar(row) if source.builder == "webdataset" else row


def _parquet_rows(path: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Row group by row group. `datasets` scans a file as a whole, and what Arrow holds for that grows with the file:
    111 MB for 40,000 rows of 1 KB in groups of 100, where this takes 0.4 MB."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        wanted = [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=wanted):
                yield from batch.to_pylist()


def _local_dataset(builder: str, path: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    file = glob.escape(path)  # names like `ai2d(gpt4v)[1].tar` are meant as they are
    with _without_torch():
        dataset = datasets.load_dataset(builder, data_files={"train": [file]}, split="train", streaming=True)
        return _undecoded(dataset)


def _hub_builder(key: str, columns: tuple[str, ...] | None) -> Any:
    import datasets
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    source = Source.from_json(json.loads(key))
    load = functools.partial(datasets.load_dataset_builder, source.name, source.config, revision=source.revision)
    builder = load()
    if columns and isinstance(builder.config, ParquetConfig):
        present = _hub_dataset(key, None).features  # from the repository's card, or the first file's footer
        builder = load(batch_size=BATCH, columns=[name for name in columns if name in present])
    return builder


@functools.lru_cache(maxsize=4)  # a worker does many units of one set: ask the hub for its files once
def _hub_dataset(key: str, columns: tuple[str, ...] | None) -> Any:
    source = Source.from_json(json.loads(key))
    with _explained(source.name), _without_torch():
        dataset = _hub_builder(key, columns).as_streaming_dataset(split=source.split)
        return _undecoded(dataset)


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """`datasets` imports torch (seconds, 300 MB) to share a streaming set with its data loaders; not wanted here."""
    import datasets

    available = datasets.config.TORCH_AVAILABLE
    datasets.config.TORCH_AVAILABLE = False
    try:
        yield
    finally:
        datasets.config.TORCH_AVAILABLE = available


def _undecoded(dataset: Any) -> Any:
    """Pictures as their bytes; a plain struct of bytes and path, without `datasets`' metadata, is that already."""
    import datasets

    undecoded = datasets.Image(decode=False)
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, undecoded)
        elif isinstance(feature, datasets.Sequence) and isinstance(feature.feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Sequence(undecoded))
        elif isinstance(feature, list) and isinstance(feature[0], datasets.Image):
            dataset = dataset.cast_column(name, [undecoded])
    return dataset


def _from_tar(row: dict[str, Any]) -> dict[str, Any]:
    """A WebDataset row as the hub's parquet has it."""
    flat: dict[str, Any] = {"id": row.get("__key__")}
    for name, value in row.items():
        if name == "json" and isinstance(value, dict):
            flat.update(value)
        elif name not in ("__key__", "__url__", *WEBDATASET_PICTURES):
            flat.setdefault(name, value)
    pictures = [row[name] for name in WEBDATASET_PICTURES if row.get(name) is not None]
    flat["images"] = pictures
    flat.pop("image", None)  # in the JSON file: the picture's name
    return flat


def pictures_of(row: dict[str, Any]) -> list[bytes | None]:
    """The encoded bytes of a row's pictures; None for one that is named but not there."""
    found = []
    for name in PICTURES:
        value = row.get(name)
        if value is None:
            continue
        for picture in value if isinstance(value, list) else [value]:
            found.append(picture.get("bytes") if isinstance(picture, dict) else picture)
    return [data if isinstance(data, bytes) else None for data in found]


def _parquet(path: str) -> Any:
    import pyarrow.parquet as pq

    with _explained(path):
        return pq.read_metadata(path)


def _key(source: Source) -> str:
    return json.dumps(source.to_json(), sort_keys=True)


class _explained:
    """Reading errors as a message that names the file: a file cut short, a lost connection, a wrong kind."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        import datasets
        import pyarrow as pa

        known = (OSError, pa.ArrowException, datasets.exceptions.DatasetsError, ValueError)
        if isinstance(error, known):
            first = (str(error).strip().splitlines() or [""])[0][:300]
            raise UserError(
                f"{self.name} cannot be read ({type(error).__name__}: {first}). What was done is kept: mend or fetch "
                "the file again and go on with --resume."
            ) from error
