"""`scripts/env.sh`: what it refuses, that a second run does nothing, and that it mends a half-made environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from training import REPOSITORY


def env_sh(repository: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(repository / "scripts/env.sh")],
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
