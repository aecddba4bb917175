"""Where rows come from: a hub data set or a local copy, streamed through `datasets`, one unit of work a source file.

    qwen-merge data convert geo3k                               from the hub
    qwen-merge data convert geo3k --input copies/geo3k          a file, folder or glob of parquet, arrow or tar files

Pictures are handed on as encoded bytes (`Image(decode=False)`); of parquet only the wanted columns are read. A tar file
(WebDataset) gives one row a key: its picture files, and the fields of its JSON file as columns. The hub's files and
Arrow files go through `datasets`' streaming; local parquet is read by Arrow, as _parquet_rows() explains, and tar files
by `tarfile`, because `datasets` wants every row to have the first one's fields: it stops at a .png among .jpg files.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_merge.data.disk import told
from qwen_merge.data.sets import PublicSet
from qwen_merge.errors import UserError

ENDINGS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
PICTURES = ("image", "images")
WEBDATASET_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "image")
BATCH = 64  # rows decoded at a time; a picture set's default of a whole row group can be gigabytes
PIECE = 64 * 2**10  # bytes; local files are told apart by 64 such pieces, and by all of it where that is no more
_OTHER_SPLIT = re.compile(r"(?:validation|valid|val|test|dev)(?:[-_.]|$)", re.IGNORECASE)
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset's: key, then field, parted by the name's first dot


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
        """What identifies the data: the hub's commit, or the place, size and digest of each local file.

        Raises:
            UserError: a file cannot be read.
        """
        if self.builder == "hub":
            return self.revision
        base = os.path.abspath(self.name)
        if not os.path.isdir(base):
            base = os.path.commonpath([os.path.dirname(path) for path in self.files])
        with told():
            return [{"file": os.path.relpath(path, base), **_identity(path)} for path in self.files]


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

    In a folder, what is named after another split (validation-0.parquet, test/0.parquet) is left out, as in a copy of a
    hub repository; a glob takes what it names.

    Raises:
        UserError: nothing there, or files of several kinds.
    """
    path = Path(given)
    left_out: list[Path] = []
    if path.is_file():
        files = [path]
    elif path.is_dir():
        there = [file for file in path.rglob("*") if file.suffix in ENDINGS and _visible(file.relative_to(path))]
        left_out = [file for file in there if any(map(_OTHER_SPLIT.match, file.relative_to(path).parts))]
        files = sorted({*there} - {*left_out})
    else:
        files = [Path(match) for match in glob.glob(str(given), recursive=True) if os.path.isfile(match)]
    kinds = {ENDINGS.get(file.suffix) for file in files}
    expected = "expected files that end in .parquet, .arrow or .tar"
    if not files:
        others = f" but {len(left_out)} files of other splits, such as {left_out[0]}" if left_out else ""
        raise UserError(f"--input {given}: nothing found{others}; {expected} (a file, a folder, or a glob in quotes).")
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


