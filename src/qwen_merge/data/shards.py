"""Parquet shards of bounded size, written with bounded memory, that appear complete or not at all.

    with ShardWriter(folder, "part-00000", 512 * 2**20) as writer:
        writer.add(record)
        shards = writer.close()

Shards `part-00000-000.parquet`, `part-00000-001.parquet`, … are written in a hidden folder beside `folder` and renamed
into it by close(), all at once as seen from a killed process: without close() nothing of them is in `folder`. The same
records give the same bytes, so work that was done twice (a lost worker's) replaces a file by its equal.
"""

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq

from qwen_merge.data.disk import told
from qwen_merge.data.journal import sync_directory
from qwen_merge.data.schema import SCHEMA, Record, table

ROW_GROUP_BYTES = 32 * 2**20  # of text and pictures: what a writer holds in memory, and a reader at a time
ROW_GROUP_ROWS = 1000  # for sets of tiny rows
SHARD_BYTES = 512 * 2**20  # the default size of a shard


@dataclass(frozen=True)
class ShardInfo:
    """`bytes`: of the file; `sha256`: of the file, in hexadecimal."""

    name: str
    rows: int
    bytes: int
    sha256: str

    def to_json(self) -> dict:
        return asdict(self)


def staging_names(folder: Path, own: str = "*") -> str:
    """The name of a writer's staging folder beside `folder`; the pattern of all of them by default."""
    return f".{folder.name}.staging-{own}"


class ShardWriter:
    """Writes records to shards of at most `max_bytes` each (a row group's footer more); one record is never split.

    Raises:
        UserError: from any method, when the disk is full or the folder cannot be written to.
    """

    def __init__(self, folder: Path, prefix: str, max_bytes: int = SHARD_BYTES) -> None:
        self.folder = Path(folder)
        self.prefix = prefix
        self.max_bytes = max_bytes
        own = f"{prefix}-{os.getpid()}-{os.urandom(4).hex()}"  # a lost worker's unit may be under way twice
        self.staging = self.folder.with_name(staging_names(self.folder, own))
        with told(self.staging):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.staging.mkdir()
        self._shards: list[ShardInfo] = []
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self._rows = 0
        self._file: _HashingFile | None = None
        self._parquet: pq.ParquetWriter | None = None

    def add(self, record: Record) -> None:
        with told(self.folder):
            self._add(record)

    def _add(self, record: Record) -> None:
        size = record.payload
        written = self._file.size if self._file else 0
        if self._rows + len(self._pending) and written + self._pending_bytes + size > self.max_bytes:
            self._finish_shard()
        elif self._pending and self._pending_bytes + size > ROW_GROUP_BYTES:
            self._write_row_group()
        self._pending.append(record)
        self._pending_bytes += size
        if len(self._pending) >= ROW_GROUP_ROWS:
            self._write_row_group()

    def close(self) -> list[ShardInfo]:
        """Write what is left, move the shards into the folder and return them; no record, no shard."""
        with told(self.folder):
            if self._rows or self._pending:
                self._finish_shard()
            self.folder.mkdir(parents=True, exist_ok=True)
            for shard in self._shards:
                os.replace(self.staging / shard.name, self.folder / shard.name)
            sync_directory(self.folder)
            self.staging.rmdir()
        return self._shards

    def abort(self) -> None:
        """Remove what was written; nothing has reached the folder. After close() this does nothing."""
        if self._file:
            with suppress(OSError):  # it tries once more to write what did not go to a full disk
                self._file.close()
            self._file = self._parquet = None
        shutil.rmtree(self.staging, ignore_errors=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _write_row_group(self) -> None:
        if self._parquet is None:
            self._file = _HashingFile(self.staging / self._name())
            self._parquet = pq.ParquetWriter(
                self._file,
                SCHEMA,
                # Pictures are compressed already, and a dictionary or statistics of them is a copy of them.
                compression=dict.fromkeys(_TEXTS, "zstd") | dict.fromkeys(_PICTURES, "none"),
                use_dictionary=["messages.list.element.role"],
                write_statistics=False,
            )
        self._parquet.write_table(table(self._pending))
        self._rows += len(self._pending)
        self._pending = []
        self._pending_bytes = 0

    def _finish_shard(self) -> None:
        if self._pending:
            self._write_row_group()
        assert self._parquet is not None
        assert self._file is not None
        self._parquet.close()
        name = self._name()
        digest = self._file.finish()
        self._shards.append(ShardInfo(name, self._rows, self._file.size, digest))
        self._file = self._parquet = None
        self._rows = 0

    def _name(self) -> str:
        return f"{self.prefix}-{len(self._shards):03d}.parquet"


_TEXTS = ("messages.list.element.role", "messages.list.element.content", "images.list.element.path")
_PICTURES = ("images.list.element.bytes",)


class _HashingFile:
    """A file that hashes what passes through: parquet is written front to back, so it need not be read again."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by finish or close)
        self._hash = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self._hash.update(view)
        self._file.write(view)
        self.size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def finish(self) -> str:
        """Force the file to the disk, close it and return its sha256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self.closed = True
        self._file.close()
