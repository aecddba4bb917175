"""scripts/simple_vl.sh and how trainers are launched: the command, the checkpoint it begins with, what is refused.

    .venv/bin/python -m pytest tests/unit/test_simple_vl_launch.py

The script runs in a copy of the checkout whose `swift` writes down how it was called, and whose GPUs are a `nvidia-smi`
that lists eight. What ms-swift does with such a command is in tests/integration/test_simple_vl.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkouts import copied_checkout

REPOSITORY = Path(__file__).resolve().parents[2]
NOTES = """#!/usr/bin/env bash
printf "%s\\n" "$@" > "$CALLS"
echo "${NPROC_PER_NODE:-}" > "$CALLS.gpus"
"""
# In the place of rows.py, which needs ms-swift.
ROWS = 'import sys\nprint("reads", *sys.argv[1:], file=sys.stderr)\nprint(sys.argv[1] + "/checked")\nsys.exit({})\n'
OURS = ("OUTPUT", "MODEL", "DATASET", "GRAFT", "CHECK", "CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE", "INFER_BACKEND")


def tool(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = copied_checkout(tmp_path / "checkout")
    tool(folder / ".venv-current/bin/swift", NOTES)
    tool(folder / ".venv-current/bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
    (folder / "examples/simple_vl/rows.py").write_text(ROWS.format(0))
    for name in ("rows", "one", "two"):
        (folder / f"{name}.jsonl").touch()
    model(folder / "Simple-VL-8B-base")
    model(folder / "Simple-VL-8B-stock-base", architecture="Qwen2_5_VLForConditionalGeneration")
    return folder


def environment(checkout: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "CALLS": str(checkout / "calls"), "DATASET": "rows.jsonl", **variables}


def launch(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "scripts/simple_vl.sh", *arguments],
        cwd=checkout,
        env=environment(checkout, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def called(checkout: Path) -> dict[str, str] | None:
    """The options that swift was started with, the last value of each; None if it was not started."""
    notes = checkout / "calls"
    if not notes.exists():
        return None
    words = notes.read_text().splitlines()
    notes.unlink()
    return {word: after for word, after in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def started(checkout: Path, *arguments: str, **variables: str) -> dict[str, str]:
    done = launch(checkout, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    found = called(checkout)
    assert found is not None, done.stderr
    return found


def refused(checkout: Path, *arguments: str, **variables: str) -> str:
    done = launch(checkout, *arguments, **variables)
    assert done.returncode == 2, done.stderr
    assert called(checkout) is None
    return done.stderr


def model(folder: Path, architecture: str = "QwenMergeGraftForConditionalGeneration") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "model.safetensors").touch()
    return folder


def checkpoint(stage: Path, step: int, end: int = 30) -> Path:
    """A whole one, as the trainer leaves it."""
    folder = model(stage / f"checkpoint-{step}")
    state = {"global_step": step, "max_steps": end, "log_history": [{"step": step}]}
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))
    return folder


def half(stage: Path, step: int) -> Path:
    """One cut short: config.json is written before the weights."""
    folder = model(stage / f"checkpoint-{step}")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def output(checkout) -> Path:
    return checkout / "outputs/simple_vl/Simple-VL-8B"


def test_outputs_are_the_graft_s(checkout):
    """By what it makes, not by the file's name: one graft's stage 2 does not begin with another's stage 1."""
    place = "outputs/simple_vl"
    assert started(checkout, "stage1")["--output_dir"] == f"{place}/Simple-VL-8B/stage1"
    stock = "examples/simple_vl/graft_stock.yaml"
    assert started(checkout, "stage1", GRAFT=stock)["--output_dir"] == f"{place}/Simple-VL-8B-stock/stage1"
    own = checkout / "exp2/graft.yaml"
    own.parent.mkdir()
    own.write_text((checkout / "examples/simple_vl/graft.yaml").read_text().replace("Simple-VL-8B-base", "mine"))
    checkpoint(checkout / place / "Simple-VL-8B/stage1", 30)
    assert f"there is no whole checkpoint in {place}/mine/stage1" in refused(checkout, "stage2", GRAFT=str(own))
    assert started(checkout, "stage2")["--model"] == f"{place}/Simple-VL-8B/stage1/checkpoint-30"


