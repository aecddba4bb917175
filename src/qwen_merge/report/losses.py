"""What LLaMA-Factory leaves of a training: its loss, learning rate and time.

`trainer_log.jsonl` has a line a logged step and is there while the training still runs; `trainer_state.json` is the
trainer's own record, read where the log is missing; `train_results.json` has the time of a finished run.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qwen_merge.errors import UserError
from qwen_merge.report.responses import parsed_line

LOG, STATE, RESULTS = "trainer_log.jsonl", "trainer_state.json", "train_results.json"
SMOOTHING = 0.9  # weight of the past in the bold line
LOGARITHMIC_FROM = 5  # times the least loss: below, a linear axis shows more


@dataclass
class Training:
    """One stage."""

    folder: Path
    losses: list[tuple[int, float]]  # (step, loss)
    rates: list[tuple[int, float]]  # (step, learning rate)
    total_steps: int | None
    runtime: str | None
    not_finite: int  # logged losses that are no number
    label: str = ""


def is_training(folder: Path) -> bool:
    return (folder / LOG).is_file() or (folder / STATE).is_file()


def read_training(folder: Path) -> Training:
    """Losses in the order of steps. A resumed run repeats some: the last word on a step counts.

    Raises:
        UserError: a file is broken, or holds no loss at all.
    """
    entries = _log(folder / LOG) if (folder / LOG).is_file() else _state(folder / STATE)
    losses, rates, total, not_finite = {}, {}, None, 0
    for entry in entries:
        step = entry.get("current_steps")
        total = entry.get("total_steps", total)
        if not isinstance(step, int) or "loss" not in entry:
            continue
        loss, rate = entry["loss"], entry.get("lr")
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            losses[step] = float(loss)
        else:
            not_finite += 1
        if isinstance(rate, (int, float)) and math.isfinite(rate):
            rates[step] = float(rate)
    if not losses:
        raise UserError(
            f"{folder} has a training log without a single loss. Wait for the first logged step, or leave it out."
        )
    return Training(folder, sorted(losses.items()), sorted(rates.items()), total, _runtime(folder, entries), not_finite)


def _log(file: Path) -> list[dict]:
    with file.open("rb") as lines:
        return [parsed_line(line, file, number) for number, line in enumerate(lines, start=1) if line.strip()]


def _state(file: Path) -> list[dict]:
    state = _object(file)
    history = state.get("log_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise UserError(f"{file} has no list 'log_history'. Take it from the last checkpoint, or leave the folder out.")
    total = state.get("max_steps")
    return [
        {"current_steps": entry.get("step"), "lr": entry.get("learning_rate"), "total_steps": total}
        | ({"loss": entry["loss"]} if "loss" in entry else {})
        for entry in history
    ]


def _object(file: Path) -> dict:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}). Take it from the last checkpoint, or delete it.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is {type(value).__name__}, expected a JSON object. Delete it.")
    return value


def _runtime(folder: Path, entries: list[dict]) -> str | None:
    """Of the whole run; a resumed one counts from where it went on, as LLaMA-Factory does."""
    if (folder / RESULTS).is_file():
        seconds = _object(folder / RESULTS).get("train_runtime")
        if isinstance(seconds, (int, float)) and math.isfinite(seconds):
            minutes, rest = divmod(round(seconds), 60)
            hours, minutes = divmod(minutes, 60)
            return f"{hours}:{minutes:02}:{rest:02}"
    stated = [entry["elapsed_time"] for entry in entries if isinstance(entry.get("elapsed_time"), str)]
    if not stated:
        return None
    done = entries[-1].get("current_steps") == entries[-1].get("total_steps")
    return stated[-1] if done else f"{stated[-1]} so far"


def smoothed(values: Iterable[float]) -> list[float]:
    result: list[float] = []
    for value in values:
        result.append(value if not result else SMOOTHING * result[-1] + (1 - SMOOTHING) * value)
    return result


def logarithmic(values: list[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= LOGARITHMIC_FROM
