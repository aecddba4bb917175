"""What VLMEvalKit leaves in a folder, read without importing it.

A model's folder is `<work-dir>/<model>/`. VLMEvalKit at commit 21b00fa writes into `T<date>_G<commit>/` below it and
links the files of a finished evaluation into the folder itself; ms-vlmeval 0.0.18 writes there directly. Beside the
scores lie this kit's `..._settings.json` (how the answers were made) and `..._responses.jsonl` (the answers).
"""

import fnmatch
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from qwen_merge.errors import UserError
from qwen_merge.report.published import BY_DATASET, Task
from qwen_merge.report.responses import Answer, Key, read_responses
from qwen_merge.report.scores import read_json, read_score

DATED = re.compile(r"T\d{8}_G")
SCORES = ("_acc.csv", "_score.csv", "_score.json")
OURS = ("_settings.json", "_responses.jsonl")
PREDICTIONS = (".xlsx", ".tsv", ".json")
# VLMEvalKit shortens the judge in some file names.
JUDGE_NAMES = {"openai": "chatgpt-0125", "gpt4": "gpt-4-0125", "gpt4-turbo": "gpt-4-turbo", "gpt4o-mini": "gpt-4o-mini"}
# Written with `_score.csv` or `_acc.csv` at the end, but about parts of another file's number.
PARTS = ("_score_fine.csv", "_acc_all.csv", "_cotpost_acc.csv")


@dataclass
class Evaluation:
    """One data set answered by one model."""

    dataset: str
    numbers: dict[str | None, float] = field(default_factory=dict)  # split (None: the whole) to percent
    source: Path | None = None
    judge: str | None = None  # the one asked for, from the settings file or else a file name
    settings: dict | None = None  # the settings file as it is
    answers: int | None = None
    responses: dict[Key, Answer] = field(default_factory=dict)

    @property
    def task(self) -> Task | None:
        return BY_DATASET.get(self.dataset)

    @property
    def judges(self) -> str | None:
        """The family within which one judge must score everything; None: scored by rule."""
        if self.task:
            return self.task.judges
        return "options" if self.source is None or self.source.name.endswith("_acc.csv") else self.dataset

    @property
    def unclosed(self) -> int | None:
        """Answers whose thought never ended; None where nothing is known."""
        return sum(answer.closed is False for answer in self.responses.values()) if self.responses else None

    def identity(self) -> dict[str, object] | None:
        """Everything but the judge that two numbers of one column must share; None: settings unknown."""
        if self.settings is None:
            return None
        whole = {name: self.settings.get(name) for name in ("model_path", "model_type", "backend")}
        for group in ("settings", "pins", "checkpoint"):
            values = self.settings.get(group)
            prefix = "" if group == "settings" else f"{group}."
            whole |= _flat(values, prefix) if isinstance(values, dict) else {group: values}
        return whole


@dataclass
class Run:
    """A model's folder."""

    folder: Path
    model: str
    evaluations: list[Evaluation]
    label: str = ""


