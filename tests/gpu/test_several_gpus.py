"""Two GPUs train as one does, under the recipes' own DeepSpeed files; a run whose rank died goes on later.

    .venv/bin/python -m pytest tests/gpu/test_several_gpus.py

Never run by CI. Needs LLaMA-Factory and DeepSpeed with the overlays applied, and two NVIDIA GPUs.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from test_gpu import sources  # noqa: F401

from qwen_merge.architecture import register
from record_sets import parted_rows, write_set
from training import PATH, REPOSITORY, command, environment, losses, recipe, train, workers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")]
register()

STEPS, CAPACITY = 12, 200


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Some steps give one rank text alone: `test_packed_training` looks at the plan."""
    folder = tmp_path_factory.mktemp("data")
    write_set(folder, "parted", parted_rows())
    return folder


def options(sources, data, zero: int, **values) -> dict:  # noqa: F811
    """Float32 and plain SGD: rounding stays rounding."""
    return {
        "model": sources / "merged",
        "data": data,
        "dataset": "parted",
        "use_cpu": "false",
        "neat_packing": "true",
        "cutoff_len": CAPACITY,
        "deepspeed": REPOSITORY / f"examples/deepspeed/ds_z{zero}_config.json",
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 1,
        **values,
    }


def on_gpus(number: int) -> dict[str, str]:
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(number))),
        "FORCE_TORCHRUN": "1",
        "NPROC_PER_NODE": str(number),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def distance(one: Path, other: Path, base: Path) -> float:
    a, b, c = (weights(folder) for folder in (one, other, base))
    apart = sum((a[name] - b[name]).square().sum() for name in a)
    return float((apart / sum((a[name] - c[name]).square().sum() for name in a)).sqrt())


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_gpus_take_the_steps_of_one_though_a_rank_has_no_picture(sources, data, tmp_path, zero):  # noqa: F811
    stage, base = recipe("8B", "2.1"), sources / "merged"
    alone = options(sources, data, zero, per_device_train_batch_size=2)
    train(stage, output=tmp_path / "one", variables=on_gpus(1), **alone)
    train(stage, output=tmp_path / "two", variables=on_gpus(2), **options(sources, data, zero))
    train(stage, output=tmp_path / "half", variables=on_gpus(1), **options(sources, data, zero))  # the control
    apart, control = (distance(tmp_path / "one", tmp_path / name, base) for name in ("two", "half"))
    print(f"ZeRO-{zero}: two GPUs {apart:.1e} from one, half a step's packs {control:.1e}")
    assert apart < 1e-3
    assert control > 1e-2


@pytest.mark.parametrize("zero", [2, 3])
def test_a_rank_that_dies_ends_the_run_and_the_run_goes_on_from_its_checkpoint(sources, data, tmp_path, zero):  # noqa: F811
    stage, output = recipe("8B", "2.1"), tmp_path / "killed"
    # Long enough that the kill comes in the middle.
    arguments = options(sources, data, zero, max_steps=400, save_steps=20, save_total_limit=100)
    train(stage, output=tmp_path / "whole", variables=on_gpus(2), **arguments)
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        command(stage, output=output, **arguments),
        env=environment(data, **on_gpus(2)) | {"PATH": PATH},
        cwd=REPOSITORY,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    while process.poll() is None and not (output / "checkpoint-40/trainer_state.json").exists():
        time.sleep(0.02)
    begin, ranks = time.monotonic(), workers(output)
    assert len(ranks) == 2, (tmp_path / "log").read_text()[-3000:]
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    seconds, text = time.monotonic() - begin, (tmp_path / "log").read_text()
    print(f"ZeRO-{zero}: the run ended {seconds:.0f} s after its rank 1 was killed")
    assert "Signal 9 (SIGKILL)" in text
    assert "local_rank: 1" in text
    assert not (output / "model.safetensors").exists()

    resumed = train(stage, output=output, variables=on_gpus(2), **arguments)
    assert "Continuing training from global step" in resumed.stdout
    apart = distance(tmp_path / "whole", output, sources / "merged")
    before = distance(tmp_path / "whole", output / "checkpoint-40", sources / "merged")
    print(f"ZeRO-{zero}: {apart:.1e} from the whole run; what was there at the kill is {before:.1e} from it")
    assert apart < 1e-3
    assert before > 1e-2  # the control
    assert losses(output)[-1] == pytest.approx(losses(tmp_path / "whole")[-1], abs=1e-3)
