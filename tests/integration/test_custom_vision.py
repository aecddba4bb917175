"""Another encoder before Qwen3-VL's LLM, from a user's own JSON to answers: examples/custom_vision at tiny size.

    .venv/bin/python -m pytest tests/integration/test_custom_vision.py

The script's steps are walked once, with one launch of a training and one of an export; what each recipe trains, and how
far, is looked at in this process.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import grafts
import own_encoder
from clips import write_clip
from own_sets import row, turns, write_sets
from qwen_merge import cli
from training import LAUNCH_TIMEOUT, ON_CPU, REPOSITORY, environment, train_here

pytestmark = pytest.mark.slow

RECIPES = REPOSITORY / "examples/custom_vision"
LIGHT, DARK = "Light.", "Dark."
QUESTION = "Which is it?"
DATASET = "mine%50,other"
ON = {"dataset": DATASET, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4}


def grey(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 56), (value, value, value)).save(path)
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, sources) -> Path:
    """The repository's shape with this environment in it, a tiny graft, and two sets of a user."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "scripts"):
        shutil.copytree(REPOSITORY / name, folder / name)
    (folder / "src").symlink_to(REPOSITORY / "src")
    (folder / ".venv").symlink_to(sys.prefix)
    grafts.write_recipe(folder / "graft.yaml", sources / "dinov2", "linear", sources / "qwen3_vl", Path("tiny-base"))
    pictures = folder / "mine/pictures"
    rows = []
    for number in range(24):
        light = number % 2 == 0
        file = grey(pictures / f"{number}.png", 255 - number if light else number)
        asked = {"image": str(file) if number % 3 else file.name}  # absolute, and relative to data_path
        rows.append({**asked, "conversations": turns(f"<image>\n{QUESTION}", LIGHT if light else DARK)})
    write_clip(pictures / "clip.mp4", frames=8, rate=4.0)
    others = [
        row(0, "<image><image>\nHow many?", image=["0.png", "1.png"]),
        row(1, "<video>\nWhat happens?", video="clip.mp4"),
        row(2, "Who are you?"),
        {"image": ["1.png"], "conversations": turns("Look here.", "Yes.", f"<image>\n{QUESTION}", DARK)},
    ]
    write_sets(folder / "mine", {"mine": rows, "other": others}, data_path="pictures")
    return folder


