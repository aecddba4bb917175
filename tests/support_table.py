"""What works for every tower, projector and LLM that `qwen-merge graft` joins: each cell is run, on tiny checkpoints.

    python tests/support_table.py --folder DIR --markdown        all of it: an hour or less on two cores
    python tests/support_table.py --folder DIR --towers siglip --llms qwen3 --columns loads packs
    python tests/support_table.py --folder DIR --markdown --show    the table of what has been run

loads: transformers finds each tensor, and a text's logits are the LLM's own. trains: one step changes projector and
LLM, and of the tower nothing. packs: the loss of samples in one row is theirs alone. serves: vLLM's greedy tokens equal
transformers', for texts and pictures. A run that was stopped goes on where it was; other versions need another folder.
"""

import argparse
import itertools
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import grafts
from greedy import QUICK, by_transformers, by_vllm, picture_requests, tokens_of
from qwen_merge.architecture import register
from qwen_merge.errors import UserError

COLUMNS = ("loads", "trains", "packs", "serves")
AT_ONCE = 6  # engines a process of vLLM
NAMES = {
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "siglip2": "SigLIP2 of any size",
    "qwen3_vl": "Qwen3-VL",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "qwen2": "Qwen2.5",
}
Parts = tuple[str, str, str]  # tower, projector, LLM
# Words of a reason that name one pair, and what is true of all of them.
GENERAL = {
    r"and \w+ has none": "and this tower has none",
    r"^ValidationError: .* Value error, (.*?) \[type=.*$": r"\1",
    r"gives \d+ values a token, and the LLM's are \d+ wide": "is not as wide as these LLMs",
}


