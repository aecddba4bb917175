"""The Simple-VL recipe at tiny size, as it is typed: graft, two stages of ms-swift, infer, deploy, EvalScope.

The pictures are red or blue, so what a trained model has to answer is known, and with it the score.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import grafts
from qwen_merge import cli
from qwen_merge.architecture.modeling_qwen2_5_vl_merge import disk_name
from serving import Server, data_url, decoded, png, said
from training import REPOSITORY

pytestmark = pytest.mark.slow

# As VLMEvalKit asks it.
QUESTION = (
    "Question: What colour is it?\nOptions:\nA. red\nB. blue\n"
    "Please select the correct answer from the options above. \n"
)
COLOURS = {"A": (255, 0, 0), "B": (0, 0, 255)}
SIZES = ((56, 56), (84, 56))
TINY = ("--torch_dtype", "float32", "--dataloader_num_workers", "0", "--dataset_num_proc", "1", "--seed", "1")
STEPS = ("--gradient_accumulation_steps", "1", "--warmup_ratio", "0", "--logging_steps", "1")
SECOND = (*TINY, *STEPS, "--num_train_epochs", "6", "--learning_rate", "2e-3")


def launch(step: str, *options, **environment) -> subprocess.Popen:
    """`scripts/simple_vl.sh`."""
    return subprocess.Popen(
        ["bash", REPOSITORY / "scripts/simple_vl.sh", step, *map(str, options)],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **{name: str(value) for name, value in environment.items()},
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def script(step: str, *options, code: int = 0, **environment) -> str:
    """What `scripts/simple_vl.sh` prints."""
    process = launch(step, *options, **environment)
    try:
        printed = process.communicate(timeout=900)[0]
    finally:
        process.terminate()
    result = subprocess.CompletedProcess(process.args, process.returncode, printed)
    assert result.returncode == code, result.stdout[-6000:]
    return result.stdout


def deployed(folder: Path, *options: str, **environment: str) -> Server:
    """`scripts/simple_vl.sh deploy`."""
    command = ["bash", "scripts/simple_vl.sh", "deploy", *TINY[:2], "--temperature", "0", *options]
    return Server(command, folder, **environment)


def answer(server: Server, colour: tuple[int, int, int]) -> str:
    body = {"model": "Simple-VL", "max_tokens": 4}
    return said(server.answer(data_url(png((56, 56), colour)), QUESTION, **body))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sources, the recipe's own graft files with these sources in them, and rows to train on."""
    folder = tmp_path_factory.mktemp("simple_vl")
    sources = {
        "vision": grafts.make_tower(folder / "vlm", "qwen2_5_vl"),
        "llm": grafts.make_llm(folder / "llm", tied=False, dtype="float32", hidden_size=128),
    }
    for name in ("graft", "graft_stock"):
        recipe = yaml.safe_load((REPOSITORY / f"examples/simple_vl/{name}.yaml").read_text())
        for part, source in sources.items():
            recipe[part]["source"] = str(source)
        recipe["output"] = str(folder / name)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    rows = []
    for letter, colour in COLOURS.items():
        for size in SIZES * 2:
            file = folder / f"{letter}-{size[0]}.png"
            file.write_bytes(png(size, colour))
            messages = [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": letter}]
            rows.append({"messages": messages, "images": [str(file)]})
    write(folder / "train.jsonl", rows)
    wrong = {
        "no picture": {**rows[0], "images": [str(folder / "none.png")]},
        "a placeholder": {**rows[0], "messages": [{"role": "user", "content": "<image><|image_pad|>"}, messages[1]]},
        "no picture for a tag": {**rows[0], "images": []},
        "too long": {**rows[0], "messages": [{"role": "user", "content": "<image>" + "word " * 9000}, messages[1]]},
    }
    write(folder / "mixed.jsonl", [*wrong.values(), *rows])
    return folder


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def environment(folder) -> dict[str, str]:
    """Of every step."""
    return {
        "GRAFT": str(folder / "graft.yaml"),
        "OUTPUT": str(folder / "out"),
        "DATASET": str(folder / "mixed.jsonl"),
        "CHECK": "drop",
        "LMUData": str(folder / "lmu"),
    }


@pytest.fixture(scope="module")
def base(folder, environment) -> Path:
    script("graft", **environment)
    return folder / "graft"


@pytest.fixture(scope="module")
def stage1(folder, base, environment) -> Path:
    options = (*TINY, *STEPS, "--num_train_epochs", "1", "--learning_rate", "1e-3")
    (folder / "stage1.log").write_text(script("stage1", *options, **environment))
    return folder / "out/stage1/checkpoint-4"


@pytest.fixture(scope="module")
def stage2(folder, stage1, environment) -> Path:
    script("stage2", *SECOND, **environment)
    return folder / "out/stage2/checkpoint-24"


@pytest.fixture(scope="module")
def starting(folder, stage2, environment):
    """The trained graft, by vLLM, whose start takes as long as what is done meanwhile."""
    server = deployed(folder, "--infer_backend", "vllm", "--vllm_max_model_len", "512", **environment)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def served(starting):
    starting.wait(600)
    return starting


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {disk_name(name): weight for name, weight in load_file(checkpoint / "model.safetensors").items()}


def changed(before: Path, after: Path) -> tuple[set[str], set[str]]:
    """(names of the tensors that differ, all names)."""
    first, second = weights(before), weights(after)
    assert set(first) == set(second)
    return {name for name in first if not torch.equal(first[name], second[name])}, set(first)


def test_stage_1_changes_the_aligner_and_nothing_else(base, stage1):
    different, names = changed(base, stage1)
    assert different == {name for name in names if name.startswith("projector.")}
    assert len(different) == 5
    settings = json.loads((stage1 / "args.json").read_text())
    published = {"per_device_train_batch_size": 2, "max_length": 8192, "train_type": "full", "save_steps": 1000}
    assert {name: settings[name] for name in published} == published
    assert sorted(path.name for path in stage1.glob("*.py")) == sorted(path.name for path in base.glob("*.py"))


def test_stage_2_changes_everything(stage1, stage2):
    different, names = changed(stage1, stage2)
    assert different == names  # tower, projector and LLM with its q/k norms, tensor by tensor
    assert any(name.endswith("q_norm.weight") for name in different)


def named(printed: str) -> str:
    """What reading the rows said."""
    return "\n".join(line for line in printed.splitlines() if line.startswith(("rows:", "  - ")))


def test_rows_that_cannot_be_used_are_named_before_the_first_step(folder, stage1, environment, tmp_path):
    """Stage 1 had left them out: its four steps are eight rows of twelve."""
    said = named((folder / "stage1.log").read_text())
    assert "rows: train: 3 of 12 rows cannot be read" in said
    assert "1 <image> for 0 images" in said
    assert "none.png (not there)" in said
    assert "the text has 5 placeholders for images" in said
    assert "rows: train: 9 rows were read; 1 are longer than --max_length 8192" in said
    assert "3 rows that could not be read are left out" in said
    stopped = script("stage1", *TINY, *STEPS, code=2, **{**environment, "CHECK": "stop", "OUTPUT": str(tmp_path)})
    assert "none.png (not there)" in named(stopped)
    assert "leave them out with CHECK=drop" in named(stopped)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    write(tmp_path / "lost.jsonl", [*rows, {"mesages": rows[0]["messages"]}])
    lost = {**environment, "DATASET": str(tmp_path / "lost.jsonl"), "OUTPUT": str(tmp_path)}
    said = named(script("check", *TINY, code=2, **lost))
    assert f"1 of {len(rows) + 1} rows were not loaded" in said
    assert f"lost.jsonl line {len(rows) + 1} has mesages" in said
    assert not list(tmp_path.glob("stage1/checkpoint-*"))


def test_a_killed_stage_goes_on_where_it_was(folder, stage2, environment):
    """To the weights of a run that was not killed, without a step twice."""
    stage = folder / "out/killed"
    options = (*SECOND, "--save_steps", "1", "--output_dir", stage)
    process = launch("stage2", *options, **environment)
    try:
        end = time.monotonic() + 300
        while not list(stage.glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.terminate()
        printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0, printed[-6000:]
    half = stage / "checkpoint-23"
    assert not half.exists()
    half.mkdir()
    shutil.copy(stage2 / "config.json", half)
    printed = script("stage2", *options, **environment)
    assert "checkpoint-23 was cut short" in printed
    assert "stage2 goes on from" in printed
    assert "cannot be read" not in printed  # as they were for stage 2
    first, second = weights(stage2), weights(stage / "checkpoint-24")
    assert all(torch.equal(first[name], second[name]) for name in first)
    notes = [json.loads(line) for line in (stage / "logging.jsonl").read_text().splitlines()]
    steps = [int(note["global_step/max_steps"].split("/")[0]) for note in notes if "loss" in note]
    assert steps[0] == 1
    assert steps.count(1) == 1  # the control: begun again it would be there twice
    assert steps[-1] == 24
    before = (stage / "checkpoint-24/model.safetensors").stat().st_mtime_ns
    assert "stage2 is finished" in script("stage2", *options, **environment)
    assert (stage / "checkpoint-24/model.safetensors").stat().st_mtime_ns == before


def test_a_stock_checkpoint_goes_on_with_its_own_weights(folder, environment):
    """By itself transformers' trainer would not find the tower and the LLM in it, and go on with the graft's."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    stock = {**environment, "GRAFT": str(folder / "graft_stock.yaml"), "DATASET": str(folder / "train.jsonl")}
    stock |= {"OUTPUT": str(folder / "stock"), "CHECK": "no"}
    script("graft", "--no-measure", **stock)
    options = (*TINY, *STEPS, "--max_steps", "2", "--save_steps", "1", "--learning_rate", "2e-3")
    stock["MODEL"] = str(folder / "graft_stock")
    script("stage2", *options, **stock)
    whole, begun = folder / "stock/stage2", folder / "stock/begun"
    shutil.copytree(whole / "checkpoint-1", begun / "checkpoint-1")
    script("stage2", *options, "--output_dir", begun, **stock)
    kept = load_file(whole / "checkpoint-2/model.safetensors")
    found = load_file(begun / "checkpoint-2/model.safetensors")
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    # The control: what the trainer does by itself.
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "graft_stock", torch_dtype="float32")
    loaded = model.load_state_dict(load_file(whole / "checkpoint-1/model.safetensors"), strict=False)
    assert any("visual" in name for name in loaded.missing_keys)


def test_infer_answers_the_rows(folder, starting, environment):
    result = folder / "answers.jsonl"
    options = ("--val_dataset", folder / "train.jsonl", "--result_path", result, "--max_new_tokens", "4")
    script("infer", *options, "--temperature", "0", **environment)
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert len(rows) == 8
    assert [row["response"] for row in rows] == [row["labels"] for row in rows]
    assert {row["response"] for row in rows} == {"A", "B"}  # by the picture: the questions are the same


def test_the_served_model_sees_what_it_was_trained_on(served):
    assert [answer(served, colour) for colour in COLOURS.values()] == ["A", "B"]


def test_evalscope_scores_the_served_model(folder, served, environment):
    """Four questions, of which the last has a wrong key: three quarters are right."""
    lines = ["\t".join(("index", "question", "A", "B", "answer", "category", "image"))]
    for number, (shown, key) in enumerate(("AA", "BB", "AA", "BA")):
        picture = base64.b64encode(png(SIZES[number % 2], COLOURS[shown])).decode()
        lines.append("\t".join((str(number), "What colour is it?", "red", "blue", key, "colour", picture)))
    (folder / "lmu").mkdir()
    (folder / "lmu/Colours.tsv").write_text("\n".join(lines) + "\n")
    options = ("--url", f"{served.url}/v1/chat/completions", "--data", "Colours", "--nproc", "2", "--temperature", "0")
    script("evaluate", *options, "--max-tokens", "4", **environment)
    import pandas

    (results,) = folder.glob("out/evaluation/*/Simple-VL")
    predictions = pandas.read_excel(results / "Simple-VL_Colours.xlsx")
    assert predictions.sort_values("index")["prediction"].tolist() == ["A", "B", "A", "B"]
    scores = pandas.read_csv(results / "Simple-VL_Colours_acc.csv")
    assert scores["Overall"].tolist() == [0.75]


def test_the_stock_graft_is_served_without_vllm(folder, environment):
    """Untrained, under the kit's template: what it says is what transformers makes of the same prompt."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    checkpoint = folder / "graft_stock"
    if not checkpoint.exists():
        assert cli.main(["graft", str(folder / "graft_stock.yaml"), "--no-measure"]) == 0
    server = deployed(
        folder, "--infer_backend", "pt", "--served_model_name", "stock", **{**environment, "MODEL": str(checkpoint)}
    )
    try:
        server.wait()
        picture = png((84, 56), (200, 10, 40))
        found, tokens = said(server.answer(data_url(picture), "What is it?", model="stock", max_tokens=6))
    finally:
        server.stop()
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, torch_dtype="float32").eval()
    prompt = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(text=[prompt], images=[decoded(picture)], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert tokens == length
    assert found == processor.tokenizer.decode(generated[0, length:], skip_special_tokens=False)


def test_what_cannot_go_on_is_said(folder, tmp_path):
    elsewhere = {"GRAFT": str(folder / "graft.yaml"), "OUTPUT": str(tmp_path), "DATASET": "rows.jsonl"}
    assert "unknown step stage3" in script("stage3", code=2)
    assert "there is no whole checkpoint in" in script("stage2", code=2, **elsewhere)
    assert "is not a file" in script("stage1", code=2, GRAFT=str(tmp_path / "none.yaml"))
    assert "DATASET is not set" in script(
        "stage1", code=2, **{**elsewhere, "DATASET": "", "MODEL": str(folder / "llm")}
    )
