"""The demo's steps in their order, each a command of its own, so that what is shown is what a user would type.

Two lanes, because two cores are what the demo promises to need: training goes on in one, while the other answers the
questions about the checkpoint before. A finished step leaves its time in `steps.json`; `--resume` skips it.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from qwen_merge.demo.answers import missed_goals, missed_rises, table
from qwen_merge.demo.stages import STAGES, Stage, overrides, root
from qwen_merge.demo.tables import TABLES
from qwen_merge.errors import UserError

BENCHMARKED = ("base", "stage3")
# VLMEvalKit's entry at training's resolution: the published one would blow these pictures up a hundredfold.
ENTRY = "Qwen-Merge-VL-4B-matched"


class Demo:
    """One run in the folder `output`.

    Raises:
        UserError: the folder is in use, belongs to another seed, a step failed, or the overlays are not applied.
    """

    def __init__(self, output: Path, seed: int = 0, resume: bool = False):
        self.root = root()
        self.output, self.seed = output.resolve(), seed
        self.steps_file = self.output / "steps.json"
        self.steps: dict[str, float] = {}
        self.lock = threading.Lock()
        self.began = time.monotonic()
        self._open_folder(resume)

    def _open_folder(self, resume: bool) -> None:
        if self.output.exists() and any(self.output.iterdir()):
            if not resume:
                raise UserError(
                    f"{self.output} is not empty. Go on there with --resume, name another folder with --output, "
                    "or remove it."
                )
            try:
                state = json.loads(self.steps_file.read_text())
                seed, self.steps = state["seed"], state["seconds"]
            except (OSError, ValueError, KeyError, TypeError):
                raise UserError(f"{self.output} holds no demo to resume ({self.steps_file.name} is missing).") from None
            if seed != self.seed:
                raise UserError(f"the demo in {self.output} has seed {seed}; resume it with --seed {seed}.")
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        self._save()

    def _save(self) -> None:
        content = json.dumps({"seed": self.seed, "seconds": self.steps}, indent=1)
        fresh = self.steps_file.with_suffix(".new")
        fresh.write_text(content + "\n")
        fresh.replace(self.steps_file)

    def say(self, text: str) -> None:
        seconds = int(time.monotonic() - self.began)
        print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {text}", flush=True)

    def step(self, name: str, title: str, work: Callable[[], None]) -> None:
        """Do `work` unless it was done before, and note how long it took."""
        if name in self.steps:
            self.say(f"{title}: done before")
            return
        self.say(title)
        began = time.monotonic()
        work()
        with self.lock:
            self.steps[name] = round(time.monotonic() - began, 1)
            self._save()
        self.say(f"{title}: {self.steps[name]:.0f} s")

    def command(self, name: str, *words: str | Path) -> None:
        """Run a command from the repository's root with its output in logs/; its failure ends the demo."""
        log = self.output / "logs" / f"{name}.log"
        with log.open("w") as stream:
            stream.write(f"$ {' '.join(map(str, words))}\n")
            stream.flush()
            code = subprocess.run(
                [str(word) for word in words],
                cwd=self.root,
                env=self.environment(),
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise UserError(f"{name} failed with exit code {code}. Its last lines (all of them: {log}):\n{last}")

    def environment(self) -> dict[str, str]:
        binaries = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": os.pathsep.join((binaries, os.environ.get("PATH", ""))),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(self.root / "src"), os.environ.get("PYTHONPATH")))),
            "CUDA_VISIBLE_DEVICES": "",  # several GPUs would make LLaMA-Factory start several processes
            "HF_DATASETS_CACHE": str(self.output / "cache"),
            "HF_HUB_OFFLINE": "1",
            "LMUData": str(self.output / "tables"),
            "TOKENIZERS_PARALLELISM": "false",
            # Two lanes on two cores: threads that wait for each other's core made steps four times slower.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }

    def python(self, name: str, module: str, *arguments: str | Path) -> None:
        self.command(name, sys.executable, "-m", f"qwen_merge.demo.{module}", *arguments)

    def checkpoint(self, name: str) -> Path:
        return self.output / "checkpoints" / name

    def run(self) -> int:
        """All steps. Exit code 1 when the goals are missed."""
        check_overlays()
        with ThreadPoolExecutor(max_workers=2) as lanes:
            self._make(lanes)
            self._train(lanes)
        results = {name: json.loads(self._answers(name).read_text()) for name in ("base", *(s.name for s in STAGES))}
        scores = {name: self._scores(name) for name in BENCHMARKED}
        missed = missed_goals(results) + missed_rises(scores)
        self._report(results, missed)
        total = sum(self.steps.values())
        print(f"\n{table(results)}\n")
        for name, values in scores.items():
            print(f"VLMEvalKit, {name}: " + ", ".join(f"{table} {value:.1f} %" for table, value in values.items()))
        served = json.loads((self.output / "served/answer.json").read_text())
        print(f"served by vLLM: {served['question']} {served['answer']!r} (the picture shows: {served['truth']})\n")
        print(f"{time.monotonic() - self.began:.0f} s now, {total:.0f} s of work in all.")
        print(f"See report.html and evaluation.html in {self.output}")
        for problem in missed:
            print(f"goal missed: {problem}", file=sys.stderr)
        return 1 if missed else 0

    def parents(self, lanes: ThreadPoolExecutor) -> list[Future]:
        """Make the two checkpoints that a graft is made of, `checkpoint("vlm")` and `checkpoint("llm")`."""
        parents = {"vlm": "tiny VLM: captions pictures", "llm": "tiny LLM: learns the world in words"}
        jobs = []
        for name, title in parents.items():
            work = partial(self.python, name, "checkpoints", name, self.checkpoint(name), str(self.seed))
            jobs.append(lanes.submit(self.step, name, title, work))
        return jobs

    def _make(self, lanes: ThreadPoolExecutor) -> None:
        seed, jobs = str(self.seed), self.parents(lanes)
        work = partial(self.python, "data", "records", self.output / "data", seed)
        jobs.append(lanes.submit(self.step, "data", "data sets", work))
        work = partial(self.python, "tables", "tables", self.output / "tables", seed)
        jobs.append(lanes.submit(self.step, "tables", "tables for VLMEvalKit", work))
        wait(jobs)
        self.step("merge", "merge and verify", self._merge)

    def _merge(self) -> None:
        # A base that was merged and then failed its proof must not stand in the way of the next attempt.
        base = self.checkpoint("base")
        if not base.exists():
            self.command(
                "merge",
                sys.executable,
                "src/model_merge/model_merger.py",
                *("--vlm-path", self.checkpoint("vlm"), "--llm-path", self.checkpoint("llm")),
                *("--output-path", base, "--seed", str(self.seed)),
            )
        self.command("verify", sys.executable, "-m", "qwen_merge.cli", "verify", base)

    def _train(self, lanes: ThreadPoolExecutor) -> None:
        exams = [self._examine(lanes, "base", "pt"), self._benchmark(lanes, "base")]
        model = self.checkpoint("base")
        for stage in STAGES:
            output = self.checkpoint(stage.name)
            title = f"{stage.name}: trains {stage.trains}"
            self.step(stage.name, title, partial(self._stage, stage, model))
            exams.append(self._examine(lanes, stage.name, stage.form))
            model = output
        exams.append(self._benchmark(lanes, "stage3"))
        work = partial(self.python, "serve", "serving", model, self.output / "served", str(self.seed))
        exams.append(lanes.submit(self.step, "serve", "vLLM serves stage3, curl asks", work))
        wait(exams)
        self.step("report", "report of the evaluations", self._compare)

    def _stage(self, stage: Stage, model: Path) -> None:
        # LLaMA-Factory goes on from the newest checkpoint, which a kill during its writing leaves unreadable.
        for partial_save in self.checkpoint(stage.name).glob("checkpoint-*"):
            if not (partial_save / "trainer_state.json").is_file():
                shutil.rmtree(partial_save)
        changes = overrides(stage, model, self.output / "data", self.checkpoint(stage.name), self.seed)
        words = [f"{key}={value}" for key, value, _ in changes]
        self.command(stage.name, "llamafactory-cli", "train", stage.recipe, *words)

    def _answers(self, name: str) -> Path:
        return self.output / f"answers-{name}.json"

    def _examine(self, lanes: ThreadPoolExecutor, name: str, form: str) -> Future:
        arguments = (self.checkpoint(name), self._answers(name), form, str(self.seed))
        work = partial(self.python, f"exam-{name}", "evaluation", *arguments)
        return lanes.submit(self.step, f"exam-{name}", f"exam of {name}", work)

    def _results(self, name: str) -> Path:
        return self.output / "evaluation" / name / ENTRY

    def _benchmark(self, lanes: ThreadPoolExecutor, name: str) -> Future:
        """VLMEvalKit's own run.py on both tables, greedy, answers matched exactly."""
        words: tuple[str | Path, ...] = (
            *(sys.executable, "-m", "vlmeval.run", "--data", *TABLES, "--model", ENTRY),
            *("--model-path", self.checkpoint(name), "--work-dir", self._results(name).parent),
            *("--judge", "exact_matching", "--temperature", "0", "--max-new-tokens", "64", "--reuse"),
        )
        work = partial(self.command, f"vlmeval-{name}", *words)
        return lanes.submit(self.step, f"vlmeval-{name}", f"VLMEvalKit on {name}", work)

    def _scores(self, name: str) -> dict[str, float]:
        """Percent for each table, as VLMEvalKit left it."""
        from qwen_merge.report.results import read_run

        numbers = {evaluation.dataset: evaluation.numbers for evaluation in read_run(self._results(name)).evaluations}
        if lost := [table for table in TABLES if None not in numbers.get(table, {})]:
            log = self.output / "logs" / f"vlmeval-{name}.log"
            raise UserError(f"VLMEvalKit left no score for {', '.join(lost)} in {self._results(name)}; see {log}.")
        return {table: next(value for split, value in numbers[table].items() if split is None) for table in TABLES}

    def _compare(self) -> None:
        words: list[str | Path] = [*map(self._results, BENCHMARKED), *(self.checkpoint(stage.name) for stage in STAGES)]
        self.command(
            "report",
            *(sys.executable, "-m", "qwen_merge.cli", "report", *words),
            *("--output", self.output / "evaluation.html", "--markdown", self.output / "evaluation.md"),
        )

    def _report(self, results: dict[str, dict], missed: list[str]) -> None:
        from qwen_merge.demo.report import write_report

        logs = {stage.name: self.checkpoint(stage.name) / "trainer_log.jsonl" for stage in STAGES}
        write_report(self.output, results, logs, self.steps, missed, self.seed)


def wait(jobs: list[Future]) -> None:
    """Wait for all, then raise the first failure."""
    failures = [failure for failure in [job.exception() for job in jobs] if failure]
    if failures:
        raise failures[0]


def check_overlays(upstreams: Iterable[str] = ("transformers", "llamafactory", "vlmevalkit")) -> None:
    """The stages need a LLaMA-Factory that knows the architecture; better said now than after minutes."""
    from qwen_merge.overlays import engine, manifest

    for upstream in upstreams:
        files = engine.plan(manifest.load(upstream), manifest.find_package(upstream, None))
        if {file.state for file in files} != {engine.State.APPLIED}:
            raise UserError(f"the overlay for {upstream} is not applied here; run: qwen-merge overlay apply")
