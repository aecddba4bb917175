"""A set under way and a set finished: what a restart finds, and what it may do with it.

    <output>/<file_name>/                 the set: appears complete, in one rename, or not at all
    <output>/<file_name>.manifest.json    beside it, written right after the rename
    <output>/.<file_name>.working/        while it is under way: options.json, journal.jsonl, shards/, and this lock

LLaMA-Factory reads only the first, so a killed run leaves nothing that it would train on as if complete. A run that was
killed goes on with `--resume`, from the units in its journal, if its options are the same; `--overwrite` starts anew,
and the old set stays in place until the new one is complete. Used by the converters and by both kinds of distillation.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from qwen_merge.data.disk import told
from qwen_merge.data.journal import Journal, sync_directory
from qwen_merge.data.manifest import Manifest, manifest_path, option_changes, write_json
from qwen_merge.data.shards import ShardInfo, staging_names
from qwen_merge.errors import UserError


class State(Enum):
    NEW = "new"
    RESUMED = "resumed"
    FINISHED = "finished"  # nothing to do


class Workspace:
    """The hidden folder of one set. One process at a time: a lock that the kernel drops when the process ends."""

    def __init__(self, output: Path, file_name: str) -> None:
        """`file_name` as in dataset_info.json; it may hold a folder, as `llavaonevision_converted/geo3k`."""
        self.final = Path(output).absolute() / file_name
        self.manifest_path = manifest_path(Path(output).absolute(), file_name)
        self.folder = self.final.with_name(f".{self.final.name}.working")
        self.shards = self.folder / "shards"
        self.journal = Journal(self.folder / "journal.jsonl")
        self._lock = -1

    @property
    def finished(self) -> bool:
        """Whether the set is there, and no other under way to take its place."""
        return not self._options_path.is_file() and self.manifest_path.is_file() and self.final.is_dir()

    def problem(self, options: dict, resume: bool, overwrite: bool) -> str | None:
        """What begin() would refuse, changing nothing: to report several sets' problems together."""
        if overwrite:
            return None
        if self._options_path.is_file():
            if not resume:
                return (
                    f"{self.final} is half done (in {self.folder}). Give --resume to go on with it, or --overwrite to "
                    "start anew."
                )
            changes = option_changes(_read_options(self._options_path), options)
            where = "was begun with other options"
            way_out = "Give the same options to go on with it, or --overwrite to start anew."
        elif self.finished:
            changes = option_changes(Manifest.read(self.manifest_path).options, options)
            where = "exists and was made with other options"
            way_out = "Give --overwrite to make it anew, or another --output."
        elif self.final.exists():
            return (
                f"{self.final} exists without {self.manifest_path.name}, so this command did not make it. Give "
                "--overwrite to replace it, or another --output."
            )
        else:
            return None
        return f"{self.final} {where}: {'; '.join(changes)}. {way_out}" if changes else None

    def begin(self, options: dict, resume: bool = False, overwrite: bool = False) -> State:
        """Take the lock and find out where the set stands.

        Args:
            options: JSON-able; everything that decides the set's rows. A restart must give the same.

        Raises:
            UserError: half done without --resume or --overwrite; other options; a folder of someone else; another
                process works on the set.
        """
        with told(self.final):
            # through JSON, as it will be read: tuples become lists
            return self._begin(json.loads(json.dumps(options)), resume, overwrite)

    def _begin(self, options: dict, resume: bool, overwrite: bool) -> State:
        self._finish_interrupted()
        if problem := self.problem(options, resume, overwrite):
            raise UserError(problem)
        half_done = self._options_path.is_file()
        if not half_done and not overwrite and self.final.is_dir():
            return State.FINISHED
        self._take_lock()
        if half_done and not overwrite:
            for staging in self.folder.glob(staging_names(self.shards)):  # of workers that were killed
                shutil.rmtree(staging)
            return State.RESUMED
        self._empty()
        self.shards.mkdir()
        write_json(self._options_path, options)
        return State.NEW

    def has(self, shards: Iterable[ShardInfo]) -> bool:
        """Whether all these shards are there in full size; a journal may outlive what it tells of."""
        return not any(self._lacks(shard) for shard in shards)

    def finish(self, manifest: Manifest) -> None:
        """Make the shards the set, and the manifest its manifest; an older set of that name goes.

        Raises:
            UserError: a shard of the manifest is not there, or not in full size.
        """
        lacking = [shard.name for shard in manifest.shards if self._lacks(shard)]
        if lacking:
            raise UserError(
                f"{self.shards}: {len(lacking)} shards that were written are missing or have another size, such as "
                f"{lacking[0]}. Something else removed or changed them: begin anew with --overwrite."
            )
        with told(self.final):
            self.journal.close()
            listed = {shard.name for shard in manifest.shards}
            for path in self.shards.iterdir():
                if path.name not in listed:  # of a unit that was killed between its shards and its line in the journal
                    path.unlink()
            manifest.write(self.folder / "manifest.json")  # from here on, whoever comes next only has to move things
            self._finish_interrupted()
            self.close()

    def discard(self) -> None:
        """Nothing comes of what is under way; the set is as it was before begin()."""
        with told(self.folder):
            self.journal.close()
            self._empty()
            self.folder.rmdir()
        self.close()

    def close(self) -> None:
        """Let go of the lock; what is under way stays for --resume."""
        self.journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lacks(self, shard: ShardInfo) -> bool:
        try:
            return (self.shards / shard.name).stat().st_size != shard.bytes
        except OSError:
            return True

    def _empty(self) -> None:
        """Remove what an earlier run left. The options go first, which make the folder a set half done, and then the
        journal: were this cut short with the shards gone, a restart would believe a journal that is still there."""
        for path in (self._options_path, self.journal.path):
            path.unlink(missing_ok=True)
        sync_directory(self.folder)
        for entry in self.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @property
    def _options_path(self) -> Path:
        return self.folder / "options.json"

    def _finish_interrupted(self) -> None:
        """The moves at the end, each of which may have happened already; without manifest.json there are none."""
        complete = self.folder / "manifest.json"
        if not complete.is_file():
            return
        if self._lock < 0:
            self._take_lock()
        if self.shards.is_dir():
            self.manifest_path.unlink(missing_ok=True)  # first: a folder without one is never taken for finished
            if self.final.exists():
                self.final.rename(self.folder / f"replaced-{os.urandom(4).hex()}")
            self.shards.rename(self.final)
        self._options_path.unlink(missing_ok=True)  # without it, what is left of the folder is no set half done
        os.replace(complete, self.manifest_path)
        sync_directory(self.final.parent)
        shutil.rmtree(self.folder)
        self.close()

    def _take_lock(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {error.filename or self.folder}: {error.strerror}.") from error
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"another process is working on {self.final}. Wait for it, or choose another --output."
            ) from None
        except OSError:  # a file system without locks
            pass


def _read_options(path: Path) -> dict:
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise ValueError(f"it holds {type(options).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected the options that the set was begun with. Begin anew with "
            "--overwrite."
        ) from None
    return options
