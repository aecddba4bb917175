"""The output directory appears complete or not at all.

Everything is written into a hidden directory beside the output (same file system), forced to the disk, and renamed in
one step. An error, Ctrl-C or SIGTERM removes that directory. After SIGKILL or a power cut it stays, recognisable by its
name `.NAME.merging-…`; the next merge to the same output removes it. A lock held on the directory tells a dead one from
one that another process is still writing.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from qwen_merge.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def resolved_output(output: Path) -> Path:
    """The output without symbolic links and `..`: a directory can be renamed over an empty one, not over a link.

    Raises:
        UserError: as check_output, or it is a symbolic link to nothing.
    """
    if output.is_symlink() and not output.exists():
        raise UserError(f"{output} is a symbolic link to nothing. Remove it or choose another --output-path.")
    resolved = Path(os.path.realpath(output))
    check_output(resolved)
    return resolved


def check_output(output: Path) -> None:
    """Refuse an output that holds something, or that no directory can be renamed to.

    Raises:
        UserError: it exists and is a file, a mount point, or a directory with anything in it.
    """
    if os.path.ismount(output):
        raise UserError(f"--output-path {output} is a mount point, which must stay; name a new folder inside it.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; expected a new directory. Choose another --output-path.")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} exists and is not empty. Remove it or choose another --output-path.")


def check_space(output: Path, needed: int) -> None:
    """Refuse to begin what the file system has no room for.

    Raises:
        UserError: fewer than `needed` bytes are free where `output` will be.
    """
    place = _nearest_existing(output)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{output} needs {needed / 1e9:.2f} GB, the file system has {free / 1e9:.2f} GB free. "
            "Free some space or choose an --output-path on another disk."
        )


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a directory to write into; when the block ends well it becomes `output`.

    Raises:
        UserError: the disk is full, the place cannot be written to, or another process merges to the same output.
    """
    made = _make_parents(output)
    staging: Path | None = None
    lock = -1
    with _signals_raise():
        try:
            remove_stale(output)
            staging = output.with_name(f".{output.name}.merging-{os.getpid()}-{os.urandom(4).hex()}")
            staging.mkdir()
            lock = _lock(staging)
            yield staging
            _sync_tree(staging)
            check_output(output)  # once more: it may have been made meanwhile
            staging.rename(output)
            made = []
            _sync_directory(output.parent)
        except OSError as error:
            raise _explained(error, output) from error
        finally:
            if lock >= 0:
                os.close(lock)
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            for parent in reversed(made):
                with contextlib.suppress(OSError):
                    parent.rmdir()


def remove_stale(output: Path) -> None:
    """Remove what a killed merge to the same output left beside it.

    Raises:
        UserError: another process is writing one right now.
    """
    for leftover in output.parent.glob(f".{_literal(output.name)}.merging-*"):
        try:
            lock = _lock(leftover)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            raise UserError(
                f"another process is merging to {output} (it writes {leftover.name}). Wait for it, or choose another "
                "--output-path."
            ) from None
        print(f"removing {leftover}, left by a merge that was killed", file=sys.stderr)
        shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)


def _literal(name: str) -> str:
    """A file name as a glob pattern that matches only itself."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _lock(directory: Path) -> int:
    """Lock a directory for this process; the kernel lets go when the process ends, however it ends."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks: leftovers are then taken for dead
        pass
    return descriptor


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _make_parents(output: Path) -> list[Path]:
    """Make the directories above `output`; return those made, outermost first."""
    missing = []
    parent = output.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explained(error, output) from error
    return missing[::-1]


def _explained(error: OSError, output: Path) -> UserError:
    if error.errno in _FULL:
        return UserError(
            f"the disk of {output.parent} is full ({error.strerror}); nothing was left there. Free some space or "
            "choose an --output-path on another disk."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"cannot write to {error.filename or output.parent}: {error.strerror}.")
    if error.errno == errno.EBUSY:  # a mount within one file system, which no look at the directory tells
        return UserError(f"{output} is in use, as a mount point perhaps; name a new folder inside it.")
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return UserError(f"{output} was made by someone else meanwhile. Choose another --output-path.")
    return UserError(f"{error.filename or output}: {error.strerror or error}.")


def _sync_tree(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            _sync_tree(path)
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, as Ctrl-C does, so that what was begun is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def leave(number: int, _: FrameType | None) -> None:
        for handled in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(handled, signal.SIG_IGN)  # a second one must not cut the removal short
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
