"""Put an overlay on, take it off, and say how things stand. Knows files and bytes, not what is in them.

Every file is in one of few states, told by its sha256, so an interrupted run needs no clean-up of its own: applying or
reverting again finishes it. A file is replaced by a new one and never written in place, because package managers
hard-link installed files to a cache that other environments share.

A record beside the package (`.qwen-merge-overlay.json`) holds the diffs that were applied, so that a newer kit can take
off what an older one put on.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from qwen_merge import __version__
from qwen_merge.errors import UserError
from qwen_merge.overlays import diff
from qwen_merge.overlays.manifest import Overlay, Touched

RECORD = ".qwen-merge-overlay.json"
STAGED_SUFFIX = ".qwen-merge-staged"


class State(Enum):
    """How one file stands."""

    PRISTINE = "pristine"  # as the upstream shipped it, or a new file that is not there
    APPLIED = "applied"
    OUTDATED = "outdated"  # put there by another version of this kit
    CHANGED = "changed"  # edited by somebody else: never touched


@dataclass(frozen=True)
class File:
    """One file of the plan: its state, and its bytes without and with the overlay (None: it is not there)."""

    path: str
    state: State
    before: bytes | None
    after: bytes | None


def _sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _patched(patch: str, content: bytes | None) -> bytes:
    assert content is not None  # its sha256 was just compared
    return diff.apply(patch, content.decode("utf-8")).encode("utf-8")


def _unpatched(patch: str, content: bytes | None) -> bytes:
    assert content is not None
    return diff.apply(patch, content.decode("utf-8"), reverse=True).encode("utf-8")


def plan(overlay: Overlay, package: Path) -> list[File]:
    """What stands where, new files first: a registration must never name a module that is not there yet.

    Raises:
        UserError: another version of the upstream.
    """
    release = overlay.release_of(package)
    recorded_files, recorded_new = _read_record(package, release.files)
    new = (
        _new_file(path, package / path, overlay.new_files.get(path), recorded_new.get(path))
        for path in dict.fromkeys((*overlay.new_files, *recorded_new))
    )
    touched = (
        _touched_file(overlay, path, _read(package / path), release.files.get(path), recorded_files.get(path))
        for path in dict.fromkeys((*release.files, *recorded_files))
    )
    return [*new, *touched]


def _new_file(path: str, place: Path, source: Path | None, recorded: str | None) -> File:
    """A file of the kit's own. No source: an older kit put it there and this one has no use for it."""
    current, wanted = _read(place), source.read_bytes() if source else None
    if _is_foreign(place):
        state = State.CHANGED
    elif current == wanted:
        state = State.APPLIED
    elif current is None:
        state = State.PRISTINE
    else:
        state = State.OUTDATED if _sha256(current) == recorded else State.CHANGED
    return File(path, state, None, wanted)


def _touched_file(
    overlay: Overlay, path: str, current: bytes | None, touched: Touched | None, recorded: dict[str, str] | None
) -> File:
    """A file of the upstream's. Not touched by this kit but recorded: by an older one."""
    sha256 = _sha256(current)
    if touched and sha256 == touched.before:
        file = File(path, State.PRISTINE, current, _patched(overlay.patch_text(touched.patch), current))
    elif touched and sha256 == touched.after:
        file = File(path, State.APPLIED, _unpatched(overlay.patch_text(touched.patch), current), current)
    elif recorded and sha256 == recorded["after"]:
        file = _outdated_file(overlay, path, current, touched, recorded)
    elif recorded and not touched and sha256 == recorded["before"]:
        file = File(path, State.PRISTINE, current, current)
    else:
        file = File(path, State.CHANGED, current, current)
    if touched and file.state is not State.CHANGED:
        # The manifest and the diffs are one thing; only a bug of this kit's can break them apart.
        assert (_sha256(file.before), _sha256(file.after)) == (touched.before, touched.after), path
    return file


def _outdated_file(
    overlay: Overlay, path: str, current: bytes | None, touched: Touched | None, recorded: dict[str, str]
) -> File:
    """What another version of the kit left, if its recorded diff leads back to what the upstream shipped."""
    try:
        before = _unpatched(recorded["patch"], current)
    except diff.DiffError:
        return File(path, State.CHANGED, current, current)
    if _sha256(before) != (touched.before if touched else recorded["before"]):
        return File(path, State.CHANGED, current, current)
    after = _patched(overlay.patch_text(touched.patch), before) if touched else before
    return File(path, State.OUTDATED, before, after)


