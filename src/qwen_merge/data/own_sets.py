"""A user's own sets: where they are, and how much of each is taken: `qwen-merge data import`.

A file, YAML or JSON, names them:

    my_dataset:
      annotation_path: annotations.json      # JSON or JSONL
      data_path: pictures                    # what the paths in it begin at; default: the folder of the annotations

`my_dataset%50` is half of its rows. Under that very name the set is in dataset_info.json, so that a recipe says
`dataset: my_dataset%50,other` as the command did.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from qwen_merge.data import dataset_info
from qwen_merge.data.teacher.steps import sha256_of
from qwen_merge.errors import UserError

_KEYS = ("annotation_path", "data_path")
_NAME = re.compile(r"[^\s/\\%,.][^\s/\\%,]*")  # of a folder: not hidden, and neither . nor ..
_SHARE = re.compile(r"(?P<set>[^%]+)(?:%(?P<share>\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class OwnSet:
    """`share`: of the rows, in percent, more than 0 and at most 100."""

    name: str
    annotations: Path
    folder: Path
    share: float

    def digest(self) -> str:
        return sha256_of(self.annotations)

    def rows_of(self, rows: int) -> int:
        return math.floor(rows * self.share / 100 + 1e-9)


def find(wanted: list[str], registry: Path) -> list[OwnSet]:
    """The sets that the command line names, each perhaps with a share, several with commas between them.

    Raises:
        UserError: all that is wrong with the names and with the file's entries of these names.
    """
    known = _read(registry)
    found: list[OwnSet] = []
    problems: list[str] = []
    for name in [part.strip() for text in wanted for part in text.split(",") if part.strip()]:
        match = _SHARE.fullmatch(name)
        share = float(match["share"] or 100) if match else 0
        if match is None or not 0 < share <= 100:
            problems.append(f"{name!r}: expected a name, or a name and a share of up to 100 such as my_dataset%50")
        elif match["set"] not in known:
            problems.append(f"{match['set']} is not in {registry}, which has {', '.join(sorted(known)) or 'no set'}")
        elif match["set"] in [one.name.partition("%")[0] for one in found]:
            problems.append(f"{match['set']} is named twice")
        elif entry := _entry(name, share, match["set"], known[match["set"]], registry.parent, problems):
            found.append(entry)
    if not found and not problems:
        problems.append("no set is named")
    if problems:
        raise UserError.from_list("nothing was begun:", problems)
    return found


def _read(registry: Path) -> dict:
    try:
        content = yaml.safe_load(registry.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{registry} cannot be read as YAML or JSON: {error}") from None
    names = list(content) if isinstance(content, dict) else [None]
    if not all(isinstance(name, str) and _NAME.fullmatch(name) and name != dataset_info.NAME for name in names):
        raise UserError(
            f"{registry}: expected an entry for each set, its name (without blanks, slashes, commas and %, and no dot "
            f"at its beginning; {dataset_info.NAME} is taken) before annotation_path and data_path."
        )
    return content


def _entry(name: str, share: float, key: str, values: object, base: Path, problems: list[str]) -> OwnSet | None:
    """Paths begin at the folder of the file that names them."""
    before = len(problems)
    if not isinstance(values, dict) or "annotation_path" not in values:
        problems.append(f"{key}: expected annotation_path, and data_path if need be")
        return None
    problems += [f"{key}: unknown key {one!r}; expected {' or '.join(_KEYS)}" for one in values if one not in _KEYS]
    paths = {one: values.get(one) or "" for one in _KEYS}
    problems += [
        f"{key}: {one} is {path!r}; expected a path" for one, path in paths.items() if not isinstance(path, str)
    ]
    if len(problems) > before:
        return None
    annotations = base / Path(paths["annotation_path"]).expanduser()
    folder = base / Path(paths["data_path"]).expanduser() if paths["data_path"] else annotations.parent
    if not annotations.is_file():
        problems.append(f"{key}: annotation_path {annotations} is no file")
    if not folder.is_dir():
        problems.append(f"{key}: data_path {folder} is no folder")
    return OwnSet(name, annotations, folder, share) if len(problems) == before else None
