"""`qwen-merge demo --ablate NAME`: several grafts of the demo's tiny parents, the same budget for each, one table.

The parents and the data are made once in the demo's folder and serve every ablation and the demo itself. Each seed is a
process of its own (`trial.py`), two at a time. What has a result stays: `--resume` goes on with the rest.
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_a_while
from pathlib import Path

from qwen_merge.demo import ablation_report as report
from qwen_merge.demo.answers import CONTROL_MARGIN
from qwen_merge.demo.language import CHANCE
from qwen_merge.demo.records import write
from qwen_merge.demo.run import Demo, check_overlays, wait
from qwen_merge.demo.stages import DATASET_INFO
from qwen_merge.demo.trial import TRAINED
from qwen_merge.demo.variants import ABLATIONS, Budget, Plan, Variant, result_file, with_control
from qwen_merge.errors import UserError

DATA = "ablation-data"
SECONDS_BETWEEN_LOOKS = 2


class Ablation:
    """One ablation in a demo's folder. variants: of `ABLATIONS` unless given.

    Raises:
        UserError: another plan was begun there, or a trial failed.
    """

    def __init__(self, demo: Demo, name: str, budget: Budget | None = None, variants: list[Variant] | None = None):
        self.demo, self.name = demo, name
        self.folder = demo.output / "ablations" / name
        self.plan = Plan(
            ablation=name,
            variants=with_control(variants or ABLATIONS[name][1]),
            budget=budget or Budget(),
            seed=demo.seed,
            vlm=str(demo.checkpoint("vlm")),
            llm=str(demo.checkpoint("llm")),
            data=str(demo.output / DATA),
        )
        file, content = self.folder / "plan.json", self.plan.dump()
        if file.exists() and file.read_text() != content:
            raise UserError(
                f"{file} has other variants or another budget than this run: results of both would not compare. "
                f"Remove {self.folder}, or take another --output."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def run(self) -> int:
        """All of it. Exit code 1 when a variant does better than chance with other questions' pictures."""
        with ThreadPoolExecutor(max_workers=2) as lanes:
            wait([*self.demo.parents(lanes), lanes.submit(self.demo.step, DATA, "data of the ablations", self._data)])
            jobs = [lanes.submit(self._trials, seed) for seed in self.plan.seeds]
            self._watch(jobs)
            wait(jobs)
        content = report.gathered(self.plan, self.folder)
        report.write(self.folder, content)
        print(f"\n{report.table(content)}\n\nSee table.md, plot.png and results.json in {self.folder}")
        missed = guessed_too_well(content)
        for problem in missed:
            print(problem)
        return 1 if missed else 0

    def _data(self) -> None:
        names = [name for _, name in TRAINED]
        counts = dict(zip(names, self.plan.budget.rows, strict=True))
        write(Path(self.plan.data), self.demo.root / DATASET_INFO, names, self.plan.seed, counts)

    def _trials(self, seed: int) -> None:
        if all(result_file(self.folder, variant, seed).exists() for variant in self.plan.variants):
            return
        self.demo.python(f"ablate-{self.name}-seed{seed}", "trial", self.folder, str(seed))

    def _watch(self, jobs: list[Future]) -> None:
        """Say what has a result, until all jobs are done."""
        told: set[Path] = set()
        while True:
            unfinished = wait_a_while(jobs, timeout=SECONDS_BETWEEN_LOOKS).not_done
            for variant in self.plan.variants:
                for seed in self.plan.seeds:
                    file = result_file(self.folder, variant, seed)
                    if file not in told and file.exists():
                        told.add(file)
                        self.demo.say(f"{variant.name}, seed {seed}: {report.in_short(json.loads(file.read_text()))}")
            if not unfinished:
                return


def guessed_too_well(content: dict) -> list[str]:
    """Variants whose answers do not come from the picture."""
    return [
        f"control, {variant['name']}, {topic}: {run['control'][topic]:.1%} right with other questions' pictures, "
        f"chance is {CHANCE[topic]:.1%}"
        for variant in content["variants"]
        for run in variant["runs"]
        for topic in content["budget"]["asked"]
        if run["control"][topic] > CHANCE[topic] + CONTROL_MARGIN
    ]


def ablate(output: Path, name: str, seed: int, resume: bool) -> int:
    check_overlays(("transformers", "llamafactory"))
    return Ablation(Demo(output, seed, resume), name).run()