def test_what_began_with_another_model_is_not_gone_on_with(checkout, output):
    assert started(checkout, "stage1", MODEL="Simple-VL-8B-stock-base")["--model"] == "Simple-VL-8B-stock-base"
    checkpoint(output / "stage1", 30)
    said = refused(checkout, "stage1")
    assert f"was trained from {checkout}/Simple-VL-8B-stock-base, and this is Simple-VL-8B-base: another" in said
    assert "Simple-VL-8B-stock-base" in refused(checkout, "stage2")
    assert launch(checkout, "stage1", MODEL="Simple-VL-8B-stock-base").returncode == 0  # the control: finished
    shutil.move(checkout / "Simple-VL-8B-stock-base", checkout / "moved")
    assert launch(checkout, "stage1", MODEL="moved").returncode == 0
    (checkout / "moved/merge_manifest.json").write_text("another vision encoder")  # made again in its place
    assert "or one that was made again" in refused(checkout, "stage1", MODEL="moved")


def test_other_rows_and_torn_checkpoints_are_noticed(checkout, output):
    assert started(checkout, "stage1", DATASET="one.jsonl\ntwo.jsonl")["--output_dir"].endswith("stage1")
    checkpoint(output / "stage1", 10)
    torn = checkpoint(output / "stage1", 20) / "trainer_state.json"
    torn.write_text(torn.read_text()[:-9])
    done = launch(checkout, "stage1", DATASET="two.jsonl")
    assert "was trained on 'one.jsonl two.jsonl', and goes on with 'two.jsonl'" in done.stderr
    assert "checkpoint-20 was cut short" in done.stderr
    assert called(checkout)["--resume_from_checkpoint"].endswith("checkpoint-10")


def test_options_with_dashes_are_options(checkout):
    assert started(checkout, "stage1", "--output-dir", "mine")["--output_dir"] == "mine"
    checkpoint(checkout / "mine", 10)
    assert started(checkout, "stage1", "--output-dir=mine")["--resume_from_checkpoint"] == "mine/checkpoint-10"
    assert "DATASET: there is no mine/rowz.jsonl" in refused(
        checkout, "stage1", DATASET="rows.jsonl mine/rowz.jsonl#10"
    )
    assert "--config hides options" in refused(checkout, "stage1", "--config", "x.yaml")


def test_a_stage_goes_on_from_its_newest_whole_checkpoint(checkout, output):
    assert "--resume_from_checkpoint" not in started(checkout, "stage1")
    stage1 = output / "stage1"
    checkpoint(stage1, 9)
    checkpoint(stage1, 10)
    half(stage1, 20)
    options = started(checkout, "stage1", "--learning_rate", "1e-5")
    assert options["--resume_from_checkpoint"] == "outputs/simple_vl/Simple-VL-8B/stage1/checkpoint-10"
    assert options["--model"] == "Simple-VL-8B-base"
    assert options["--learning_rate"] == "1e-5"
    names = sorted(path.name.split(".")[0] for path in stage1.glob("*checkpoint-*"))
    assert names == ["checkpoint-10", "checkpoint-9", "incomplete-checkpoint-20"]
    assert started(checkout, "stage1", "--resume_from_checkpoint", "mine")["--resume_from_checkpoint"] == "mine"
    assert "--resume_from_checkpoint" not in started(checkout, "stage1", "--output_dir", "elsewhere")


