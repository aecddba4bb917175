"""Launches `llamafactory-cli train` as a user does, on a real recipe with the few values a CPU needs changed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from checkpoints import write_json

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "examples/train_qwen_merge"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
LAUNCH_TIMEOUT = 420  # seconds; a launch takes 40 to 110, most of it imports

# What stands between a recipe and a tiny model on a CPU; everything else is the recipe's.
ON_CPU = {
    "use_cpu": "true",
    "bf16": "false",
    "deepspeed": "null",
    "report_to": "none",
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "warmup_ratio": 0,
    "plot_loss": "false",
}


def recipe(size: str, stage: str) -> Path:
    return RECIPES / f"train_qwen_merge_vl_{size}_stage{stage}.yaml"


def make_data(folder: Path, rows: int = 24) -> Path:
    """A `dataset_dir` with every set the recipes name, each the same few rows of the record format.

    Rows differ in length, in the number of turns and in the size of the picture.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir(parents=True)
    records = []
    for i in range(rows):
        file = io.BytesIO()
        Image.new("RGB", (56 + 28 * (i % 3), 56), (40 * i % 256, 90 * i % 256, 10 * i)).save(file, "PNG")
        messages = []
        for turn in range(1 + i % 2):
            question = f"What colour is number {i}, asked {'again ' * (i % 5)}and again?"
            messages += [
                {"role": "user", "content": ("<image>\n" if turn == 0 else "") + question},
                {
                    "role": "assistant",
                    "content": f"<think>\n{'Look. ' * (i % 4)}\n</think>\n\nColour {i}, turn {turn}.",
                },
            ]
        records.append({"messages": messages, "images": [{"bytes": file.getvalue(), "path": None}]})
    pq.write_table(pa.Table.from_pylist(records), folder / "rows.parquet")
    entry = {
        "file_name": "rows.parquet",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    names = {name for path in RECIPES.glob("*.yaml") for name in yaml.safe_load(path.read_text())["dataset"].split(",")}
    write_json(folder / "dataset_info.json", {name.strip(): entry for name in names})
    return folder


def command(recipe: Path, *, model: Path, output: Path, data: Path, **overrides) -> list[str]:
    values = {"model_name_or_path": model, "output_dir": output, "dataset_dir": data, **ON_CPU, **overrides}
    cli = shutil.which("llamafactory-cli", path=PATH)
    assert cli is not None, f"no llamafactory-cli in {PATH}"
    return [cli, "train", str(recipe), *(f"{key}={value}" for key, value in values.items())]


def train_here(recipe: Path, *, model: Path, output: Path, data: Path, **overrides) -> None:
    """The same training in this process, for tests of what LLaMA-Factory's functions do and not of its launch."""
    from llamafactory.train.tuner import run_exp

    here = {name: yaml.safe_load(str(value)) for name, value in ON_CPU.items()}
    values = yaml.safe_load(recipe.read_text()) | here | overrides
    run_exp(values | {"model_name_or_path": str(model), "output_dir": str(output), "dataset_dir": str(data)})


# What `data check` sets for its own process, which in the tests is the one that everything is launched from.
SILENCED = ("LLAMAFACTORY_VERBOSITY", "TRANSFORMERS_VERBOSITY")


def environment(data: Path, processes: int = 1, **variables: str) -> dict[str, str]:
    result = {
        **{name: value for name, value in os.environ.items() if name not in SILENCED},
        "PATH": PATH,  # llamafactory-cli starts torchrun by name
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(data / "hf_home"),
        # DeepSpeed builds a small extension. In the shared cache a build that was killed leaves a lock for ever.
        "TORCH_EXTENSIONS_DIR": str(data / "extensions"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # sums in a fixed order, whatever the number of processes
        "WANDB_MODE": "offline",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # nothing is compiled; each launch would start a pool of workers for it
        **variables,
    }
    if processes > 1:
        result.update(FORCE_TORCHRUN="1", NPROC_PER_NODE=str(processes))
    return result


def train(
    recipe: Path, *, model: Path, output: Path, data: Path, processes: int = 1, variables=None, check=True, **overrides
) -> subprocess.CompletedProcess:
    """Run one training to its end. Raises with the end of its output when `check` and it fails, or when it hangs."""
    process = subprocess.Popen(
        command(recipe, model=model, output=output, data=data, **overrides),
        env=environment(data, processes, **(variables or {})),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output_text, _ = process.communicate(timeout=LAUNCH_TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too, which hold the pipe open
        output_text, _ = process.communicate()
        raise AssertionError(f"no end after {LAUNCH_TIMEOUT} s:\n{output_text[-6000:]}") from None
    assert not check or process.returncode == 0, output_text[-6000:]
    return subprocess.CompletedProcess(process.args, process.returncode, output_text)


def workers(output: Path) -> list[int]:
    """The processes of the ranks that train into `output`, by rank; those of their data loaders are younger."""
    found: dict[int, int] = {}
    for number in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        try:
            command_line = Path(f"/proc/{number}/cmdline").read_bytes()
            variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        ranks = [int(text.partition(b"=")[2]) for text in variables if text.startswith(b"LOCAL_RANK=")]
        if ranks and str(output).encode() in command_line:
            found.setdefault(ranks[0], number)
    return [found[rank] for rank in sorted(found)]


def losses(output: Path) -> list[float]:
    lines = (output / "trainer_log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