def loads(checkpoint: Path, llm: Path) -> str | None:
    """None, or what is wrong; as the two below."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    if unclear := {name: values for name, values in info.items() if values}:
        return f"transformers reports {unclear}"
    own = grafts.language_model(llm)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = (model.eval()(input_ids=ids).logits - own(ids).logits).abs().max().item()
    return None if apart < 1e-5 else f"a text's logits differ from the LLM's own by {apart:.1e}"


def trains(checkpoint: Path, llm: Path) -> str | None:
    model, processor = _open(checkpoint)
    model.model.visual.requires_grad_(False)  # the extended projector of Qwen-Merge's own form is in it
    if hasattr(model.model.visual, "merger"):
        model.model.visual.merger.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    inputs = processor(text=[grafts.PROMPT], images=grafts.pictures((56, 56)), return_tensors="pt")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    parts = {_part(name) for name in changed}
    if not loss.isfinite():
        return f"the loss is {loss.item()}"
    missing, more = {"projector", "language_model"} - parts, parts & {"visual"}
    return f"a step changed {sorted(parts)}" if missing or more else None


def _part(name: str) -> str:
    if ".visual.merger." in name:
        return "projector"
    return next((part for part in ("visual", "projector", "language_model") if f".{part}." in name), name)


def packs(checkpoint: Path, llm: Path) -> str | None:
    alone, packed, control = grafts.losses_alone_and_packed(*_open(checkpoint))
    if abs(packed - alone) > 1e-5:
        return f"the loss of packed samples is {packed:.6f}, that of each alone {alone:.6f}"
    return None if abs(control - alone) > 1e-3 else "the control does not differ: nothing is shown"


def _open(checkpoint: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(checkpoint).train(), AutoProcessor.from_pretrained(checkpoint)


IN_PROCESS: dict[str, Callable[[Path, Path], str | None]] = {"loads": loads, "trains": trains, "packs": packs}


class Table:
    """The cells of a folder: for each pair a file with what was seen of each column."""

    def __init__(self, folder: Path):
        self.folder = folder
        for part in ("cells", "checkpoints", "drawn"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self.make = grafts.Grafts(folder / "checkpoints")
        self.requests = picture_requests(folder)

    def cell(self, parts: Parts) -> dict[str, dict]:
        """Column -> {"works": whether, "why": if it does not}."""
        file = self._file(parts)
        return json.loads(file.read_text()) if file.exists() else {}

    def write(self, parts: Parts, **columns: str | None) -> None:
        """Columns with what is wrong with them, None for nothing."""
        seen = {name: {"works": why is None, **({"why": why} if why else {})} for name, why in columns.items()}
        staged = self._file(parts).with_suffix(".part")
        staged.write_text(json.dumps({**self.cell(parts), **seen}, indent=1))
        staged.replace(self._file(parts))
        print("-".join(parts), {name: why or "works" for name, why in columns.items()}, flush=True)

    def _file(self, parts: Parts) -> Path:
        return self.folder / "cells" / f"{'-'.join(parts)}.json"

    def checkpoint(self, parts: Parts, positions: str = "mrope") -> Path:
        return self.make(*parts, positions)

    def run(self, pairs: list[Parts], columns: list[str]) -> None:
        """What is asked for and not there yet."""
        register()
        left: list[Parts] = []
        for parts in pairs:
            wanted = [name for name in columns if name not in self.cell(parts)]
            if not wanted:
                continue
            try:
                checkpoint = self.checkpoint(parts)
            except UserError as error:
                why = str(error).split("\n")[-1].strip(" -")
                self.write(parts, **dict.fromkeys(COLUMNS, f"there is no such graft: {why}"))
                continue
            for name in wanted:
                if name in IN_PROCESS:
                    check = partial(IN_PROCESS[name], checkpoint, self.make.folder / parts[2])
                    self.write(parts, **{name: _reason(check)})
            if "serves" in wanted:
                left.append(parts)
        while left:
            now, left = left[:AT_ONCE], left[AT_ONCE:]
            self._serve(now)

    def _serve(self, pairs: list[Parts]) -> None:
        drawn = {parts: self._drawn(parts) for parts in pairs}
        engine = {**QUICK, "limit_mm_per_prompt": {"image": 2}}
        jobs = [
            {"name": "-".join(parts), "model": str(checkpoint), "engine": engine, "may_fail": True}
            | {"rounds": [list(self.requests.values())]}
            for parts, checkpoint in drawn.items()
        ]
        try:
            answers: dict[str, Any] = by_vllm(jobs, self.folder)
        except AssertionError as error:  # the process died
            if len(pairs) > 1:
                for parts in pairs:
                    self._serve([parts])
                return
            answers = {"-".join(pairs[0]): {"error": f"vLLM's process ended: {str(error).splitlines()[-1]}"}}
        for parts, checkpoint in drawn.items():
            answer = answers["-".join(parts)]
            if isinstance(answer, dict):
                self.write(parts, serves=" ".join(answer["error"].split())[:300])
                continue
            self.write(parts, serves=_reason(partial(self._compare, checkpoint, answer[0])))

    def _compare(self, checkpoint: Path, outputs: list[dict]) -> str | None:
        expected, seen = by_transformers(checkpoint, self.requests), tokens_of(self.requests, outputs)
        wrong = [name for name in self.requests if expected[name] != seen[name]]
        return f"vLLM's tokens differ for {', '.join(wrong)}" if wrong else None

    def _drawn(self, parts: Parts) -> Path:
        """With a projector whose pictures change what is said."""
        target = self.folder / "drawn" / "-".join(parts)
        return target if target.exists() else grafts.with_projector(self.checkpoint(parts), target, seed=1)

    def markdown(self, pairs: list[Parts]) -> str:
        """A row for each projector and all towers of which the same is true."""
        towers, projectors, llms = (dict.fromkeys(column) for column in zip(*pairs, strict=True))
        reasons: dict[str, int] = {}

        def mark(parts: Parts) -> str:
            cell = self.cell(parts)
            marks = []
            for column in COLUMNS:
                seen = cell.get(column)
                if seen is None:
                    marks.append("?")
                elif seen["works"]:
                    marks.append("✓")
                else:
                    why = seen["why"]
                    for special, general in GENERAL.items():
                        why = re.sub(special, general, why)
                    marks.append(f"–[{reasons.setdefault(why, len(reasons) + 1)}]")
            return marks[0] if len(set(marks)) == 1 and marks[0] != "✓" else " ".join(marks)

        rows: dict[tuple[str, str], list[str]] = {}
        for projector, tower in itertools.product(projectors, towers):
            cells = " | ".join(mark((tower, projector, llm)) for llm in llms)
            rows.setdefault((projector, cells), []).append(NAMES.get(tower, tower))
        lines = [
            f"Each cell: {', '.join(COLUMNS)}. ✓: run and right; –: not supported, see below; ?: not run.",
            "",
            f"| projector | towers | {' | '.join(NAMES[llm] for llm in llms)} |",
            f"|---|---|{'---|' * len(llms)}",
            *(f"| {projector} | {', '.join(names)} | {cells} |" for (projector, cells), names in rows.items()),
        ]
        return "\n".join([*lines, "", *(f"[{number}] {why}" for why, number in reasons.items())])


def _reason(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:  # whatever it is: it is why this cell does not work
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints and results, to go on from")
    for name, known in (("towers", grafts.TOWERS), ("projectors", tuple(grafts.PROJECTORS)), ("llms", grafts.LLMS)):
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--markdown", action="store_true", help="print the table")
    parser.add_argument("--show", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    pairs = list(itertools.product(arguments.towers, arguments.projectors, arguments.llms))
    table = Table(arguments.folder)
    if not arguments.show:
        table.run(pairs, list(arguments.columns))
    if arguments.markdown:
        print(table.markdown(pairs))


if __name__ == "__main__":
    main()