def test_a_stock_checkpoint_is_the_model_that_goes_on(checkout):
    """Transformers would leave the stage's first weights in it; test_simple_vl.py shows it."""
    stock = {"GRAFT": "examples/simple_vl/graft_stock.yaml"}
    assert started(checkout, "stage1", **stock)["--model"] == "Simple-VL-8B-stock-base"
    checkpoint(checkout / "outputs/simple_vl/Simple-VL-8B-stock/stage1", 10)
    options = started(checkout, "stage1", **stock)
    assert options["--model"] == options["--resume_from_checkpoint"] != "Simple-VL-8B-stock-base"


def test_a_finished_stage_is_left_alone(checkout, output):
    checkpoint(output / "stage1", 20)
    assert "--resume_from_checkpoint" in started(checkout, "stage1")
    checkpoint(output / "stage1", 30)
    done = launch(checkout, "stage1")
    assert done.returncode == 0
    assert called(checkout) is None
    assert "stage1 is finished: outputs/simple_vl/Simple-VL-8B/stage1/checkpoint-30" in done.stderr


def test_stage_2_begins_with_a_finished_stage_1(checkout, output):
    assert "there is no whole checkpoint in" in refused(checkout, "stage2")
    half(output / "stage1", 40)
    assert "there is no whole checkpoint in" in refused(checkout, "stage2")
    begun = checkpoint(output / "stage1", 20)
    assert "is step 20 of 30. Launch stage1 again" in refused(checkout, "stage2")
    assert started(checkout, "stage2", MODEL=str(begun))["--model"] == str(begun)  # the control: asked for
    shutil.rmtree(output / "stage2")
    checkpoint(output / "stage1", 30)
    assert started(checkout, "stage2")["--model"].endswith("stage1/checkpoint-30")


@pytest.mark.parametrize("step", ["infer", "deploy"])
def test_the_checkpoint_that_answers_is_named(checkout, output, step):
    said = refused(checkout, step)
    assert (
        f"no whole checkpoint in {output.relative_to(checkout)}/stage2 or {output.relative_to(checkout)}/stage1" in said
    )
    checkpoint(output / "stage1", 30)
    checkpoint(output / "stage2", 10)
    half(output / "stage2", 20)
    model(output / "stage2/checkpoint-25")  # weights, and no trainer_state.json, which is written last
    done = launch(checkout, step)
    assert called(checkout)["--model"].endswith("stage2/checkpoint-10")
    assert "stage2/checkpoint-10 (step 10 of 30)" in done.stderr
    adapter = output / "stage2/checkpoint-10"
    for name in ("config.json", "model.safetensors"):
        (adapter / name).unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).touch()
    assert "holds an adapter alone. Merge it" in refused(checkout, step)
    assert "there is no checkpoint in none" in refused(checkout, step, MODEL="none")


def gpus(checkout: Path, number: int = 8) -> None:
    lines = "".join(f"echo 'GPU {each}: NVIDIA'\n" for each in range(number))
    tool(checkout / ".venv-current/bin/nvidia-smi", f"#!/bin/sh\n{lines}")


