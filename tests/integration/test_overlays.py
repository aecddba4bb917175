"""The real overlays on copies of the real upstreams: apply, verify by effect, revert to the exact bytes.

A source checkout of LLaMA-Factory's commit 83688b0 is tested too where one is at hand:
QWEN_MERGE_LLAMAFACTORY_CHECKOUT=DIR pytest tests/integration/test_overlays.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_merge.overlays import engine, manifest
from qwen_merge.overlays.vllm import effects as vllm_effects

pytestmark = pytest.mark.slow


def run(*arguments, root: Path | None) -> subprocess.CompletedProcess:
    where = [] if root is None else ["--root", str(root)]
    return subprocess.run(
        [sys.executable, "-m", "qwen_merge.cli", "overlay", *arguments, *where],
        capture_output=True,
        text=True,
        check=False,
    )


def python_files(package: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(package)): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


PATCHED = [upstream for upstream in manifest.UPSTREAMS if upstream != "vllm"]  # vLLM has a plug-in, and no patch


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> dict[str, Path]:
    """The patched upstreams, copied out of this environment and reverted: what the package index ships.

    Each has a folder of its own, so that LLaMA-Factory's copy is checked beside a transformers that has its overlay.
    """
    roots = {}
    for upstream in PATCHED:
        roots[upstream] = tmp_path_factory.mktemp(upstream)
        source = manifest.find_package(upstream, None)
        copy = roots[upstream] / source.name
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        engine.revert(manifest.load(upstream), copy)
    return roots


@pytest.mark.parametrize("upstream", PATCHED)
def test_apply_verify_revert(copies, upstream):
    root = copies[upstream]
    package = manifest.find_package(upstream, root)
    original = python_files(package)
    unpatched = run("verify", upstream, root=root)  # control: nothing is applied
    assert unpatched.returncode == 1
    assert "FAIL" in unpatched.stdout
    assert run("apply", upstream, root=root).returncode == 0
    applied = python_files(package)
    assert "already applied" in run("apply", upstream, root=root).stdout
    assert python_files(package) == applied
    verified = run("verify", upstream, root=root)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "FAIL" not in verified.stdout
    assert run("revert", upstream, root=root).returncode == 0
    assert python_files(package) == original


def test_vllm_is_asked_for_its_plug_in(monkeypatch):
    applied = run("apply", "vllm", root=None)
    assert "nothing to apply" in applied.stdout
    verified = run("verify", "vllm", root=None)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verified.stdout.count("  ok ") == len(vllm_effects.CHECKS)
    assert "FAIL" not in verified.stdout
    monkeypatch.setenv("VLLM_PLUGINS", "another")  # control: vLLM is told to load other plug-ins only
    unheard = run("verify", "vllm", root=None)
    assert unheard.returncode == 1
    assert "FAIL  the plug in is found and loads twice" in unheard.stdout


def test_freeze_groups_under_the_template_names_are_found_out(copies):
    """The control of the freeze proof: the groups registered as the original does, under names nobody looks up."""
    root = copies["llamafactory"]
    package = root / "llamafactory"
    engine.apply(manifest.load("llamafactory"), package)
    groups = package / "model/model_utils/visual.py"
    text = groups.read_text()
    assert text.count('model_type="qwen2_5_vl_merge"') == 1
    groups.write_text(text.replace('model_type="qwen2_5_vl_merge"', 'model_type="qwen_merge_vl"'))
    try:
        verified = run("verify", "llamafactory", root=root)
    finally:
        groups.write_text(text)
        engine.revert(manifest.load("llamafactory"), package)
    assert verified.returncode == 1
    assert "FAIL  freeze groups hold under the model type" in verified.stdout
    assert "FAIL  model/model_utils/visual.py is changed" in verified.stdout


def test_an_unpatched_transformers_loads_a_checkpoint_with_its_code(copies, tied, tmp_path):
    script = """
import sys, transformers, torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
assert transformers.__file__.startswith(sys.argv[1]) and "qwen2_5_vl_merge" not in CONFIG_MAPPING_NAMES
try:
    AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=False)
except ValueError:
    pass
else:
    raise SystemExit("control: it loaded without its code")
model = AutoModelForImageTextToText.from_pretrained(sys.argv[2], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
processor = AutoProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
model.save_pretrained(sys.argv[3])
again = AutoModelForImageTextToText.from_pretrained(sys.argv[3], trust_remote_code=True)
assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
print(type(processor).__name__, model.generate(input_ids=torch.arange(9)[None], max_new_tokens=3).shape)
"""
    environment = {**os.environ, "PYTHONPATH": str(copies["transformers"]), "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [sys.executable, "-c", script, str(copies["transformers"]), str(tied.merged), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Qwen2_5_VLProcessor" in result.stdout


@pytest.mark.skipif("QWEN_MERGE_LLAMAFACTORY_CHECKOUT" not in os.environ, reason="no source checkout at hand")
def test_a_source_checkout_of_the_seeds_commit(tmp_path):
    checkout = Path(os.environ["QWEN_MERGE_LLAMAFACTORY_CHECKOUT"])
    shutil.copytree(checkout / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    original = python_files(tmp_path)
    assert "0.9.3.dev0" in run("apply", "llamafactory", root=tmp_path).stdout
    verified = run("verify", "llamafactory", root=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert run("revert", "llamafactory", root=tmp_path).returncode == 0
    assert python_files(tmp_path) == original