def _read_record(package: Path, known: Container[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(files, new_files) of the record. What is not of its form is taken for no record: the sha256 tell enough.

    A path that leaves the package would let a record delete anything, so it is not of the form, except for a `known`
    one: the file of this overlay's own that lies beside the package.
    """
    try:
        record = json.loads(_read(package / RECORD) or b"{}")
        files, new_files = dict(record.get("files", {})), dict(record.get("new_files", {}))
        strange = [path for path in (*files, *new_files) if path not in known]
        inside = all(not Path(path).is_absolute() and ".." not in Path(path).parts for path in strange)
        formed = all({"before", "after", "patch"} <= set(entry) for entry in files.values())
    except (ValueError, TypeError, AttributeError):
        return {}, {}
    return (files, new_files) if inside and formed else ({}, {})


def _is_foreign(path: Path) -> bool:
    """A folder, or anything else that is no file, where a file belongs."""
    return path.exists() and not path.is_file()


def _refuse_changed(overlay: Overlay, package: Path, files: list[File], step: str) -> None:
    changed = [file.path for file in files if file.state is State.CHANGED]
    if _is_foreign(package / RECORD):
        changed.append(RECORD)
    if changed:
        release = overlay.release_of(package)
        raise UserError.from_list(
            f"cannot {step} the {overlay.upstream} overlay: files in {package} are neither those of "
            f"{release.version} ({release.source}) nor this kit's; nothing was touched. Restore them "
            f"(reinstall {overlay.upstream}, or `git checkout` them) and run this again:",
            changed,
        )


def apply(overlay: Overlay, package: Path) -> list[File]:
    """Put the overlay on. All or nothing; a second time does nothing.

    Returns:
        The files as they stood before.

    Raises:
        UserError: another version, or files that somebody else changed.
    """
    with _locked(package):
        return _apply(overlay, package)


def _apply(overlay: Overlay, package: Path) -> list[File]:
    _remove_staged(package)
    files = plan(overlay, package)
    _refuse_changed(overlay, package, files, "apply")
    release = overlay.release_of(package)
    record = {
        "overlay": f"qwen-merge {__version__}: {overlay.upstream} {release.version}",
        "files": {
            path: {"before": t.before, "after": t.after, "patch": overlay.patch_text(t.patch)}
            for path, t in release.files.items()
        },
        "new_files": {path: _sha256(source.read_bytes()) for path, source in overlay.new_files.items()},
    }
    content = (json.dumps(record, indent=1) + "\n").encode()
    changes = {file.path: file.after for file in files if _read(package / file.path) != file.after}
    if _read(package / RECORD) != content:
        # The record comes first, so that whatever a kill leaves is described; but last when it replaces an older
        # kit's record, which is needed as long as one file of that kit is left.
        outdated = any(file.state is State.OUTDATED for file in files)
        changes = {**changes, RECORD: content} if outdated else {RECORD: content, **changes}
    _replace_all(package, changes)
    return files


def revert(overlay: Overlay, package: Path) -> list[File]:
    """Take the overlay off: the upstream's exact bytes come back, new files go.

    Returns, Raises: as `apply`.
    """
    with _locked(package):
        return _revert(overlay, package)


def _revert(overlay: Overlay, package: Path) -> list[File]:
    _remove_staged(package)
    files = plan(overlay, package)
    _refuse_changed(overlay, package, files, "revert")
    # Registrations first, then the files that they name, then the record.
    changes = {f.path: f.before for f in reversed(files) if _read(package / f.path) != f.before}
    if (package / RECORD).exists():
        changes[RECORD] = None
    _replace_all(package, changes)
    for folder in {(package / path).parent for path in overlay.new_files}:
        _remove_if_empty(folder)
    return files


@contextlib.contextmanager
def _locked(package: Path) -> Iterator[None]:
    """One run at a time on a package; a second one waits. The kernel lets go however the first one ends."""
    descriptor = os.open(package, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder in which at most compiled Python is left; one of the upstream's own is never that."""
    if folder.is_dir() and {child.name for child in folder.iterdir()} <= {"__pycache__"}:
        shutil.rmtree(folder)


def _replace_all(package: Path, changes: dict[str, bytes | None]) -> None:
    """Stage every new content beside its target, then rename; undo what was done when one step fails."""
    originals = {path: _read(package / path) for path in changes}
    done: list[str] = []
    try:
        for path, content in changes.items():
            if content is not None:
                _stage(package / path, content)
        for path, content in changes.items():
            done.append(path)
            _commit(package / path, content)
    except BaseException as error:
        for path in reversed(done):
            content = originals[path]
            if content is not None:
                _stage(package / path, content)
            _commit(package / path, content)
        _remove_staged(package)
        if isinstance(error, OSError):
            raise UserError(f"could not write in {package}: {error}. Nothing was changed.") from error
        raise


def _staged(target: Path) -> Path:
    return target.with_name(f".{target.name}{STAGED_SUFFIX}")


def _stage(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(_staged(target), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        shutil.copymode(target, _staged(target))


def _commit(target: Path, content: bytes | None) -> None:
    if content is None:
        target.unlink(missing_ok=True)
    else:
        os.replace(_staged(target), target)


def _remove_staged(package: Path) -> None:
    """What a killed run left staged: in the package, and beside it, where a checkout has its `run.py`."""
    for leftover in (*package.rglob(f".*{STAGED_SUFFIX}"), *package.parent.glob(f".*{STAGED_SUFFIX}")):
        leftover.unlink()