@pytest.mark.parametrize(
    ("visible", "processes"),
    [(None, "8"), ("0,1", "2"), ("5", "1"), ("3,-1,4", "1"), ("", ""), ("-1", ""), (",".join("012345678"), "8")],
)
def test_gpus_that_are_not_visible_do_not_count(checkout, visible, processes):
    gpus(checkout)
    options = started(checkout, "stage1", **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert (checkout / "calls.gpus").read_text().strip() == processes
    assert ("--deepspeed" in options) == bool(processes)
    started(checkout, "stage1", CUDA_VISIBLE_DEVICES="0", NPROC_PER_NODE="3")
    assert (checkout / "calls.gpus").read_text().strip() == "3"


def test_vllm_serves_where_it_can_use_the_gpu(checkout, output):
    checkpoint(output / "stage2", 30)

    def backend(version: str | None, **variables: str) -> tuple[str, bool]:
        """(who answers, whether it is said that no vLLM uses the GPU)."""
        shutil.rmtree(checkout / "packages", ignore_errors=True)
        metadata = checkout / "packages/vllm-1.dist-info/METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        done = launch(checkout, "deploy", PYTHONPATH=str(checkout / "packages"), **variables)
        return called(checkout)["--infer_backend"], "no vLLM here that uses the GPU" in done.stderr

    assert backend("0.12.0") == ("pt", False)  # no GPU
    gpus(checkout, 1)
    assert backend("0.12.0") == ("vllm", False)
    assert backend("0.12.0.post2+cpu") == ("pt", True)
    assert backend("0.12.0", CUDA_VISIBLE_DEVICES="") == ("pt", False)
    assert backend("0.12.0.post2+cpu", INFER_BACKEND="vllm") == ("vllm", False)
    assert backend("0.12.0", INFER_BACKEND="pt") == ("pt", False)


def test_a_stage_trains_on_the_rows_that_were_read(checkout, output):
    rows = output.relative_to(checkout) / "rows/checked"
    (checkout / rows / "val").mkdir(parents=True)
    options = started(checkout, "stage1", "--split_dataset_ratio", "0.1", "--dataset", "a", "b", "--max_length", "99")
    assert options["--cached_dataset"] == f"{rows}/train"
    assert options["--cached_val_dataset"] == f"{rows}/val"
    assert options["--strict"] == "true"
    assert options["--max_length"] == "99"
    assert not {"--dataset", "--split_dataset_ratio"} & set(options)
    checked = launch(checkout, "check", "--dataset", "a")
    assert checked.returncode == 0
    assert called(checkout) is None
    assert "rows stop --model Simple-VL-8B-base" in checked.stderr
    assert "--dataset rows.jsonl --max_length 8192 --dataset_num_proc 8 --dataset a" in checked.stderr
    unread = started(checkout, "stage1", CHECK="no")
    assert unread["--dataset"] == "rows.jsonl"
    assert not {"--cached_dataset", "--strict"} & set(unread)
    (checkout / "examples/simple_vl/rows.py").write_text(ROWS.format(2))
    assert " drop --model" in refused(checkout, "stage1", CHECK="drop")
    assert "CHECK=maybe is not stop, drop or no." in refused(checkout, "stage1", CHECK="maybe")


@pytest.mark.parametrize("script", ["simple_vl", "train", "custom_vision"])
def test_help_is_the_whole_header(script):
    """The range of lines that is printed is written in the script."""
    file = REPOSITORY / f"scripts/{script}.sh"
    lines = file.read_text().splitlines()[1:]
    header = [line[2:] for line in lines[: lines.index("set -euo pipefail")]]
    done = subprocess.run(["bash", file, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == header


def lives(process: str) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "Z (zombie)" not in status.read_text()


def wait_until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    ("command", "starts"),
    [
        (("simple_vl.sh", "stage1"), "swift"),
        (("simple_vl.sh", "deploy"), "swift"),
        (("custom_vision.sh", "baseline"), "llamafactory-cli"),
    ],
)
def test_a_signal_reaches_what_was_started(checkout, output, command, starts):
    """Both launchers wait for a torchrun of their own, and leave it behind when they end alone."""
    checkpoint(output / "stage2", 30)
    child = checkout / "child"
    tool(
        checkout / f".venv-current/bin/{starts}",
        f"#!/bin/sh\nsleep 300 &\necho $! > {child}.new\nmv {child}.new {child}\nwait\n",
    )
    whole = ["bash", f"scripts/{command[0]}", *command[1:]]
    settings = {"cwd": checkout, "env": environment(checkout, CHECK="no"), "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(whole, **settings, stderr=subprocess.DEVNULL)
    try:
        assert wait_until(child.exists)
        running = child.read_text().strip()
        assert lives(running)
        if command[1] != "deploy":  # whose second start the port refuses
            second = subprocess.run(whole, **settings, capture_output=True, text=True, check=False, timeout=60)
            assert second.returncode == 2
            assert "another training writes to" in second.stderr
    finally:
        process.terminate()
        assert process.wait(timeout=20) != 0
    assert wait_until(lambda: not lives(running), 5), "the trainer's own child lived on"
