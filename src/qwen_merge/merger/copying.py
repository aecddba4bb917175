"""Moves bytes from the sources' files to the shards, in a constant amount of memory.

What is not converted never enters this process: `copy_file_range` lets the kernel move it, neighbours in one call.
The sources' sha256 are taken at the same time in a second thread, which finds the pages still in the cache.
"""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_merge.errors import UserError
from qwen_merge.merger.initialise import initial_bytes, initial_rows
from qwen_merge.merger.plan import PlannedTensor
from qwen_merge.merger.safetensors_file import ITEM_BYTES
from qwen_merge.merger.shards import Shard

if TYPE_CHECKING:
    import numpy as np

KERNEL_CHUNK = 64 << 20
BUFFER = 8 << 20
# What a file system or kernel says that cannot do copy_file_range between these two files.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def write_shard(
    directory: Path, shard: Shard, source_path: Callable[[str, str], Path], seed: int, advance: Callable[[int], None]
) -> None:
    """Write one shard and force it to the disk.

    source_path: (origin, file name) -> path. advance: called with the number of bytes just written.
    """
    target = os.open(directory / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _fill(target, shard, source_path, seed, advance)
        os.fsync(target)
    finally:
        os.close(target)


def _fill(
    target: int, shard: Shard, source_path: Callable[[str, str], Path], seed: int, advance: Callable[[int], None]
) -> None:
    write_all(target, shard.header, 0)
    position = len(shard.header)
    for run in _runs(shard.tensors):
        first = run[0]
        if first.stored is None:
            for chunk in initial_bytes(first, seed):
                write_all(target, chunk, position)
                position += len(chunk)
                advance(len(chunk))
            continue
        path = source_path(first.origin, first.stored.file)
        source = open_to_read(path)
        try:
            if first.rows is not None:
                position = _with_new_rows(source, target, first, position, path, seed, advance)
            elif first.dtype == first.stored.dtype:
                last = run[-1].stored
                assert last is not None
                copy_range(source, target, first.stored.start, last.end - first.stored.start, position, path, advance)
                position += last.end - first.stored.start
            else:
                position = _convert_range(source, target, first, position, path, advance)
        finally:
            os.close(source)
    assert position == shard.nbytes


def open_to_read(path: Path) -> int:
    """A descriptor of a file that will be read in order: the kernel reads further ahead then."""
    descriptor = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return descriptor


def _runs(tensors: Iterable[PlannedTensor]) -> Iterable[list[PlannedTensor]]:
    """Group tensors that are neighbours in one source file and are copied as they are."""
    run: list[PlannedTensor] = []
    for tensor in tensors:
        joined = (
            run
            and tensor.stored is not None
            and run[-1].stored is not None
            and (tensor.origin, tensor.stored.file) == (run[-1].origin, run[-1].stored.file)
            and tensor.stored.start == run[-1].stored.end
            and tensor.dtype == tensor.stored.dtype
            and run[-1].dtype == run[-1].stored.dtype
            and tensor.rows is run[-1].rows is None
        )
        if run and not joined:
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def copy_range(
    source: int, target: int, start: int, count: int, at: int, path: Path, advance: Callable[[int], None]
) -> None:
    """Copy `count` bytes from `start` of one open file to `at` of another; `path` is the source's, for the error."""
    in_kernel, end = hasattr(os, "copy_file_range"), start + count
    buffer: memoryview | None = None
    while start < end:
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, min(KERNEL_CHUNK, end - start), start, at)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                in_kernel = False
                continue
            if (
                copied == 0
            ):  # the end of the file, or a file system (procfs-like, some FUSE) that cannot: ask by reading
                in_kernel = False
                continue
        else:
            buffer = buffer or memoryview(bytearray(BUFFER))
            copied = os.preadv(source, [buffer[: min(BUFFER, end - start)]], start)
            if copied == 0:
                raise UserError(f"{path} became shorter while it was read. Is it still being downloaded?")
            write_all(target, buffer[:copied], at)
        start, at = start + copied, at + copied
        advance(copied)


def _with_new_rows(
    source: int, target: int, tensor: PlannedTensor, at: int, path: Path, seed: int, advance: Callable[[int], None]
) -> int:
    """The source's rows as they are, and new ones in their places; returns where the tensor ends."""
    stored, rows = tensor.stored, tensor.rows
    assert stored is not None
    assert rows is not None
    assert stored.dtype == tensor.dtype
    width = stored.nbytes // stored.shape[0]
    mean, spread = _mean_row(source, tensor, path)
    drawn = initial_rows(mean, spread, len(rows.numbers), tensor, seed)
    row = 0
    for place, number in enumerate(rows.numbers):
        copy_range(source, target, stored.start + row * width, (number - row) * width, at + row * width, path, advance)
        write_all(target, drawn[place * width : (place + 1) * width], at + number * width)
        advance(width)
        row = number + 1
    left = max(0, stored.shape[0] - row)
    copy_range(source, target, stored.start + row * width, left * width, at + row * width, path, advance)
    return at + tensor.nbytes