def step(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    known = {"DATASET": DATASET, "SETS": "sets.yaml", "GRAFT": "../graft.yaml", "REPORT_TO": "none"}
    return subprocess.run(
        [checkout / "scripts/custom_vision.sh", *arguments],
        env=environment(checkout, **{**known, "NPROC_PER_NODE": "1", **variables}),
        cwd=checkout / "mine",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LAUNCH_TIMEOUT,
    )


def done(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


@pytest.fixture(scope="module")
def base(checkout) -> Path:
    """Steps `data` and `graft`."""
    done(step(checkout, "data", "--video-max-pixels", "56*56", "--video-min-pixels", "28*28"))
    done(step(checkout, "graft"))
    return checkout / "tiny-base"


def part_of(name: str) -> str:
    return {"visual": "vision", "projector": "projector"}.get(name.split(".", maxsplit=1)[0], "LLM")


def steps(before: Path, after: Path) -> dict[str, float]:
    """The largest step of a weight of each part that took one; of an adapter's matrices those that begin with zeros."""
    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import disk_name

    old, found = load_file(before / "model.safetensors"), dict[str, float]()
    adapter = after / "adapter_model.safetensors"
    saved = load_file(adapter if adapter.exists() else after / "model.safetensors")
    for name, tensor in saved.items():
        if ".lora_A." in name:
            continue
        own = disk_name(name.removeprefix("base_model.model."))
        part, start = part_of(own), 0 if ".lora_B." in name else old[own]
        if step := float((tensor - start).abs().max()):
            found[part] = max(step, found.get(part, 0.0))
    return found


# The steps as a user takes them


@pytest.fixture(scope="module")
def taught(checkout, base) -> Path:
    """One stage through the script, at rates at which a tiny model learns its answers in a minute; then the export."""
    values = {**ON_CPU, "max_steps": 60, "learning_rate": 1e-2, "projector_learning_rate": 1e-2, "save_steps": 1000}
    values |= {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    done(step(checkout, "one_stage", *(f"{name}={value}" for name, value in values.items())))
    done(step(checkout, "export", "one_stage", "--infer_dtype", "float32"))
    return checkout / "outputs/tiny-one-stage-merged"


def answer(model: Path, *pictures: Path) -> str:
    """Greedy, through the checkpoint's own code and chat template."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    asked = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": f"\n{QUESTION}"}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    images = [Image.open(picture) for picture in pictures]
    inputs = processor(text=text, images=images, return_tensors="pt")
    with torch.no_grad():
        end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")  # the tiny LLM has no generation_config.json
        output = asked.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=end)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_steps_teach_a_model_what_its_pictures_show(checkout, base, taught):
    light, dark = grey(checkout / "light.png", 240), grey(checkout / "dark.png", 12)
    assert (answer(taught, light), answer(taught, dark)) == (LIGHT, DARK)
    assert answer(base, light) != LIGHT  # the control
    assert answer(base, dark) != DARK


def test_what_the_export_leaves_and_what_it_changes(base, taught):
    old, new = (load_file(folder / "model.safetensors") for folder in (base, taught))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    projector = {name for name in old if name.startswith("projector.")}
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapted = {name for name in old if name.startswith("model.layers.") and name.split(".")[-2] in layers}
    assert changed == projector | adapted
    assert len(adapted) == 7 * 2


def test_a_step_that_lacks_the_one_before_says_so(checkout, base):
    missing = step(checkout, "stage2")
    assert missing.returncode == 2
    assert "stage2 starts from 'outputs/tiny-stage1', which holds no model" in missing.stderr
    larger = step(checkout, "stage2", "8b", GRAFT="")
    assert "stage2 starts from 'outputs/rad-dino-8b-stage1', which holds no model" in larger.stderr
    for arguments, message in ((("stage3",), "unknown step 'stage3'"), (("export", "data"), "export of 'data'")):
        wrong = step(checkout, *arguments)
        assert wrong.returncode == 2
        assert message in wrong.stderr
    assert "DATASET is not set" in step(checkout, "data", DATASET="").stderr
    assert "mine/none.yaml is not a file" in step(checkout, "graft", GRAFT="none.yaml").stderr


# What each recipe trains


@pytest.fixture
def trained(checkout, base, tmp_path, monkeypatch):
    """One step of Adam by a recipe: (recipe, from where, values) -> its output. Each part goes as far as its rate."""
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "ERROR")

    def run(name: str, model: Path, **values) -> Path:
        train_here(
            RECIPES / f"{name}.yaml", model=model, output=tmp_path / name, data=checkout / "data", **ON, **values
        )
        return tmp_path / name

    return run


def test_one_stage_trains_projector_and_adapters_and_no_more(base, trained):
    output = trained("one_stage", base)
    assert steps(base, output) == pytest.approx({"projector": 2e-5, "LLM": 1e-5}, rel=0.05)
    # The control: one number of the frozen tower would be seen.
    tensors = load_file(base / "model.safetensors")
    shutil.copytree(base, other := output.with_name("other"))
    tensors["visual.layernorm.bias"][0] += 1e-6
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert set(steps(base, other)) == {"vision"}


def test_two_stages(base, trained):
    first = trained("stage1", base)
    assert steps(base, first) == pytest.approx({"projector": 2e-5}, rel=0.05)
    second = trained("stage2", first)
    assert steps(first, second) == pytest.approx({"projector": 1e-5, "LLM": 1e-5}, rel=0.05)


def test_the_encoder_trains_at_a_rate_of_its_own(taught, trained):
    expected = {"vision": 1e-6, "projector": 1e-5, "LLM": 1e-5}
    assert steps(taught, trained("encoder", taught)) == pytest.approx(expected, rel=0.05)


def test_an_encoder_of_one_s_own_trains_as_any_other(checkout, base, sources, trained):
    weights, code = own_encoder.make(checkout / "own")
    vision, graft = {"code": str(code)}, checkout / "own-base"
    file = grafts.write_recipe(checkout / "own.yaml", weights, "linear", sources / "qwen3_vl", graft, vision=vision)
    assert cli.main(["graft", str(file)]) == 0
    values = {"freeze_vision_tower": False, "vision_learning_rate": 1e-6}
    output = trained("one_stage", graft, **values)
    assert steps(graft, output) == pytest.approx({"vision": 1e-6, "projector": 2e-5, "LLM": 1e-5}, rel=0.05)
    assert (output / "adapter_model.safetensors").is_file()


# Pixels


@pytest.mark.parametrize("size", [(1400, 900), (20, 30), (300, 200), (3000, 40)])
def test_an_interpolated_encoder_keeps_the_shape_within_the_seed_s_pixels(checkout, sources, size):
    """LLaMA-Factory's plug-in, the checkpoint's own processor and the model count the same tokens."""
    from llamafactory.data.template import TEMPLATES

    least, most = 16 * 28 * 28, 576 * 28 * 28
    output = checkout / "interpolated"
    if not output.exists():
        vision = {"resolution": "interpolated", "min_pixels": least, "max_pixels": most}
        file = grafts.write_recipe(
            checkout / "interpolated.yaml", sources / "dinov2", "linear", sources / "qwen3_vl", output, vision=vision
        )
        assert cli.main(["graft", str(file)]) == 0
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    processor.image_max_pixels, processor.image_min_pixels = most, least  # as LLaMA-Factory's loader does
    picture = Image.new("RGB", size, (9, 90, 200))
    plugin = TEMPLATES["qwen_merge_vl"].mm_plugin
    (message,) = plugin.process_messages([{"role": "user", "content": "<image>"}], [picture], [], [], processor)
    inputs = plugin.get_mm_inputs([picture], [], [], [1], [0], [0], [[]], processor)
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    assert message["content"].count("<|image_pad|>") == rows * columns
    assert 0.9 * least <= rows * columns * 14 * 14 <= most
    if max(size) < 20 * min(size):
        assert columns / rows == pytest.approx(size[0] / size[1], rel=0.15)
    own = processor(text="<|image_pad|>", images=[picture], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert own[1] * own[2] == pytest.approx(rows * columns, rel=0.1)  # asked without LLaMA-Factory
    model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True)
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert features.shape == (rows * columns, model.config.hidden_size)
