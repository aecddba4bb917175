"""Grafts through LLaMA-Factory, on the recipes of examples/graft: what trains at which rate, LoRA, packs, resuming.

One launch of `llamafactory-cli train`, with DeepSpeed; what LLaMA-Factory does after its launch is run in this process.
"""

import json
import shutil
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import grafts
import record_sets
from checkpoints import write_json
from qwen_merge import cli
from qwen_merge.data import check_recipe
from qwen_merge.data.schema import Record
from qwen_merge.errors import UserError
from record_sets import picture, turns, write_set
from training import REPOSITORY, losses, train, train_here

pytestmark = pytest.mark.slow

TRIPLES = (
    ("siglip", "mlp", "qwen3", "mrope"),
    ("dinov2", "linear", "qwen2", "1d"),
    ("qwen2_5_vl", "patch_merger", "qwen3", "mrope"),
)
QWEN_MERGE = ("qwen2_5_vl", "extended", "qwen3", "mrope")  # as `qwen-merge merge` makes it
RATES = {"vision": 1e-6, "projector": 1e-5, "LLM": 2e-5}
# A batch of eight rows has all kinds of rows in it.
ON = {"dataset": "mixed", "trust_remote_code": True, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8}


def recipe(name: str) -> Path:
    return REPOSITORY / f"examples/graft/graft_{name}.yaml"


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "ERROR")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows with a picture, with two, and without; the batches of `texts` have none."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(24):
        pictures = [picture(56 + 28 * (i % 3), 56)] * (i % 3)
        answer = "Number " + "".join(chr(97 + (i * 7 + k) % 26) for k in range(8 + i % 5))
        rows.append(Record(turns("<image>" * len(pictures) + f"Which number is {i}?", answer), pictures))
    write_set(folder, "mixed", rows)
    write_set(folder, "texts", [row for row in rows if not row.images])
    return folder


def part_of(name: str) -> str:
    """Of a tensor on the disk, Qwen-Merge's names and grafts'."""
    if name.startswith(("projector.", "visual.merger.")):
        return "projector"
    return "vision" if name.startswith("visual.") else "LLM"


def moved(before: Path, after: Path) -> dict[str, float]:
    """The largest step of a weight of each part that took one."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys(), "the names of the disk are not kept"
    steps: dict[str, float] = {}
    for name in old:
        step = float((new[name] - old[name]).abs().max())
        if step:
            steps[part_of(name)] = max(step, steps.get(part_of(name), 0.0))
    return steps


def rates(trained: str) -> dict[str, float]:
    return {part: RATES[part] for part in trained.split("+")}


def settings(trained: str) -> dict:
    """The freezing and the rates of a recipe that trains these parts."""
    parts = trained.split("+")
    values = {f"{part}_learning_rate": RATES[part] if part in parts else None for part in ("vision", "projector")}
    values |= {"freeze_vision_tower": "vision" not in parts, "freeze_multi_modal_projector": "projector" not in parts}
    return {**values, "freeze_language_model": "LLM" not in parts, "learning_rate": RATES["LLM"]}


@pytest.mark.parametrize("trained", ["projector", "projector+LLM", "vision+LLM", "vision+projector+LLM"])
@pytest.mark.parametrize("triple", [*TRIPLES, QWEN_MERGE], ids="-".join)
def test_one_step_of_adam_moves_each_part_by_its_learning_rate_and_no_other(graft, data, tmp_path, triple, trained):
    """Adam's first step is the learning rate, whatever the gradient; nothing else decides how far a weight goes."""
    base, out = graft(*triple), tmp_path / "out"
    train_here(recipe("full"), model=base, output=out, data=data, **ON, **settings(trained))
    assert moved(base, out) == pytest.approx(rates(trained), rel=0.05)


def test_without_rates_of_its_own_a_part_has_the_one_of_the_run(graft, data, tmp_path):
    base, out = graft(*TRIPLES[0]), tmp_path / "out"
    values = {**settings("vision+projector+LLM"), "vision_learning_rate": None, "projector_learning_rate": None}
    train_here(recipe("full"), model=base, output=out, data=data, **ON, **values)
    assert moved(base, out) == pytest.approx(dict.fromkeys(RATES, RATES["LLM"]), rel=0.05)


