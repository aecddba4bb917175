"""scripts/custom_vision.sh from where its user stands: whose files it takes, and what it refuses before any library.

    .venv/bin/python -m pytest tests/unit/test_custom_vision_script.py

What its steps do is in tests/integration/test_custom_vision.py.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkouts import copied_checkout
from own_sets import row, turns, write_sets
from worker_processes import until

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copied_checkout(tmp_path / "checkout")


@pytest.fixture
def place(tmp_path) -> Path:
    """Where the user stands."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def step(checkout: Path, place: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("DATASET", "SETS", "GRAFT")}
    return subprocess.run(
        [checkout / "scripts/custom_vision.sh", *arguments],
        env={**kept, "PYTHONPATH": str(checkout / "src"), "NPROC_PER_NODE": "1", **variables},
        cwd=place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_sets_and_grafts_are_the_caller_s(checkout, place):
    write_sets(place, {"mine": [row(0, "Who are you?")]}, data_path=None)
    done = step(checkout, place, "data", DATASET="mine", SETS="sets.yaml")
    assert done.returncode == 0, done.stderr
    assert list(json.loads((checkout / "data/dataset_info.json").read_text())) == ["mine"]
    assert [path.name for path in place.iterdir() if path.is_dir()] == []
    gone = step(checkout, place, "graft", GRAFT="none.yaml")
    assert gone.returncode == 2
    assert f"GRAFT={place}/none.yaml is not a file" in gone.stderr
    # The defaults are the repository's: here its example of sets, whose paths are to be filled in.
    own = step(checkout, place, "data", DATASET="my_dataset")
    assert own.returncode == 2
    assert "/path/to/your_annotations.json is no file" in own.stderr


def test_every_answer_becomes_a_row_s_last(checkout, place):
    """Which is the one that the recipes train."""
    several = {"conversations": turns("Who are you?", "I.", "Who?", "You know.", "Still?", "Yes.")}
    write_sets(place, {"mine": [several]}, data_path=None)
    for more, rows in (((), 3), (("--turns", "whole", "--overwrite"), 1)):
        done = step(checkout, place, "data", *more, DATASET="mine", SETS="sets.yaml")
        assert done.returncode == 0, done.stderr
        assert json.loads((checkout / "data/mine.manifest.json").read_text())["rows_out"] == rows
        assert ("2 answers will get no loss" in done.stderr) == (rows == 1)


def test_a_source_that_is_beside_the_graft_is_told_where_it_was_looked_for(checkout, place):
    """A `source` begins in the repository, as a hub id may have its shape."""
    text = "vision: {source: weights}\nprojector: {kind: linear}\nllm: {source: enc/llm}\noutput: mine-base\n"
    (place / "mine.yaml").write_text(text)
    for folder in ("weights", "enc/llm"):
        (place / folder).mkdir(parents=True)
    done = step(checkout, place, "graft", "--plan", GRAFT="mine.yaml", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    for folder in ("weights", "enc/llm"):
        assert f"there is no directory {checkout}/{folder}" in done.stderr
    for folder in ("weights", "enc/llm"):  # the control: they are found there
        (checkout / folder).mkdir(parents=True)
    again = step(checkout, place, "graft", "--plan", GRAFT="mine.yaml", HF_HUB_OFFLINE="1")
    assert again.returncode == 2
    assert "there is no directory" not in again.stderr
    assert "has no config.json" in again.stderr


@pytest.mark.parametrize("content", ["output: [", "vision: {source: x}\nllm: {source: y}\n"])
def test_a_broken_graft_ends_a_training_with_its_reason(checkout, place, content):
    (place / "mine.yaml").write_text(content)
    for name in ("one_stage", "stage1"):
        broken = step(checkout, place, name, GRAFT="mine.yaml")
        assert broken.returncode == 2
        reason = "cannot be read as YAML" if "[" in content else "output is missing; expected the path"
        assert reason in broken.stderr
        assert "Traceback" not in broken.stderr
        assert "train:" not in broken.stderr  # nothing was started


@pytest.mark.parametrize("name", ["one_stage", "stage2", "encoder"])
def test_an_export_before_its_step_says_which_step_is_missing(checkout, place, name):
    early = step(checkout, place, "export", name, "8b")
    assert early.returncode == 2
    folder = f"outputs/rad-dino-8b-{name.replace('_', '-')}"
    assert f"no adapter in {folder}. Run scripts/custom_vision.sh {name} 8b first" in early.stderr
    assert "Traceback" not in early.stderr
    # The control: with an adapter the same call gets as far as what is merged into.
    trained(checkout / folder, "gone")
    later = step(checkout, place, "export", name, "8b")
    assert later.returncode == 2
    assert "no adapter" not in later.stderr
    if name == "one_stage":
        assert "was trained from 'gone'" in later.stderr
    else:
        assert "merges into 'gone', which holds no model" in later.stderr


# What is started, and on what: LLaMA-Factory is one that writes down how it was called

LLAMAFACTORY = r"""#!/usr/bin/env bash
echo "$*" >> calls
[ "$1" = export ] || exit 0
[[ $* =~ --export_dir\ ([^ ]+) ]] || exit 3
mkdir -p "${BASH_REMATCH[1]}"
echo {} > "${BASH_REMATCH[1]}/config.json"
[ ! -e hold ] || { touch held; sleep 60; }
echo {} > "${BASH_REMATCH[1]}/model.safetensors"
"""


@pytest.fixture
def noted(checkout, place) -> Path:
    """Two grafts of the user's are made, and the default ones."""
    (checkout / ".venv").unlink()
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/qwen-merge").symlink_to(Path(sys.prefix) / "bin/qwen-merge")
    tool = checkout / ".venv/bin/llamafactory-cli"
    tool.write_text(LLAMAFACTORY)
    tool.chmod(0o755)
    default = (checkout / "examples/custom_vision/graft_4b.yaml").read_text()
    for name, output in (("siglip", "siglip-base"), ("own", "made/own")):
        (place / f"{name}.yaml").write_text(default.replace("rad-dino-4b-base", output))
    for name in ("rad-dino-4b-base", "rad-dino-8b-base", "siglip-base", "made/own"):
        model(checkout / name)
    return checkout


def model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()


def trained(folder: Path, base: str) -> None:
    """What LoRA leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    for name in ("adapter_model.safetensors", "train_results.json"):
        (folder / name).touch()


def calls(checkout: Path) -> list[str]:
    file = checkout / "calls"
    return file.read_text().splitlines() if file.exists() else []


def values(call: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in call.split() if "=" in part)


def paths(call: str) -> dict[str, str]:
    words = call.split()
    return {name: words[words.index(f"--{name}") + 1] for name in ("model_name_or_path", "adapter_name_or_path")}


@pytest.mark.parametrize(
    ("graft", "size", "base", "name"),
    [
        ({}, [], "rad-dino-4b-base", "rad-dino-4b"),
        ({}, ["8b"], "rad-dino-8b-base", "rad-dino-8b"),
        ({"GRAFT": "siglip.yaml"}, [], "siglip-base", "siglip"),
        ({"GRAFT": "own.yaml"}, [], "made/own", "own"),
    ],
)
def test_all_names_follow_the_graft(noted, place, graft, size, base, name):
    expected = {
        "one_stage": (base, f"outputs/{name}-one-stage"),
        "stage1": (base, f"outputs/{name}-stage1"),
        "stage2": (f"outputs/{name}-stage1", f"outputs/{name}-stage2"),
        "encoder": (f"outputs/{name}-one-stage-merged", f"outputs/{name}-encoder"),
    }
    for made in ("stage1", "one-stage-merged"):
        model(noted / f"outputs/{name}-{made}")
    for step_name, (source, output) in expected.items():
        done = step(noted, place, step_name, *size, **graft)
        assert done.returncode == 0, done.stderr
        wanted = {"model_name_or_path": source, "output_dir": output, "run_name": Path(output).name}
        assert values(calls(noted)[-1]) == wanted


def test_a_finished_run_of_another_graft_is_not_taken_for_one_s_own(noted, place):
    trained(noted / "outputs/rad-dino-4b-one-stage", "rad-dino-4b-base")
    assert step(noted, place, "one_stage", GRAFT="siglip.yaml").returncode == 0
    assert len(calls(noted)) == 1
    control = step(noted, place, "one_stage")
    assert "one_stage is finished" in control.stderr
    assert len(calls(noted)) == 1


def test_a_training_does_not_go_on_from_another_model(noted, place):
    for name in ("one-stage-merged", "stage2-merged"):
        model(noted / f"outputs/rad-dino-4b-{name}")
        (noted / f"outputs/rad-dino-4b-{name}/trainer_state.json").write_text(name)  # what tells them apart
    assert step(noted, place, "encoder").returncode == 0
    trained(noted / "outputs/rad-dino-4b-encoder/checkpoint-200", "outputs/rad-dino-4b-one-stage-merged")
    (noted / "outputs/rad-dino-4b-encoder/checkpoint-200/trainer_state.json").write_text("{\n}")
    (noted / "calls").unlink()
    other = "model_name_or_path=outputs/rad-dino-4b-stage2-merged"
    refused = step(noted, place, "encoder", other)
    assert refused.returncode == 2
    assert "was trained from" in refused.stderr
    assert "outputs/rad-dino-4b-one-stage-merged, and this is outputs/rad-dino-4b-stage2-merged" in refused.stderr
    assert calls(noted) == []
    assert step(noted, place, "encoder", other, "output_dir=outputs/again").returncode == 0  # the controls
    assert step(noted, place, "encoder").returncode == 0
    assert len(calls(noted)) == 2


def test_an_export_merges_into_what_was_trained_from(noted, place):
    """After two stages the encoder's base is another one than its recipe's, which is there, too."""
    for name in ("one-stage-merged", "stage2-merged"):
        model(noted / f"outputs/rad-dino-4b-{name}")
    trained(noted / "outputs/rad-dino-4b-encoder", "outputs/rad-dino-4b-stage2-merged")
    done = step(noted, place, "export", "encoder")
    assert done.returncode == 0, done.stderr
    assert paths(calls(noted)[-1])["model_name_or_path"] == "outputs/rad-dino-4b-stage2-merged"
    assert (noted / "outputs/rad-dino-4b-encoder-merged/model.safetensors").is_file()
    # The control: trained from the recipe's, merged into that.
    trained(noted / "outputs/rad-dino-4b-encoder/checkpoint-9", "outputs/rad-dino-4b-one-stage-merged")
    other = ("--adapter_name_or_path=outputs/rad-dino-4b-encoder/checkpoint-9", "--export_dir", "outputs/nine")
    assert step(noted, place, "export", "encoder", *other).returncode == 0
    assert paths(calls(noted)[-1])["model_name_or_path"] == "outputs/rad-dino-4b-one-stage-merged"
    assert (noted / "outputs/nine/model.safetensors").is_file()


def test_an_export_into_another_model_is_refused(noted, place):
    trained(noted / "outputs/siglip-one-stage", "siglip-base")
    forgotten = step(noted, place, "export", "one_stage")  # of GRAFT
    assert "no adapter in outputs/rad-dino-4b-one-stage" in forgotten.stderr
    trained(noted / "outputs/rad-dino-4b-one-stage", "siglip-base")
    wrong = step(noted, place, "export", "one_stage")
    assert wrong.returncode == 2
    assert "was trained from 'siglip-base', and examples/custom_vision/graft_4b.yaml makes 'rad-dino-4b" in wrong.stderr
    forced = step(noted, place, "export", "one_stage", "--model_name_or_path", "rad-dino-4b-base")
    assert forced.returncode == 2
    assert "was trained from 'siglip-base', which is there" in forced.stderr
    assert calls(noted) == []
    # The controls: the graft it was trained with; a base that has moved and is named.
    assert step(noted, place, "export", "one_stage", GRAFT="siglip.yaml").returncode == 0
    assert paths(calls(noted)[-1]) == {
        "model_name_or_path": "siglip-base",
        "adapter_name_or_path": "outputs/siglip-one-stage",
    }
    (noted / "siglip-base").rename(noted / "moved")
    moved = ("--model_name_or_path=moved", "--export_dir", "outputs/again")
    assert step(noted, place, "export", "one_stage", *moved, GRAFT="siglip.yaml").returncode == 0
    assert paths(calls(noted)[-1])["model_name_or_path"] == "moved"


def test_an_export_that_was_stopped_leaves_nothing_under_its_name(noted, place):
    trained(noted / "outputs/rad-dino-4b-one-stage", "rad-dino-4b-base")
    (noted / "hold").touch()
    command = [noted / "scripts/custom_vision.sh", "export", "one_stage"]
    stopped = subprocess.Popen(command, cwd=place, start_new_session=True, stderr=subprocess.DEVNULL)
    until((noted / "held").exists, 60, "the export was under way", stopped)
    os.killpg(stopped.pid, signal.SIGKILL)
    stopped.wait()
    merged = noted / "outputs/rad-dino-4b-one-stage-merged"
    (half,) = noted.glob("outputs/*merged.unfinished-*")  # the control: something was being written
    assert [path.name for path in half.iterdir()] == ["config.json"]
    assert not merged.exists()
    (noted / "hold").unlink()
    assert step(noted, place, "export", "one_stage").returncode == 0
    assert sorted(path.name for path in merged.iterdir()) == ["config.json", "model.safetensors"]
    again = step(noted, place, "export", "one_stage")
    assert again.returncode == 2
    assert "outputs/rad-dino-4b-one-stage-merged exists already" in again.stderr
    assert len(calls(noted)) == 2
