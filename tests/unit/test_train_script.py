"""scripts/train.sh: what it refuses, what it starts, and what it does with a run that was killed.

    .venv/bin/python -m pytest tests/unit/test_train_script.py

The script runs in a copy of the checkout's shape whose `llamafactory-cli` writes down how it was called.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "examples/train_qwen_merge/train_qwen_merge_vl_{}_stage{}.yaml"

# Notes its arguments and the environment it sees; leaves a finished run where the recipe says, or fails on demand.
STAND_IN = """#!/usr/bin/env bash
{
  echo "$@"
  echo "PATH=$PATH PYTHONPATH=$PYTHONPATH FORCE_TORCHRUN=$FORCE_TORCHRUN NPROC_PER_NODE=${NPROC_PER_NODE:-}" \\
    "NNODES=${NNODES:-} NODE_RANK=${NODE_RANK:-} MASTER_ADDR=${MASTER_ADDR:-} MASTER_PORT=${MASTER_PORT:-}"
} >> calls
[[ $2 == *"${FAIL_AT:-nothing}"* ]] && exit 7
out=$(sed -n 's/^output_dir: //p' "$2")
mkdir -p "$out" && touch "$out"/{config.json,model.safetensors.index.json,train_results.json}
"""


@pytest.fixture
def checkout(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "scripts").mkdir()
    for name in ("train.sh", "launching.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    tool = tmp_path / ".venv/bin/llamafactory-cli"
    tool.parent.mkdir(parents=True)
    tool.write_text(STAND_IN)
    tool.chmod(0o755)
    return tmp_path


def train(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key in {"PATH", "HOME", "LANG"}}
    return subprocess.run(
        [checkout / "scripts/train.sh", *arguments],
        env=kept | {"NPROC_PER_NODE": "8"} | environment,
        cwd="/",  # it finds its own checkout
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def model(folder: Path, *more: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", *more):
        (folder / name).touch()
    return folder


def calls(checkout: Path) -> list[str]:
    """Every other line: the arguments of each start."""
    notes = checkout / "calls"
    return notes.read_text().splitlines()[::2] if notes.exists() else []


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "usage: scripts/train.sh <4B|8B> <1|2.1|2.2|3|all> [key=value ...]"),
        (("4B",), {}, "usage: scripts/train.sh"),
        (("5B", "1"), {}, "the size is '5B', not 4B or 8B."),
        (("4B", "2"), {}, "the stage is '2', not 1, 2.1, 2.2, 3 or all."),
        (("4B", "1", "--learning_rate"), {}, "'--learning_rate' is not key=value."),
        (("4B", "1", "run_name=my run"), {}, "'run_name=my run' has a blank in it"),
        (("4B", "all", "output_dir=x"), {}, "'output_dir' differs from stage to stage"),
        (("4B", "1"), {"REPORT_TO": "mlfow"}, "REPORT_TO=mlfow is not wandb, tensorboard or none."),
        (("4B", "1"), {"NNODES": "2", "NODE_RANK": "1"}, "NNODES=2 also needs MASTER_ADDR MASTER_PORT"),
        (("4B", "1"), {}, "'Qwen-Merge-VL-4B-base', which holds no model. Make it with: python3 src/model_merge/"),
        (("8B", "1"), {}, "--llm-path Qwen/Qwen3-8B --output-path Qwen-Merge-VL-8B-base"),
        (("4B", "all"), {}, "stage 1 starts from 'Qwen-Merge-VL-4B-base'"),
        (
            ("4B", "2.1"),
            {},
            "'outputs/Qwen-Merge-VL-4B-stage1', which holds no model. Make it with: scripts/train.sh 4B 1",
        ),
        (("8B", "2.2"), {}, "Make it with: scripts/train.sh 8B 2.1"),
        (("4B", "3"), {}, "Make it with: scripts/train.sh 4B 2.2"),
        (("4B", "3", "model_name_or_path=other"), {}, "stage 3 starts from 'other', which holds no model."),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(checkout, arguments, environment, message):
    done = train(checkout, *arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert calls(checkout) == []


def test_without_an_environment(checkout):
    (checkout / ".venv/bin/llamafactory-cli").unlink()
    done = train(checkout, "4B", "1")
    assert done.returncode == 2
    assert "run scripts/env.sh first" in done.stderr


def test_a_model_cut_short_is_no_model(checkout):
    folder = model(checkout / "Qwen-Merge-VL-4B-base")
    (folder / "model.safetensors").unlink()
    assert train(checkout, "4B", "1").returncode == 2
    (folder / "model.safetensors.index.json").touch()
    assert train(checkout, "4B", "1").returncode == 0


def test_one_stage_starts_llamafactory_with_the_recipe_and_the_overrides(checkout):
    model(checkout / "Qwen-Merge-VL-8B-base")
    done = train(
        checkout, "8B", "1", "learning_rate=1.0e-5", "save_steps=50",
        REPORT_TO="none", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500", PYTHONPATH="/more",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments, environment = (checkout / "calls").read_text().splitlines()
    assert arguments == f"train {RECIPE.format('8B', '1')} report_to=none learning_rate=1.0e-5 save_steps=50"
    assert environment.startswith(f"PATH={checkout}/.venv/bin:")
    assert environment.endswith(
        f" PYTHONPATH={checkout}/src:/more FORCE_TORCHRUN=1 NPROC_PER_NODE=8"
        " NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500"
    )


def test_its_exit_code_is_the_trainers(checkout):
    model(checkout / "Qwen-Merge-VL-4B-base")
    assert train(checkout, "4B", "1", FAIL_AT="stage1").returncode == 7


def test_all_runs_in_order_stops_at_a_failure_and_goes_on_there(checkout):
    model(checkout / "Qwen-Merge-VL-4B-base")
    assert train(checkout, "4B", "all", FAIL_AT="stage2.2").returncode == 7
    assert calls(checkout) == [f"train {RECIPE.format('4B', stage)}" for stage in ("1", "2.1", "2.2")]

    (checkout / "calls").unlink()
    done = train(checkout, "4B", "all")
    assert done.returncode == 0
    assert calls(checkout) == [f"train {RECIPE.format('4B', stage)}" for stage in ("2.2", "3")]
    assert "stage 1 is finished: outputs/Qwen-Merge-VL-4B-stage1" in done.stderr


def test_a_finished_stage_trains_again_only_elsewhere(checkout):
    model(checkout / "Qwen-Merge-VL-4B-base")
    model(checkout / "outputs/Qwen-Merge-VL-4B-stage1", "train_results.json")
    assert train(checkout, "4B", "1").returncode == 0
    assert calls(checkout) == []
    assert train(checkout, "4B", "1", "output_dir=outputs/again").returncode == 0
    assert calls(checkout) == [f"train {RECIPE.format('4B', '1')} output_dir=outputs/again"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_checkpoint_cut_short_is_moved_aside_and_kept(checkout, rank):
    """By one node only: on the others the folder would be gone already."""
    model(checkout / "Qwen-Merge-VL-4B-base")
    run = checkout / "outputs/Qwen-Merge-VL-4B-stage1"
    for step in (200, 800, 1000, 1200):
        model(run / f"checkpoint-{step}")
    (run / "checkpoint-800/trainer_state.json").write_text("{\n}\n")  # as json.dumps with an indent
    done = train(checkout, "4B", "1", NODE_RANK=rank)
    assert done.returncode == 0, done.stderr
    left = sorted(path.name for path in run.glob("*checkpoint-*"))
    if rank == "0":
        assert left[:2] == ["checkpoint-200", "checkpoint-800"]
        assert [name.split(".")[0] for name in left[2:]] == ["incomplete-checkpoint-1000", "incomplete-checkpoint-1200"]
        assert (run / left[2] / "model.safetensors").exists()
        assert "checkpoint-1000 was cut short" in done.stderr
    else:
        assert left == ["checkpoint-1000", "checkpoint-1200", "checkpoint-200", "checkpoint-800"]


@pytest.mark.parametrize("stage", ["1", "all"])
def test_a_signal_reaches_the_trainer_and_its_output_is_locked_meanwhile(checkout, stage):
    """What a scheduler does to the script alone must not leave a trainer that goes on writing."""
    model(checkout / "Qwen-Merge-VL-4B-base")
    (checkout / ".venv/bin/llamafactory-cli").write_text("#!/bin/sh\nsleep 300 &\necho $! > child\nwait\n")
    process = subprocess.Popen(
        [checkout / "scripts/train.sh", "4B", stage],
        env={**os.environ, "NPROC_PER_NODE": "1"},
        stderr=subprocess.DEVNULL,
    )
    child = checkout / "child"
    deadline = time.monotonic() + 20
    while not (child.exists() and child.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    second = train(checkout, "4B", "1")
    process.terminate()
    assert process.wait(timeout=20) != 0
    assert second.returncode == 2
    assert "another training writes to outputs/Qwen-Merge-VL-4B-stage1" in second.stderr
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child.read_text().strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    status = Path(f"/proc/{child.read_text().strip()}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text(), "the trainer's own child lived on"


GRAFT = "examples/graft/graft_lora.yaml"


def test_any_recipe_is_trained(checkout):
    model(checkout / "my-vlm-base")
    assert train(checkout, GRAFT, "save_steps=7").returncode == 0
    assert calls(checkout) == [f"train {GRAFT} save_steps=7"]
    adapter = checkout / "outputs/my-vlm-lora"
    for name in ("config.json", "model.safetensors.index.json"):  # a run by LoRA leaves an adapter
        (adapter / name).unlink()
    assert train(checkout, GRAFT).returncode == 0
    assert len(calls(checkout)) == 2
    for name in ("config.json", "model.safetensors.index.json"):
        (adapter / name).unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).touch()
    done = train(checkout, GRAFT)
    assert done.returncode == 0
    assert "graft_lora is finished: outputs/my-vlm-lora" in done.stderr
    assert len(calls(checkout)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("examples/none.yaml",), "there is no recipe 'examples/none.yaml'"),
        (
            ("examples/graft/graft_full.yaml",),
            "graft_full starts from 'outputs/my-vlm-projector', which holds no model",
        ),
        ((GRAFT,), "graft_lora starts from 'my-vlm-base', which holds no model"),
        ((GRAFT, "model_name_or_path=/nowhere"), "graft_lora starts from '/nowhere', which holds no model"),
    ],
)
def test_a_recipe_that_cannot_start(checkout, arguments, message):
    done = train(checkout, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert calls(checkout) == []


def test_without_a_gpu_what_a_cpu_needs_is_said_before_it_starts(checkout):
    model(checkout / "Qwen-Merge-VL-4B-base")
    done = train(checkout, "4B", "1", NPROC_PER_NODE="", PATH="/usr/bin:/bin")
    assert done.returncode == 2
    assert "A CPU needs use_cpu=true bf16=false deepspeed=null" in done.stderr
    assert calls(checkout) == []
    assert train(checkout, "4B", "1", "use_cpu=true", NPROC_PER_NODE="", PATH="/usr/bin:/bin").returncode == 0
    own = checkout / "own.yaml"  # a recipe that says so itself
    own.write_text((checkout / RECIPE.format("4B", "1")).read_text().replace("stage1", "own") + "use_cpu: true\n")
    assert train(checkout, "own.yaml", NPROC_PER_NODE="", PATH="/usr/bin:/bin").returncode == 0
