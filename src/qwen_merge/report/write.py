"""From folders to the two files: reads, refuses, and writes each file complete or not at all."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_merge.errors import UserError
from qwen_merge.report.losses import Training, is_training, read_training
from qwen_merge.report.markdown import markdown
from qwen_merge.report.page import render
from qwen_merge.report.results import DATED, Run, is_model_folder, read_run
from qwen_merge.report.table import arrange, build


def run(arguments: argparse.Namespace) -> int:
    """`qwen-merge report`."""
    outputs = [path for path in (arguments.output, arguments.markdown) if path]
    _check_outputs(outputs)
    runs, trainings = read_all(arguments.runs)
    table = build(arrange(runs, arguments.split_by_settings))
    texts = [render(table, trainings, arguments.samples, arguments.seed)]
    if arguments.markdown:
        texts.append(markdown(table))
    write_all(dict(zip(outputs, texts, strict=True)))
    numbers = sum(cell is not None and cell.value is not None for row in table.rows for cell in row.cells)
    print(f"{numbers} numbers of {len(runs)} runs and {len(trainings)} trainings: {', '.join(map(str, outputs))}")
    return 0


def read_all(folders: Sequence[Path]) -> tuple[list[Run], list[Training]]:
    """Every run and training in the folders, or one level below them, each once.

    Raises:
        UserError: what is missing, holds nothing to read, or is broken; all of it in one message.
    """
    runs: dict[Path, Run] = {}
    trainings: dict[Path, Training] = {}
    problems = []
    for folder in folders:
        try:
            for found in _found(folder):
                place = found.resolve()
                if is_training(found):
                    trainings[place] = read_training(found)
                if is_model_folder(found):
                    runs[place] = read_run(found)
        except UserError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{error.filename or folder} cannot be read ({error.strerror}). Check its permissions.")
    if problems:
        raise UserError(problems[0]) if len(problems) == 1 else UserError.from_list("cannot read:", problems)
    for item, label in zip(runs.values(), labels([run.folder for run in runs.values()]), strict=True):
        item.label = label
    for stage, label in zip(trainings.values(), labels([each.folder for each in trainings.values()]), strict=True):
        stage.label = label
    return list(runs.values()), list(trainings.values())


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        seen = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"{folder} {seen}; expected a folder of VLMEvalKit (<work-dir>/<model>) or LLaMA-Factory. Check the path."
        )
    if is_training(folder) or is_model_folder(folder):
        return [folder]
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [path for path in below if is_training(path) or is_model_folder(path)]
    if not found:
        raise UserError(
            f"{folder} and the folders in it hold neither scores of VLMEvalKit (<model>_<data set>_acc.csv, "
            "_score.csv, _score.json) nor a trainer_log.jsonl of LLaMA-Factory. Evaluate first, or give another folder."
        )
    return found


def labels(folders: Sequence[Path]) -> list[str]:
    """Names, with as many parents before them as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    paths = [path.parent if DATED.match(path.name) and path.parent not in paths else path for path in paths]
    names = ["/".join(path.parts[-1:]) for path in paths]
    depth = 1
    while len(set(names)) < len(names) and depth < max(len(path.parts) for path in paths):
        depth += 1
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(path.parts[-depth:]) if name in twice else name for path, name in zip(paths, names, strict=True)
        ]
    return names


def _check_outputs(outputs: Sequence[Path]) -> None:
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise UserError("--output and --markdown are the same file; one would overwrite the other. Name two.")
    for path in outputs:
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a file to write. Name a file in it.")
        if not path.parent.is_dir():
            raise UserError(f"{path.parent} does not exist; the report is written there. Make it first.")


def write_all(texts: dict[Path, str]) -> None:
    """Each file beside its place, then renamed: a full disk leaves the old report, and nothing half written."""
    staged: list[tuple[str, Path]] = []
    try:
        for path, content in texts.items():
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            staged.append((name, path))
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n", errors="replace") as file:
                file.write(content)
            os.chmod(name, 0o666 & ~_umask())  # mkstemp keeps others out; a report is to be read
        while staged:
            os.replace(*staged[0])
            staged.pop(0)
    except OSError as error:
        names = ", ".join(map(str, texts))
        raise UserError(f"cannot write {names}: {error}. Make room or choose another place.") from None
    finally:
        for name, _ in staged:
            os.unlink(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