def _flat(values: dict, prefix: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def is_model_folder(folder: Path) -> bool:
    return any(
        path.name.endswith(SCORES + OURS) for where in (folder, *dated_folders(folder)) for path in where.iterdir()
    )


def dated_folders(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((path for path in folder.iterdir() if path.is_dir() and DATED.match(path.name)), reverse=True)


def read_run(folder: Path) -> Run:
    """Everything a model's folder holds.

    Raises:
        UserError: a file cannot be read, or none begins with the model's name.
    """
    model = _model_name(folder)
    places = [folder, *dated_folders(folder)]
    datasets = _datasets(places, model)
    if not datasets:
        raise UserError(
            f"{folder} has result files, but none that begins with {model + '_'!r}. VLMEvalKit names files after the "
            "model and the folder after it too: give the folder its old name."
        )
    return Run(folder, model, [_evaluation(places, model, dataset, datasets) for dataset in datasets])


def _model_name(folder: Path) -> str:
    """The folder's name; in a dated folder its parent's; where a settings file says another, that one."""
    resolved = folder.resolve()
    name = resolved.parent.name if DATED.match(resolved.name) else resolved.name
    if any(path.name.startswith(f"{name}_") for place in (folder, *dated_folders(folder)) for path in place.iterdir()):
        return name
    for file in sorted(folder.glob("*_settings.json")):
        stated = read_settings(file).get("model")
        if isinstance(stated, str) and file.name.startswith(f"{stated}_"):
            return stated
    return name


def _datasets(places: list[Path], model: str) -> list[str]:
    """The data sets with a score, settings or answers, in the published order, then by name."""
    rests = {
        path.name.removeprefix(f"{model}_")
        for place in places
        for path in place.iterdir()
        if path.name.startswith(f"{model}_") and path.exists()
    }
    # A judge's score is `<data set>_<judge>_score.csv`, and both parts may hold underscores: names known from
    # elsewhere tell where the data set ends.
    known = set(BY_DATASET)
    known |= {rest.removesuffix(end) for rest in rests for end in (*PREDICTIONS, *OURS) if rest.endswith(end)}
    found = set()
    for rest in rests:
        if rest.endswith(PARTS):
            continue
        for end in ("_acc.csv", "_score.json", *OURS):
            if rest.endswith(end):
                found.add(rest.removesuffix(end))
        if rest.endswith("_score.csv"):
            stem = rest.removesuffix("_score.csv")
            before_a_judge = [name for name in known if stem.startswith(f"{name}_")]
            found.add(max(before_a_judge, key=len, default=stem))
    order = {dataset: index for index, dataset in enumerate(BY_DATASET)}
    return sorted(found, key=lambda dataset: (order.get(dataset, len(order)), dataset))


def _evaluation(places: list[Path], model: str, dataset: str, datasets: list[str]) -> Evaluation:
    evaluation = Evaluation(dataset)
    stem = f"{model}_{dataset}"
    beside = places
    for place in places:  # all files of one data set from one place: an older folder's settings say nothing here
        candidates = _score_files(place, stem, dataset, datasets, model)
        if candidates:
            real = candidates[0].resolve().parent
            beside = [real, place] if real != place.resolve() else [place]
            break
    settings = _first(beside, f"{stem}_settings.json")
    if settings:
        evaluation.settings = read_settings(settings)
        evaluation.judge = evaluation.settings.get("judge")
    responses = _first(beside, f"{stem}_responses.jsonl")
    if responses:
        evaluation.responses = read_responses(responses, dataset)
    if candidates:
        evaluation.source = _one_judge(candidates, stem, evaluation)
        evaluation.numbers, evaluation.answers = read_score(evaluation.source, BY_DATASET.get(dataset))
        if evaluation.judge is None:  # none was asked for: VLMEvalKit chose one for each data set
            evaluation.judge = _judge_in_name(evaluation.source, stem) or _judge_of_options(beside, stem)
    if evaluation.answers is None:
        table = _first(beside, f"{stem}.xlsx")
        evaluation.answers = _rows(table) if table else None
    if evaluation.answers is None and responses:
        # Last, because a question that a data set asks twice is answered once.
        evaluation.answers = len(evaluation.responses)
    return evaluation


def _first(places: list[Path], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)


def _score_files(place: Path, stem: str, dataset: str, datasets: list[str], model: str) -> list[Path]:
    task = BY_DATASET.get(dataset)
    patterns = [stem + task.score] if task else [stem + end for end in (*SCORES, "_*_score.csv")]
    longer = tuple(f"{model}_{other}_" for other in datasets if other != dataset and other.startswith(f"{dataset}_"))
    found = []
    for pattern in patterns:
        for path in sorted(place.iterdir()):
            if fnmatch.fnmatchcase(path.name, _literal_but_star(pattern)) and path.is_file():
                if path.name.endswith(PARTS) or (longer and path.name.startswith(longer)):
                    continue
                found.append(path)
        if found:
            break
    return found


def _literal_but_star(pattern: str) -> str:
    return re.sub(r"([\[?])", r"[\1]", pattern)


def _judge_in_name(file: Path, stem: str) -> str | None:
    """The judge of `<stem>_<judge>_score.csv`."""
    name = file.name.removeprefix(stem).removesuffix("_score.csv").removeprefix("_")
    if file.name.endswith("_score.csv") and name:
        return JUDGE_NAMES.get(name, name)
    return None


def _judge_of_options(places: list[Path], stem: str) -> str | None:
    """The judge of multiple choice, which only the name of the detailed result shows: `<stem>_<judge>_result.xlsx`."""
    for place in places:
        for file in sorted(place.glob(f"{_literal_but_star(stem)}_*_result.*")):
            name = file.name.removeprefix(f"{stem}_").rsplit("_result.", 1)[0]
            return JUDGE_NAMES.get(name, name)
    return None


def _one_judge(candidates: list[Path], stem: str, evaluation: Evaluation) -> Path:
    if len(candidates) == 1:
        return candidates[0]
    stated = [file for file in candidates if _judge_in_name(file, stem) == evaluation.judge]
    if len(stated) == 1:
        return stated[0]
    names = ", ".join(file.name for file in candidates)
    raise UserError(
        f"{candidates[0].parent} holds several scores of {evaluation.dataset} ({names}) and nothing says which one is "
        "meant. Move the others to another folder."
    )


def read_settings(file: Path) -> dict:
    settings = read_json(file)
    if not isinstance(settings, dict) or not isinstance(settings.get("settings"), dict):
        raise UserError(f"{file} has no object 'settings'; it is not a settings file. Evaluate that data set again.")
    return settings


def _rows(table: Path) -> int | None:
    """Answers in a prediction file: its rows less the header, counted without a spreadsheet library."""
    try:
        with zipfile.ZipFile(table) as archive, archive.open("xl/worksheets/sheet1.xml") as sheet:
            count, tail = 0, b""
            while chunk := sheet.read(1 << 20):
                count += (tail + chunk).count(b"<row ")
                tail = chunk[-4:]
            return max(count - 1, 0)
    except (zipfile.BadZipFile, KeyError, OSError):
        return None  # only the count is lost