def test_a_trained_graft_is_saved_with_its_code_and_its_processor(graft, data, tmp_path):
    base, out = graft(*TRIPLES[0]), tmp_path / "out"
    train_here(recipe("projector"), model=base, output=out, data=data, **ON)
    assert {path.name for path in base.glob("*.py")} == {path.name for path in out.glob("*.py")}
    first, again = (AutoProcessor.from_pretrained(folder, trust_remote_code=True) for folder in (base, out))
    image = Image.new("RGB", (90, 60), (9, 200, 30))
    prompt = "<|vision_start|><|image_pad|><|vision_end|>What is it?"
    inputs = [processor(text=prompt, images=[image], return_tensors="pt") for processor in (first, again)]
    assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0])
    model, info = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    before = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
    with torch.no_grad():
        assert model(**inputs[0]).logits.isfinite().all()
        assert not torch.equal(model(**inputs[0]).logits, before(**inputs[0]).logits)  # it was trained


# LoRA


@pytest.fixture(scope="module")
def adapters(graft, data, tmp_path_factory):
    """(triple, what trains) -> the base and a training by LoRA of one step on it."""
    made = {}

    def make(triple, trained: str) -> tuple[Path, Path]:
        if (triple, trained) not in made:
            out = tmp_path_factory.mktemp("lora") / "out"
            with torch.enable_grad():  # the first to ask may be a test without gradients
                train_here(recipe("lora"), model=graft(*triple), output=out, data=data, **ON, **settings(trained))
            made[triple, trained] = out
        return graft(*triple), made[triple, trained]

    return make


@pytest.mark.parametrize("trained", ["LLM", "projector+LLM", "vision+projector+LLM"])
@pytest.mark.parametrize("triple", [*TRIPLES, QWEN_MERGE], ids="-".join)
def test_lora_moves_the_adapters_and_the_parts_that_are_free(adapters, triple, trained):
    base, out = adapters(triple, trained)
    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import disk_name

    old, steps = load_file(base / "model.safetensors"), {}
    saved = load_file(out / "adapter_model.safetensors")
    whole = {disk_name(name.removeprefix("base_model.model.")): x for name, x in saved.items() if ".lora_" not in name}
    for name, tensor in whole.items():
        steps[part_of(name)] = max(float((tensor - old[name]).abs().max()), steps.get(part_of(name), 0.0))
    low_rank = {name: tensor for name, tensor in saved.items() if ".lora_B." in name}  # these begin with zeros
    steps["LLM"] = max(float(tensor.abs().max()) for tensor in low_rank.values())
    assert steps == pytest.approx(rates(trained), rel=0.05)
    assert set(whole) == {name for name in old if part_of(name) in set(trained.split("+")) - {"LLM"}}
    assert all("model.language_model.layers." in name for name in low_rank)
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".lora_B")[0].rsplit(".", 1)[1] for name in low_rank} == layers
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.0)


def with_adapter(base: Path, adapter: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True), adapter
    ).eval()


def question(folder: Path) -> dict:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    text = "<|vision_start|><|image_pad|><|vision_end|>Which number is it?"
    return processor(text=text, images=[Image.radial_gradient("L").convert("RGB")], return_tensors="pt")


def strengthened(adapter: Path, folder: Path) -> Path:
    """The same adapter with matrices that make a difference: after one step they hardly do."""
    shutil.copytree(adapter, folder)
    from safetensors.torch import save_file

    dice, tensors = torch.Generator().manual_seed(0), load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if ".lora_B." in name or ".projector." in name or ".merger." in name]:
        tensors[name] = tensors[name] + 0.1 * torch.randn(tensors[name].shape, generator=dice)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("triple", [TRIPLES[0], QWEN_MERGE], ids="-".join)
