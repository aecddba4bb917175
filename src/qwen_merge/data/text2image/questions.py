"""Questions and reference answers from Chinese-DeepSeek-R1 and alpaca, streamed from the hub or from local copies.

A question that is there twice is asked once. Each gets an id from its text alone, and with it its seeds and the choice
of modes: the same question is asked in the same way wherever it stands and however often a run is begun again.
"""

import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_merge.data.counts import Counts
from qwen_merge.data.teacher import filters
from qwen_merge.data.teacher.steps import sha256_of, short_hash
from qwen_merge.data.teacher.texts import mark_in, share_of
from qwen_merge.errors import UserError

KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class TextSet:
    """A public set. `question`: columns that are joined to the question; `reference`: the set's own answer."""

    name: str
    hub: str
    question: tuple[str, ...]
    reference: str

    def read(self, row: dict[str, Any]) -> tuple[str, str]:
        parts = [row.get(column) for column in self.question]
        question = "\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
        reference = row.get(self.reference)
        return question, reference.strip() if isinstance(reference, str) else ""


TEXT_SETS = {
    entry.name: entry
    for entry in (
        TextSet("chinese-deepseek-r1", "Congliu/Chinese-DeepSeek-R1-Distill-data-110k", ("input",), "content"),
        TextSet("alpaca", "tatsu-lab/alpaca", ("instruction", "input"), "output"),
    )
}


@dataclass(frozen=True)
class Origin:
    """One thing to read: a set on the hub at a commit, or one local file."""

    entry: TextSet
    builder: str  # "hub", "json", "parquet" or "arrow"
    place: str  # the hub's commit, or the file's path

    def recorded(self) -> list:
        """What identifies it, for the options: a commit, or a file's name and content."""
        if self.builder == "hub":
            return [self.entry.hub, self.place]
        return [self.entry.name, os.path.basename(self.place), sha256_of(Path(self.place))]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Its rows.

        Raises:
            UserError: it cannot be read.
        """
        import datasets

        datasets.disable_progress_bars()
        try:
            if self.builder == "hub":
                found = datasets.load_dataset(self.entry.hub, revision=self.place, split="train", streaming=True)
            else:
                files = {"train": [glob.escape(self.place)]}
                found = datasets.load_dataset(self.builder, data_files=files, split="train", streaming=True)
            yield from found
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            name = self.entry.hub if self.builder == "hub" else self.place
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise UserError(f"{name} cannot be read ({first}). Mend it, and give the same command to go on.") from error


@dataclass(frozen=True)
class Question:
    id: str  # of its text
    source: str
    text: str
    reference: str


def origins(names: list[str], inputs: list[Path], commits: dict[str, str] | None = None) -> list[Origin]:
    """What to read: the named sets from the hub, or local copies, whose columns say which set they are of.

    Args:
        commits: of hub sets that an earlier run began with; the others are taken as they are now.

    Raises:
        UserError: an unknown name, a file that is of neither set, a hub that cannot be reached; all together.
    """
    problems = [f"--source {name!r} is none of {', '.join(TEXT_SETS)}" for name in names if name not in TEXT_SETS]
    found = []
    for given in inputs:
        try:
            files = _files(given)
            found += [_local(file) for file in files]
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError.from_list("the sets of questions cannot be used:", problems)
    if inputs:
        return [origin for origin in found if not names or origin.entry.name in names]
    wanted = [TEXT_SETS[name] for name in names or TEXT_SETS]
    return [Origin(entry, "hub", (commits or {}).get(entry.hub) or _commit(entry.hub)) for entry in wanted]


def _files(given: Path) -> list[Path]:
    if given.is_file():
        files = [given]
    elif given.is_dir():
        files = sorted(
            file
            for file in given.rglob("*")
            if file.suffix in KINDS and not any(part.startswith(".") for part in file.relative_to(given).parts)
        )
        # A copy of a hub repository has its own descriptions among the data.
        files = [file for file in files if file.name not in ("dataset_infos.json", "dataset_info.json")]
    else:
        files = sorted(Path(match) for match in glob.glob(str(given), recursive=True))
    if not files or any(file.suffix not in KINDS for file in files):
        raise UserError(f"--input {given}: expected files that end in {', '.join(KINDS)} (a file, a folder, or a glob)")
    return files


def _local(file: Path) -> Origin:
    """A local file as a copy of the set that its first row's columns are of."""
    builder = KINDS[file.suffix]
    anything = Origin(TextSet(file.name, "", (), ""), builder, str(file.absolute()))
    first = next(anything.rows(), None)
    columns = set(first or ())
    for entry in TEXT_SETS.values():
        if {entry.question[0], entry.reference} <= columns:
            return Origin(entry, builder, str(file.absolute()))
    wanted = "; ".join(f"{entry.name}: {entry.question[0]}, {entry.reference}" for entry in TEXT_SETS.values())
    raise UserError(f"{file} has the columns {', '.join(sorted(columns)) or 'of nothing'}; expected ({wanted})")


def _commit(hub: str) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return huggingface_hub.HfApi().dataset_info(hub, timeout=60).sha or "main"
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the hub's data set {hub} cannot be read ({first}). Check the network and HF_TOKEN, or give a local copy "
            "with --input."
        ) from None


def read_questions(
    found: list[Origin], counts: Counts, limit: int | None = None, share: float = 1.0, seed: int = 0, index: Any = None
) -> Iterator[Question]:
    """The questions to ask, each once; what is left out is counted.

    Args:
        counts: gets the source rows (`rows_in`) and a reason for each that gives no question.
        limit: only the first N source rows of each set, whatever the number of its files: for trials.
        share: of the questions, a uniform sample that depends on seed and question only.
        index: evaluation sets whose questions are left out.
    """
    seen: set[str] = set()
    read: Counter[str] = Counter()  # rows of each set
    for origin in found:
        left = None if limit is None else limit - read[origin.entry.name]
        if left == 0:
            continue
        for number, row in enumerate(itertools.islice(origin.rows(), left)):
            read[origin.entry.name] += 1
            counts.rows_in += 1
            text, reference = origin.entry.read(row)
            example = f"{origin.entry.name} row {number}: {text}"
            name = short_hash(text)
            if not text:
                counts.drop("no question", f"{example}{reference}")
            elif not reference:
                counts.drop("no reference answer to judge by", example)
            elif name in seen:
                counts.drop("question asked before", example)
            elif mark := mark_in(text):
                counts.drop("media tag or control token in the question", f"{mark} in {example}")
            elif share_of(seed, f"sample {name}") >= share:
                counts.drop("not in the sample", example)
            elif hit := filters.near_copy(index, text):
                counts.drop(filters.NEAR_COPY, f"{hit}: {example}")
            else:
                seen.add(name)
                yield Question(name, origin.entry.name, text, reference)
