"""The real recipes through `llamafactory-cli train` on tiny checkpoints: what trains, resuming, several processes."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import write_json
from training import REPOSITORY, command, environment, losses, make_data, recipe, train, workers

pytestmark = pytest.mark.slow

GROUPS = {"visual.merger.": "projector", "visual.": "vision", "model.": "LLM", "lm_head.": "head"}
TRAINED = {"1": {"projector"}, "2.1": {"projector", "LLM", "head"}}
TRAINED["2.2"] = TRAINED["3"] = TRAINED["2.1"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "data")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed_groups(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys(), "the names of the disk are not kept"
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    return {next(group for prefix, group in GROUPS.items() if name.startswith(prefix)) for name in changed}


@pytest.mark.parametrize("stage", ["1", "2.1", "2.2", "3"])
@pytest.mark.parametrize("size", ["4B", "8B"])
def test_one_step_changes_exactly_the_groups_of_the_stage(size, stage, request, data, tmp_path):
    source = request.getfixturevalue("tied" if size == "4B" else "untied")
    overrides, variables = {}, {}
    if (size, stage) == ("4B", "1"):  # the recipes' own logger, without an account or a network
        overrides, variables = {"report_to": "wandb"}, {"WANDB_DIR": str(tmp_path)}
    if (size, stage) == ("8B", "3"):  # as the original's recipes say; then the code in the checkpoint is what trains
        overrides = {"trust_remote_code": "true"}
    run = train(
        recipe(size, stage), model=source.merged, output=tmp_path / "out", data=data, variables=variables, **overrides
    )
    expected = TRAINED[stage] - ({"head"} if size == "4B" else set())
    assert changed_groups(source.merged, tmp_path / "out") == expected
    assert "Trainable parameters of vision: 0 of " in run.stdout
    if "report_to" in overrides:
        assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_groups_under_the_template_names_stop_the_run_before_its_first_step(tied, data, tmp_path):
    """The control: LLaMA-Factory with the freeze groups where the original put them."""
    installed = Path(next(iter(importlib.util.find_spec("llamafactory").submodule_search_locations)))
    copy = tmp_path / "site/llamafactory"
    shutil.copytree(installed, copy, ignore=shutil.ignore_patterns("__pycache__"))
    groups = copy / "model/model_utils/visual.py"
    groups.write_text(groups.read_text().replace('model_type="qwen2_5_vl_merge"', 'model_type="qwen_merge_vl"'))
    path = {"PYTHONPATH": f"{copy.parent}:{REPOSITORY / 'src'}"}
    run = train(recipe("4B", "1"), model=tied.merged, output=tmp_path / "out", data=data, variables=path, check=False)
    assert run.returncode == 2, run.stdout[-3000:]
    assert "vision trains, and the recipe says the opposite" in run.stdout
    assert "LLM trains, and the recipe says the opposite" in run.stdout
    assert "Traceback" not in run.stdout
    assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_a_killed_stage_resumes_to_the_weights_of_the_uninterrupted_run(tied, data, tmp_path):
    arguments = {"model": tied.merged, "data": data, "max_steps": 60, "save_steps": 20, "seed": 7}
    train(recipe("4B", "2.1"), output=tmp_path / "whole", **arguments)

    output = tmp_path / "killed"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command(recipe("4B", "2.1"), output=output, **arguments),
            env=environment(data),
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while process.poll() is None and not (output / "checkpoint-20/trainer_state.json").exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    assert not (output / "model.safetensors").exists(), "the run had ended before the kill"
    steps_before = len(losses(output))

    resumed = train(recipe("4B", "2.1"), output=output, **arguments)
    assert "Continuing training from global step 20" in resumed.stdout
    whole, again = weights(tmp_path / "whole"), weights(output)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert losses(output)[-1] == losses(tmp_path / "whole")[-1]
    assert steps_before < 60
    at_the_kill = weights(output / "checkpoint-20")  # control: the steps after the kill matter
    assert any(not torch.equal(whole[name], at_the_kill[name]) for name in whole)


def distance(one: Path, other: Path, base: Path) -> float:
    """How far two runs are apart, in units of how far the first one went: ||one - other|| / ||one - base||."""
    a, b, c = (weights(folder) for folder in (one, other, base))
    apart = sum((a[name] - b[name]).square().sum() for name in a)
    gone = sum((a[name] - c[name]).square().sum() for name in a)
    return float((apart / gone).sqrt())


def zero2_without_bf16(folder: Path) -> Path:
    """The recipes' file for a CPU."""
    content = json.loads((REPOSITORY / "examples/deepspeed/ds_z2_config.json").read_text())
    content["bf16"] = {"enabled": False}
    write_json(folder / "z2.json", content)
    return folder / "z2.json"


