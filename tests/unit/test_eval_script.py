"""`scripts/eval.sh` with a stand-in for VLMEvalKit's run.py: what is run, what counts as done, what is run again.

The script is copied to a folder of its own, whose .venv runs this interpreter.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MODEL = "Qwen-Merge-VL-4B"
KNOBS = ("BACKEND", "JUDGE", "LMUData", "MODEL_NAME", "SEED", "TEMPERATURE", "WORK_DIR")
KNOBS += ("OPENAI_API_KEY", "OPENAI_API_BASE", "QWEN_MERGE_ENDPOINT", "MAX_NEW_TOKENS", "NPROC")

# Does as a run.py with the overlay does: writes answers, and in mode all a score. PLAN says what goes wrong.
RUNNER = """# qwen_merge
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for option in "data model model-path work-dir mode judge nproc endpoint seed".split():
    parser.add_argument("--" + option)
for option in "reuse verbose use-vllm".split():
    parser.add_argument("--" + option, action="store_true")
args = parser.parse_args()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(vars(args)) + chr(10))
plan = json.loads(os.environ.get("PLAN", "{}")).get(args.data, "well")
if plan == "exit":
    sys.exit(3)
folder = pathlib.Path(args.work_dir, args.model)
folder.mkdir(parents=True, exist_ok=True)
if plan != "nothing":
    (folder / f"{args.model}_{args.data}.xlsx").write_text("answers")
    if args.mode == "all":
        (folder / f"{args.model}_{args.data}_acc.csv").write_text("score")
"""


class Script:
    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "scripts").mkdir()
        shutil.copy(REPOSITORY / "scripts/eval.sh", folder / "scripts")
        python = folder / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (folder / "kit/vlmeval/dataset").mkdir(parents=True)
        (folder / "kit/run.py").write_text(RUNNER)
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text('{"model_type": "qwen2_5_vl_merge"}')
        (self.model / "model.safetensors").write_bytes(b"weights")
        self.results = folder / f"outputs/eval/model/{MODEL}"

    def __call__(self, *tasks: str, plan: dict[str, str] | None = None, **environment: str):
        """(exit code, what was said, the calls of run.py)"""
        calls = self.folder / "calls"
        calls.write_text("")
        kept = {name: value for name, value in os.environ.items() if name not in KNOBS}
        kept |= {"VLMEVALKIT": str(self.folder / "kit"), "CALLS": str(calls), "PLAN": json.dumps(plan or {})}
        result = subprocess.run(
            [self.folder / "scripts/eval.sh", self.model, *tasks],
            env={**kept, "BACKEND": "transformers", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return result.returncode, result.stderr, [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.fixture
def script(tmp_path) -> Script:
    return Script(tmp_path)


def asked(calls: list[dict]) -> list[tuple[str, str, str]]:
    return [(call["data"], call["mode"], call["judge"]) for call in calls]


def test_every_task_is_run_once_and_not_again(script):
    status, said, calls = script("MMStar", "OCRBench", SEED="7", NPROC="3")
    assert status == 0, said
    assert asked(calls) == [("MMStar", "all", "exact_matching"), ("OCRBench", "all", "exact_matching")]
    assert calls[0] | {"model": MODEL, "reuse": True, "use_vllm": False, "nproc": "3", "seed": "7"} == calls[0]
    assert (calls[0]["model_path"], calls[0]["endpoint"]) == (str(script.model), None)
    assert (script.results / f"{MODEL}_MMStar_acc.csv").read_text() == "score"
    assert "all 2 tasks are done" in said
    status, said, calls = script("MMStar", "OCRBench", SEED="7")
    assert (status, calls) == (0, [])
    assert said.count("finished before") == 2
    assert len(script("MMStar", SEED="8")[2]) == 1  # control: other settings


def test_a_task_that_fails_does_not_stop_the_others_and_is_tried_again(script):
    tasks = ("MMStar", "OCRBench", "AI2D_TEST")
    status, said, calls = script(*tasks, plan={"MMStar": "exit", "OCRBench": "nothing"})
    assert status == 1
    assert len(calls) == 3
    assert "MMStar: VLMEvalKit left with exit code 3" in said
    assert "OCRBench: no score was written" in said
    assert "failed: MMStar OCRBench (2 of 3)" in said
    status, said, calls = script(*tasks)
    assert status == 0
    assert [call["data"] for call in calls] == ["MMStar", "OCRBench"]


def test_what_only_a_judge_can_score_is_answered_and_scored_when_there_is_one(script):
    status, said, calls = script("MMVet")
    assert (status, asked(calls)) == (0, [("MMVet", "infer", "exact_matching")])
    assert "MMVet: answered, not scored" in said
    assert script("MMVet")[2] == []
    status, _, calls = script("MMVet", "LogicVista", OPENAI_API_KEY="sk-any")
    assert asked(calls) == [("MMVet", "all", "chatgpt-0125"), ("LogicVista", "all", "gpt-4o-mini")]
    status, said, _ = script("MMVet", plan={"MMVet": "nothing"}, SEED="1")
    assert status == 1
    assert "MMVet: no answers were written" in said


@pytest.mark.parametrize("task", ["MMStar", "MMVet"])
def test_results_that_were_deleted_are_made_again(script, task):
    script(task)
    assert script(task)[2] == []  # control
    shutil.rmtree(script.results)
    status, said, calls = script(task)
    assert (status, len(calls)) == (0, 1)
    assert "finished before" not in said


def test_another_server_or_other_weights_are_another_model(script):
    def run(number: int) -> list[dict]:
        return script("MMStar", BACKEND="endpoint", QWEN_MERGE_ENDPOINT=f"http://server{number}:8000/v1")[2]

    assert [call["endpoint"] for call in run(1)] == ["http://server1:8000/v1"]
    assert run(1) == []
    assert [call["endpoint"] for call in run(2)] == ["http://server2:8000/v1"]
    (script.model / "model.safetensors").write_bytes(b"other weights")
    assert len(run(2)) == 1


def test_a_judge_without_a_key_is_said(script):
    status, said, calls = script("MMStar", JUDGE="gpt-4o-mini")
    assert (status, asked(calls)) == (0, [("MMStar", "all", "exact_matching")])
    assert "JUDGE=gpt-4o-mini needs OPENAI_API_KEY, which is not set" in said
    assert asked(script("MMStar", JUDGE="gpt-4o-mini", OPENAI_API_KEY="sk-any")[2])[0][2] == "gpt-4o-mini"  # control