@torch.no_grad()
def test_an_exported_model_answers_as_base_and_adapter(adapters, tmp_path, triple):
    from llamafactory.train.tuner import export_model

    base, adapter = adapters(triple, "projector+LLM")
    adapter, merged = strengthened(adapter, tmp_path / "adapter"), tmp_path / "merged"
    values = {"model_name_or_path": str(base), "adapter_name_or_path": str(adapter), "export_dir": str(merged)}
    values |= {"template": "qwen_merge_vl", "finetuning_type": "lora", "trust_remote_code": True}
    export_model({**values, "infer_dtype": "float32"})
    names = [set(load_file(folder / "model.safetensors")) for folder in (base, merged)]
    assert names[0] == names[1]
    assert {path.name for path in base.glob("*.py")} <= {path.name for path in merged.glob("*.py")}
    inputs = question(base)
    expected = with_adapter(base, adapter)(**inputs).logits
    found = AutoModelForImageTextToText.from_pretrained(merged, trust_remote_code=True)(**question(merged)).logits
    assert (found - expected).abs().max() < 1e-4
    alone = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)(**inputs).logits
    assert (alone - expected).abs().max() > 1e-2  # the control


@pytest.mark.parametrize("triple", [TRIPLES[0], QWEN_MERGE], ids="-".join)
@torch.no_grad()
def test_a_split_adapter_answers_as_before_and_is_low_rank_only(adapters, tmp_path, triple):
    base, adapter = adapters(triple, "projector+LLM")
    adapter = strengthened(adapter, tmp_path / "adapter")
    command = ["split-adapter", str(adapter), "--base", str(base), "--output", str(tmp_path / "split")]
    assert cli.main(command) == 0
    config = json.loads((tmp_path / "split/adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert all(".lora_" in name for name in load_file(tmp_path / "split/adapter/adapter_model.safetensors"))
    inputs = question(base)
    expected = with_adapter(base, adapter)(**inputs).logits
    found = with_adapter(tmp_path / "split/base", tmp_path / "split/adapter")(**inputs).logits
    assert (found - expected).abs().max() < 1e-5
    control = with_adapter(base, tmp_path / "split/adapter")(**inputs).logits  # without the trained projector
    assert (control - expected).abs().max() > 1e-3
    assert cli.main(command) == 2  # what is there is not written over


def test_an_adapter_of_another_base_is_not_split(adapters, graft, tmp_path):
    from qwen_merge.merger.split_adapter import split_adapter

    _, adapter = adapters(TRIPLES[0], "projector+LLM")
    with pytest.raises(UserError, match=r"projector.mlp.0.bias, which .* has not"):
        split_adapter(adapter, graft(*TRIPLES[1]), tmp_path / "split")
    with pytest.raises(UserError, match="is no adapter"):
        split_adapter(graft(*TRIPLES[1]), graft(*TRIPLES[1]), tmp_path / "split")
    assert not (tmp_path / "split").exists()


def test_the_second_of_two_stages_begins_with_the_projector_of_the_first(graft, data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train_here(recipe("projector"), model=graft(*TRIPLES[0]), output=first, data=data, **ON)
    train_here(recipe("lora_stage2"), model=first, output=second, data=data, **ON)
    trained = load_file(first / "model.safetensors")["projector.mlp.0.weight"]
    now = load_file(second / "adapter_model.safetensors")["base_model.model.model.projector.mlp.0.weight"]
    base = load_file(graft(*TRIPLES[0]) / "model.safetensors")["projector.mlp.0.weight"]
    assert float((now - trained).abs().max()) == pytest.approx(1e-5, rel=0.05)  # a step further
    assert float((now - base).abs().max()) > 1e-4


# Batches


def parts(data: Path, folder: Path, **values):
    """LLaMA-Factory's own data set and collator for a graft, and its model."""
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset

    config = {
        "model_name_or_path": str(folder), "trust_remote_code": True, "stage": "sft", "do_train": True,
        "finetuning_type": "full", "dataset_dir": str(data), "template": "qwen_merge_vl", "cutoff_len": 2000,
        "dataset": "mixed", "cache_dir": str(data / "cache"), "output_dir": str(data / "run"), "bf16": False,
        "freeze_multi_modal_projector": False, "per_device_train_batch_size": 1, **values,
    }  # fmt: skip
    arguments, problems = check_recipe.parse(config)
    assert arguments is not None, problems
    tokenizer, processor, template = check_recipe.load(arguments)
    arguments.data.finetuning_args = arguments.finetuning
    options = {"tokenizer": tokenizer, "processor": processor}
    rows = get_dataset(template, arguments.model, arguments.data, arguments.training, "sft", **options)["train_dataset"]
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).train()
    collator = SFTDataCollatorWith4DAttentionMask(
        model=model, template=template, label_pad_token_id=-100, pad_to_multiple_of=8, **options
    )
    return rows, collator, model


PACKED = (*TRIPLES, ("siglip", "resampler", "qwen3", "mrope"), ("qwen2_vl", "linear", "qwen2", "1d"))


@pytest.mark.parametrize("triple", PACKED, ids="-".join)
@torch.no_grad()
def test_packed_samples_have_the_loss_of_samples_apart(graft, data, triple):
    folder = graft(*triple)
    rows, collator, model = parts(data, folder)
    packed, *_ = parts(data, folder, neat_packing=True)
    texts = sorted(tuple(feature["input_ids"]) for i in range(len(packed)) for feature in packed[i]["pack"])
    assert texts == sorted(map(tuple, rows["input_ids"]))
    pack = packed[0]
    assert len(pack["pack"]) > 4
    wanted = {tuple(feature["input_ids"]) for feature in pack["pack"]}
    alone = collator([rows[i] for i in range(len(rows)) if tuple(rows[i]["input_ids"]) in wanted])
    row = collator([pack])
    assert row["input_ids"].shape[0] == 1
    alone.pop("rope_deltas", None)
    expected = model(**alone).loss.item()
    assert model(**row).loss.item() == pytest.approx(expected, abs=1e-5)
    offsets = [name for name in row if name.startswith(("cu_seq", "max_length"))]
    together = {name: value for name, value in row.items() if name not in (*offsets, "samples")}
    assert abs(model(**together).loss.item() - expected) > 1e-4  # the control: they see each other


@pytest.mark.parametrize("triple", PACKED, ids="-".join)
@torch.no_grad()
def test_a_batch_without_pictures_has_the_loss_of_its_text(graft, data, triple):
    """LLaMA-Factory adds a picture behind the mask, so that every rank runs the tower; nothing may come of it."""
    folder = graft(*triple)
    rows, collator, model = parts(data, folder, dataset="texts")
    batch = collator([rows[i] for i in range(4)])
    batch.pop("rope_deltas", None)
    seen = []
    model.model.visual.register_forward_hook(lambda *_: seen.append(1))
    loss = model(**batch).loss.item()
    assert seen
    assert (batch["input_ids"] == model.config.image_token_id).any()
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    text["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 0)
    assert loss == pytest.approx(model(**text).loss.item(), abs=1e-5)


@pytest.mark.parametrize("triple", PACKED, ids="-".join)
def test_pictures_have_the_tokens_that_the_processor_gives_them(graft, data, triple):
    folder = graft(*triple)
    rows, *_ = parts(data, folder, template="qwen_merge_vl_pt")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for i in (1, 2):
        record = rows[i]
        pictures = [Image.open(BytesIO(image["bytes"])) for image in record["images"]]
        shown = "<|vision_start|><|image_pad|><|vision_end|>" * len(pictures)
        prompt = f"<|im_start|>{shown}Which number is {i}?"
        expected = processor(text=prompt, images=pictures)["input_ids"][0]
        assert record["input_ids"][: len(expected)] == expected
        grids = processor(images=pictures)["image_grid_thw"]
        sizes = [processor.image_processor.grid(image.height, image.width) for image in pictures]
        assert [tuple(int(n) for n in grid) for grid in grids] == sizes


def test_tokens_are_spelled_as_the_graft_spells_them(sources, data, tmp_path):
    file = grafts.write_recipe(
        tmp_path / "graft.yaml", sources / "siglip", "mlp", sources / "qwen3", tmp_path / "out",
        tokens={"image": "<|box_start|>", "vision_start": "<|quad_start|>", "vision_end": "<|quad_end|>"},
    )  # fmt: skip
    assert cli.main(["graft", str(file)]) == 0
    rows, collator, model = parts(data, tmp_path / "out")
    packed, *_ = parts(data, tmp_path / "out", neat_packing=True)
    tokenizer = collator.tokenizer
    start, image, end, usual = tokenizer.convert_tokens_to_ids(
        ["<|quad_start|>", "<|box_start|>", "<|quad_end|>", "<|image_pad|>"]
    )
    assert model.config.image_token_id == image
    ids = rows[1]["input_ids"]
    at = ids.index(start)
    assert ids[at : at + 6] == [start, *[image] * 4, end]
    assert usual not in ids
    batch = collator([packed[0]])
    assert (batch["input_ids"] == image).sum() == len(batch["features"]) > 0
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


# Whole runs


def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(graft, data, tmp_path):
    values = {**ON, "max_steps": 6, "save_steps": 3, "lr_scheduler_type": "cosine", "neat_packing": True}
    values |= {"cutoff_len": 200, "per_device_train_batch_size": 1, "model": graft(*TRIPLES[0]), "data": data}
    train_here(recipe("full"), output=tmp_path / "whole", **values)
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "again/checkpoint-3")
    shutil.copy(tmp_path / "whole/packing.json", tmp_path / "again")
    train_here(recipe("full"), output=tmp_path / "again", **values)
    whole, again, half = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again", "again/checkpoint-3")
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(not torch.equal(whole[name], half[name]) for name in whole)  # the control
    assert losses(tmp_path / "again")[-3:] == losses(tmp_path / "whole")[-3:]


def test_a_launch_with_deepspeed_keeps_the_rates_of_the_parts(graft, data, tmp_path):
    """`llamafactory-cli train` as a user types it, ZeRO-2, packed, the checkpoint's own code."""
    zero2 = json.loads((REPOSITORY / "examples/deepspeed/ds_z2_config.json").read_text())
    write_json(tmp_path / "z2.json", {**zero2, "bf16": {"enabled": False}})
    base, out = graft(*TRIPLES[1]), tmp_path / "out"
    values = {"dataset": "mixed", "lr_scheduler_type": "constant", "neat_packing": "true", "cutoff_len": 400}
    torchrun = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"}  # which DeepSpeed asks for
    run = train(
        recipe("full"), model=base, output=out, data=data, variables=torchrun, ddp_backend="gloo",
        deepspeed=tmp_path / "z2.json", per_device_train_batch_size=1, **values,
    )  # fmt: skip
    assert "Learning rate of vision: 1e-06 for" in run.stdout
    assert moved(base, out) == pytest.approx(RATES, rel=0.05)


def test_data_check_counts_a_grafts_tokens(graft, data, tmp_path, capsys):
    """With its control: the real image processor for the first pictures, or the check stops."""
    for triple in (TRIPLES[0], PACKED[3]):
        folder = graft(*triple)
        config = record_sets.settings(data, folder, "mixed", trust_remote_code=True, bf16=False)
        file = record_sets.write_recipe(tmp_path / "recipe.yaml", config)
        assert record_sets.run("check", file) == 0
        rows, *_ = parts(data, folder, mask_history=True)
        assert f"{sum(map(len, rows['input_ids'])):,}" in capsys.readouterr().out


# What cannot be


@pytest.mark.parametrize(
    ("triple", "values", "message"),
    [
        (TRIPLES[0], {"vision_learning_rate": 1e-6}, "vision_learning_rate is 1e-06, and freeze_vision_tower: true"),
        (QWEN_MERGE, {"projector_learning_rate": 0.0}, "projector_learning_rate is 0.0; expected more than 0"),
        (TRIPLES[0], {"projector_learning_rate": 1e-5, "use_adam_mini": True}, "whose optimizer has groups of its own"),
        (TRIPLES[0], {"freeze_language_model": True}, "lora adapts the LLM, and freeze_language_model: true"),
        (TRIPLES[0], {"lora_target": "fc1,q_proj"}, "lora_target names fc1; the LLM's layers are down_proj"),
        (("siglip", "mlp", "qwen3_moe", "1d"), {"neat_packing": True}, "Qwen3-MoE takes no packed samples"),
    ],
)
def test_what_cannot_be_trained_is_said(graft, data, tmp_path, caplog, monkeypatch, triple, values, message):
    if "use_adam_mini" in values:  # its package is not in the lock
        monkeypatch.setattr("llamafactory.hparams.parser._check_extra_dependencies", lambda *_: None)
    values = {**ON, "projector_learning_rate": None, **values}
    with caplog.at_level("ERROR"), pytest.raises(SystemExit) as stop:
        train_here(recipe("lora"), model=graft(*triple), output=tmp_path / "out", data=data, **values)
    assert stop.value.code == 2
    assert message in caplog.text
    assert not list(tmp_path.glob("out/**/*.safetensors"))


@pytest.mark.parametrize("own", ["optimizer", "scheduler"])
def test_deepspeeds_own_optimizer_knows_one_rate(graft, caplog, own):
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model.model_utils.qwen_merge import prepare_training

    model = AutoModelForImageTextToText.from_pretrained(graft(*TRIPLES[0]), trust_remote_code=True)
    arguments = SimpleNamespace(torch_compile=False, hf_deepspeed_config=SimpleNamespace(config={own: {}}))
    prepare_training(model, arguments, [], finetuning_args=FinetuningArguments())  # the control: one rate is enough
    with caplog.at_level("ERROR"), pytest.raises(SystemExit):
        prepare_training(model, arguments, [], finetuning_args=FinetuningArguments(projector_learning_rate=1e-5))
    assert f"The DeepSpeed configuration has its own {own}, which" in caplog.text


@pytest.mark.parametrize("by_accelerate", [False, True])
def test_fsdp_is_refused_for_towers_of_pictures(graft, caplog, monkeypatch, by_accelerate):
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model.model_utils.qwen_merge import prepare_training

    arguments = SimpleNamespace(torch_compile=False, fsdp=[] if by_accelerate else ["full_shard"])
    if by_accelerate:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    load = partial(AutoModelForImageTextToText.from_pretrained, trust_remote_code=True)
    of_any_grid = load(graft("qwen2_5_vl", "mlp", "qwen3", "mrope"))
    prepare_training(of_any_grid, arguments, [], finetuning_args=FinetuningArguments())  # the control: one call for all
    of_pictures = load(graft("siglip", "mlp", "qwen3", "mrope"))
    with caplog.at_level("ERROR"), pytest.raises(SystemExit):
        prepare_training(of_pictures, arguments, [], finetuning_args=FinetuningArguments())
    assert "FSDP gathers weights call by call" in caplog.text
    assert "deepspeed: examples/deepspeed/ds_z2_config.json" in caplog.text


def test_a_wrong_trainable_set_stops_a_run_by_lora(graft, data, tmp_path, caplog, monkeypatch):
    """The control of the check itself: LLaMA-Factory as it comes, which leaves the projector frozen under LoRA."""
    monkeypatch.setattr("llamafactory.model.adapter.whole_modules", lambda model, arguments: None)
    with caplog.at_level("ERROR"), pytest.raises(SystemExit):
        train_here(recipe("lora"), model=graft(*TRIPLES[0]), output=tmp_path / "out", data=data, **ON)
    assert "projector is frozen, and the recipe says the opposite" in caplog.text
    monkeypatch.setattr("llamafactory.model.adapter.whole_modules", lambda model, arguments: ["embed_tokens"])
    caplog.clear()
    with caplog.at_level("ERROR"), pytest.raises(SystemExit):
        train_here(recipe("lora"), model=graft(*TRIPLES[0]), output=tmp_path / "out", data=data, **ON)
    assert "LLM trains beside its adapters, and additional_target does not say so" in caplog.text