def rows(source: Source, unit: int, columns: tuple[str, ...], required: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one unit in order, with those of `columns` that exist; pictures as {"bytes", "path"} or bytes.

    Raises:
        UserError: a file cannot be read, which names it; or it has rows and no column `required`.
    """
    name = f"{source.name} (file {unit})" if source.builder == "hub" else source.files[unit]
    with _explained(name):
        if source.builder == "parquet":
            yield from _parquet_rows(source.files[unit], columns, required)
            return
        if source.builder == "webdataset":
            yield from _tar_rows(source.files[unit], required)
            return
        if source.builder == "hub":
            dataset = _hub_dataset(_key(source), columns)
            _require(required, list(_hub_dataset(_key(source), None).features or []), name)
            with _without_torch():
                dataset = dataset.shard(dataset.num_shards, unit)
        else:
            dataset = _arrow_dataset(source.files[unit])
            _require(required, list(dataset.features or []), name)
        yield from dataset


def _require(column: str | None, found: list[str], name: str) -> None:
    """`found`: the columns, or nothing where they are not known."""
    if column is not None and found and column not in found:
        raise UserError(
            f"{name} has the columns {', '.join(found)}; expected {column!r} among them, which holds this set's text. "
            "Is it another set's file?"
        )


def _parquet_rows(path: str, columns: tuple[str, ...], required: str | None) -> Iterator[dict[str, Any]]:
    """Row group by row group. `datasets` scans a file as a whole, and what Arrow holds for that grows with the file:
    111 MB for 40,000 rows of 1 KB in groups of 100, where this takes 0.4 MB."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        _require(required, file.schema_arrow.names, path)
        wanted = [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=wanted):
                yield from batch.to_pylist()


def _arrow_dataset(path: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    file = glob.escape(path)  # names like `ai2d(gpt4v)[1].tar` are meant as they are
    with _without_torch():
        dataset = datasets.load_dataset("arrow", data_files={"train": [file]}, split="train", streaming=True)
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


def _tar_rows(path: str, required: str | None) -> Iterator[dict[str, Any]]:
    """A WebDataset file's rows as the hub's parquet has them: members that follow each other with one key are a row."""
    seen: set[str] = set()
    key: str | None = None
    fields: dict[str, bytes] = {}
    for name, data in _members(path):
        match = _MEMBER.fullmatch(name)
        if match is None:
            continue
        if match[1] != key and fields:
            yield _tar_row(key, fields, seen)
            fields = {}
        key = match[1]
        kind = match[2].lower()
        fields[kind] = data() if kind in ("json", *WEBDATASET_PICTURES) else b""
    if fields:
        yield _tar_row(key, fields, seen)
    _require(required, sorted(seen), path)


def _members(path: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and content of each file in a tar file. Its end must be marked: `tarfile` takes damage for the end."""
    with tarfile.open(path, "r") as tar:
        while (member := tar.next()) is not None:
            # else it keeps a note of every member, which grows with the file
            tar.members = []  # type: ignore[attr-defined]
            if member.isfile():
                yield member.name, functools.partial(_content, tar, member)
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(tarfile.BLOCKSIZE)
        if end != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut short after {tar.offset:,} bytes")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _tar_row(key: str | None, fields: dict[str, bytes], seen: set[str]) -> dict[str, Any]:
    """`seen` gets the names of the columns. JSON that is none gives a row without text, dropped and counted as such."""
    row: dict[str, Any] = {"id": key}
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(fields.get("json", b"{}"))
        row.update(value if isinstance(value, dict) else {})
    row.pop("image", None)  # in the JSON file: the picture's name
    row["images"] = [fields[name] for name in WEBDATASET_PICTURES if name in fields]
    seen.update(row)
    return row


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


def _identity(path: str) -> dict:
    stat = os.stat(path)
    return {"bytes": stat.st_size, "digest": _digest(path, stat.st_size, stat.st_mtime_ns)}


@functools.lru_cache(maxsize=1 << 16)  # asked for before a set is begun and again when it is
def _digest(path: str, size: int, _: int) -> str:
    """Of 64 pieces from the first to the last of a file; of the whole of a small one. A set can be terabytes, and what
    is to be told apart are versions: a parquet file's last piece has the places of all columns in it."""
    digest = hashlib.sha256()
    last = max(0, size - PIECE)
    with open(path, "rb") as file:
        for piece in range(64):
            file.seek(piece * PIECE if size <= 64 * PIECE else last * piece // 63)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


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

        known = (
            OSError, EOFError, ValueError, zlib.error, tarfile.TarError, pa.ArrowException,
            datasets.exceptions.DatasetsError,
        )  # fmt: skip
        if isinstance(error, known):
            first = (str(error).strip().splitlines() or [""])[0][:300]
            raise UserError(
                f"{self.name} cannot be read ({type(error).__name__}: {first}). What was done is kept: mend or fetch "
                "the file again and go on with --resume."
            ) from error
