"""A source checkpoint: a local directory or a hub id. Files are named as in the checkpoint; `path` gives a local one.

Of a hub repository only what is asked for is downloaded, through huggingface_hub and into its cache, all at one commit.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from qwen_merge.errors import UserError
from qwen_merge.merger.safetensors_file import StoredTensor, read_header
from qwen_merge.merger.shards import INDEX_NAME, SINGLE_NAME


class Source:
    """A checkpoint in a local directory."""

    def __init__(self, directory: Path, role: str) -> None:
        self.directory, self.role = directory, role

    def has(self, file: str) -> bool:
        return (self.directory / file).is_file()

    def path(self, file: str) -> Path:
        """A local path of `file`.

        Raises:
            UserError: the checkpoint has no such file.
        """
        path = self.directory / file
        if not path.is_file():
            raise UserError(f"the {self.role} checkpoint {self.directory} has no {file}.")
        return path

    def origin(self) -> dict[str, str]:
        """What a manifest says about where this came from."""
        return {"path": str(self.directory.resolve())}

    def read_json(self, file: str) -> dict:
        """Raises UserError when `file` is missing or is not a JSON object."""
        path = self.path(file)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}). Copy or download it again.") from None
        if not isinstance(content, dict):
            raise UserError(f"{path} holds {type(content).__name__}; expected a JSON object.")
        return content

    def read_tensors(self, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, StoredTensor | None]:
        """All tensor names, and for those in files that hold a wanted one, where they lie.

        Raises:
            UserError: no safetensors weights, a broken file, or an index that does not agree with its files.
        """
        if not self.has(INDEX_NAME):
            if not self.has(SINGLE_NAME):
                other = "its pytorch_model.bin must be converted to safetensors first" if self._has_pickles() else ""
                raise UserError(
                    f"the {self.role} checkpoint {self.name} has neither {INDEX_NAME} nor {SINGLE_NAME}"
                    f"{'; ' + other if other else ''}. Expected a checkpoint in safetensors files."
                )
            return dict(read_header(self.path(SINGLE_NAME)))
        weight_map = self.read_json(INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{self.path(INDEX_NAME)} has no weight_map. Copy or download it again.")
        tensors: dict[str, StoredTensor | None] = dict.fromkeys(weight_map)
        problems = []
        for file in sorted({file for name, file in weight_map.items() if wanted(name)}):
            if os.path.basename(file) != file:
                raise UserError(
                    f"{self.path(INDEX_NAME)} names the file {file!r}; expected a name without directories."
                )
            header = read_header(self.path(file))
            named = {name for name, its_file in weight_map.items() if its_file == file}
            problems += [
                f"{file}: the index names tensor {name}, the file has none" for name in sorted(named - set(header))
            ]
            problems += [f"{file}: tensor {name} is not in the index" for name in sorted(set(header) - named)]
            tensors.update(header)
        if problems:
            raise UserError.from_list(
                f"the {self.role} checkpoint {self.name} and its {INDEX_NAME} disagree; copy or download it again:",
                problems[:10] + ["..."] * (len(problems) > 10),
            )
        return tensors

    @property
    def name(self) -> str:
        return str(self.directory)

    def _has_pickles(self) -> bool:
        return self.has("pytorch_model.bin") or self.has("pytorch_model.bin.index.json")


def open_source(source: str, role: str, revision: str | None = None) -> Source:
    """Open a local directory, or a hub id at a revision (branch, tag or commit; None: main).

    Raises:
        UserError: neither exists, or a revision is given for a directory.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        if revision:
            raise UserError(f"--revision {revision} was given, but the {role} {source} is a local directory.")
        return Source(path, role)
    if path.exists():
        raise UserError(f"the {role} {source} is a file; expected a checkpoint directory or a hub id.")
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or len(parts) != 2 or not all(parts):
        raise UserError(
            f"the {role} {source} does not exist: there is no directory {path.absolute()}. Expected a checkpoint "
            "directory or a hub id (NAME/MODEL)."
        )
    from qwen_merge.merger.hub import HubSource

    return HubSource(source, role, revision)