def _mean_row(source: int, tensor: PlannedTensor, path: Path) -> tuple["np.ndarray", float]:
    """The mean of the rows that hold something, and how far their values lie from it (root mean square)."""
    import numpy as np

    from qwen_merge.merger.convert import to_float32

    stored, rows = tensor.stored, tensor.rows
    assert stored is not None
    assert rows is not None
    width = stored.nbytes // stored.shape[0]
    total, squares = np.zeros(stored.shape[1]), 0.0
    for first in range(0, rows.known, max(1, BUFFER // width)):
        count = min(max(1, BUFFER // width), rows.known - first)
        data = read_exactly(source, stored.start + first * width, count * width, path)
        values = to_float32(data, stored.dtype).reshape(count, -1).astype(np.float64)
        total, squares = total + values.sum(0), squares + float((values**2).sum())
    mean = total / rows.known
    return mean, max(0.0, squares / rows.known / len(mean) - float((mean**2).mean())) ** 0.5


def _convert_range(
    source: int, target: int, tensor: PlannedTensor, at: int, path: Path, advance: Callable[[int], None]
) -> int:
    from qwen_merge.merger.convert import convert

    assert tensor.stored is not None
    step = BUFFER // ITEM_BYTES["F64"] * ITEM_BYTES[tensor.stored.dtype]
    for start in range(tensor.stored.start, tensor.stored.end, step):
        data = read_exactly(source, start, min(step, tensor.stored.end - start), path)
        converted = convert(data, tensor.stored.dtype, tensor.dtype, tensor.name)
        write_all(target, converted, at)
        at += len(converted)
        advance(len(converted))
    return at


def read_exactly(source: int, start: int, count: int, path: Path) -> bytes:
    """`count` bytes from `start`; fewer are an error."""
    data = b""
    while len(data) < count:
        part = os.pread(source, count - len(data), start + len(data))
        if not part:
            raise UserError(f"{path} became shorter while it was read. Is it still being downloaded?")
        data = data + part if data else part
    return data


def write_all(target: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` at `at`; a disk that is filling up may take less at a time."""
    view = memoryview(data)
    while view:
        written = os.pwrite(target, view, at)
        view, at = view[written:], at + written


@dataclass(frozen=True)
class HashJob:
    """Byte ranges of one source file, in order."""

    key: tuple[str, str]  # origin, file name
    path: Path
    ranges: tuple[tuple[int, int], ...]


@dataclass
class Hasher:
    """Takes sha256 of files in a thread of its own. A context manager; `digests` are complete after `wait()`.

    copied: how many bytes the copy has moved so far. Hashing stays behind it, so that only one of the two reads from
    the disk and the other finds the pages in the cache; side by side they take a quarter longer.
    """

    jobs: list[HashJob]
    copied: Callable[[], int]
    digests: dict[tuple[str, str], str] = field(default_factory=dict)

    def __enter__(self) -> "Hasher":
        self._stop = threading.Event()
        self._copy_ended = threading.Event()
        self._hashed = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="sha256", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._copy_ended.set()
        self._thread.join()

    def wait(self) -> None:
        """To be called when all is copied: return when every digest is there, or raise what stopped the thread."""
        self._copy_ended.set()
        self._thread.join()
        if self._error:
            raise self._error

    def _work(self) -> None:
        try:
            for job in self.jobs:
                self.digests[job.key] = self._digest(job)
        except BaseException as error:
            self._error = error

    def _digest(self, job: HashJob) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER // 4))
        source = open_to_read(job.path)
        try:
            for start, end in job.ranges:
                position = start
                while position < end and not self._stop.is_set():
                    while self._hashed >= self.copied() and not self._copy_ended.wait(0.002):
                        pass
                    count = os.preadv(source, [buffer[: min(len(buffer), end - position)]], position)
                    if count == 0:
                        raise UserError(f"{job.path} became shorter while it was read. Is it still being downloaded?")
                    digest.update(buffer[:count])
                    position += count
                    self._hashed += count
        finally:
            os.close(source)
        return digest.hexdigest()