def test_two_processes_train_to_the_weights_of_one(untied, data, tmp_path):
    """Same global batch of 4: one process with two micro-batches a step, DDP and ZeRO-2 with one on each of two."""
    # Plain SGD: Adam divides by the gradient's size and would turn rounding noise near zero into whole steps.
    arguments = {
        "model": untied.merged,
        "data": data,
        "max_steps": 6,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
    }
    two = {"processes": 2, "ddp_backend": "gloo"}
    stage = recipe("8B", "2.1")
    train(stage, output=tmp_path / "one", gradient_accumulation_steps=2, **arguments)
    train(stage, output=tmp_path / "ddp", **arguments, **two)
    train(stage, output=tmp_path / "z2", deepspeed=zero2_without_bf16(tmp_path), **{**arguments, **two})
    train(stage, output=tmp_path / "half", **arguments)  # control: half the batch
    base = untied.merged
    assert distance(tmp_path / "one", tmp_path / "ddp", base) < 1e-4
    assert distance(tmp_path / "one", tmp_path / "z2", base) < 1e-4
    assert distance(tmp_path / "one", tmp_path / "half", base) > 1e-2


def test_a_rank_that_dies_ends_the_run_and_the_run_goes_on_from_its_checkpoint(untied, data, tmp_path):
    stage, output = recipe("8B", "2.1"), tmp_path / "killed"
    arguments = {"model": untied.merged, "data": data, "max_steps": 60, "save_steps": 20, "ddp_backend": "gloo"}
    # DeepSpeed, as in the recipes: Trainer's own checkpoints of several CPU processes cannot be loaded ("cpu:0").
    arguments["deepspeed"] = zero2_without_bf16(tmp_path)
    train(stage, output=tmp_path / "whole", processes=2, **arguments)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command(stage, output=output, **arguments),
            env=environment(data, 2),
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while process.poll() is None and not (output / "checkpoint-20/trainer_state.json").exists():
            time.sleep(0.01)
        ranks = workers(output)
        assert len(ranks) == 2, (tmp_path / "log").read_text()[-3000:]
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(timeout=120) != 0  # the other rank does not wait for ever
    text = (tmp_path / "log").read_text()
    assert "Signal 9 (SIGKILL)" in text
    assert "(local_rank: 1)" in text
    assert not (output / "model.safetensors").exists(), "the run had ended before the kill"

    resumed = train(stage, output=output, processes=2, **arguments)
    assert "Continuing training from global step" in resumed.stdout
    assert distance(tmp_path / "whole", output, untied.merged) < 1e-4
    assert distance(tmp_path / "whole", output / "checkpoint-20", untied.merged) > 1e-2  # control: what the kill left


def test_zero3_on_several_cpu_processes_is_refused(tied, data, tmp_path):
    run = train(
        recipe("4B", "1"),
        model=tied.merged,
        output=tmp_path / "out",
        data=data,
        processes=2,
        check=False,
        deepspeed=REPOSITORY / "examples/deepspeed/ds_z3_config.json",
        ddp_backend="gloo",
    )
    assert run.returncode != 0
    assert "DeepSpeed ZeRO-3 with 2 CPU processes gives wrong weights without an error" in run.stdout
    assert not list(tmp_path.glob("out/**/*.safetensors"))
