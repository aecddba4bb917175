"""scripts/custom_vision.sh from where its user stands: whose files it takes, and what it refuses before any library.

    .venv/bin/python -m pytest tests/unit/test_custom_vision_script.py

What its steps do is in tests/integration/test_custom_vision.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from own_sets import row, write_sets

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The repository's shape with this environment in it."""
    folder = tmp_path / "checkout"
    for name in ("examples", "scripts"):
        shutil.copytree(REPOSITORY / name, folder / name)
    (folder / "src").symlink_to(REPOSITORY / "src")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture
def place(tmp_path) -> Path:
    """Where the user stands."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def step(checkout: Path, place: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("DATASET", "SETS", "GRAFT")}
    return subprocess.run(
        [checkout / "scripts/custom_vision.sh", *arguments],
        env={**kept, "PYTHONPATH": str(checkout / "src"), **variables},
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
    (checkout / folder).mkdir(parents=True)
    (checkout / folder / "adapter_config.json").write_text("{}")
    later = step(checkout, place, "export", name, "8b")
    assert later.returncode == 2
    assert "no adapter" not in later.stderr
    assert "holds no model" in later.stderr
