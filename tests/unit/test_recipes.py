"""The recipes say what the published runs did, and LLaMA-Factory understands every word of them.

    .venv/bin/python -m pytest tests/unit/test_recipes.py

A YAML that reaches LLaMA-Factory is turned into its argument classes without any check of types, so two ways are
walked: `parse_dict`, which is what a run does and refuses unknown keys, and the command-line parser, which knows each
key's type. `use_cpu` is added and DeepSpeed taken out, as a user without a GPU does: bf16 is refused without one, and
DeepSpeed wants a process group. Its files are tested against its own configuration class instead.
"""

import copy
import json
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from qwen_merge.data.sets import ONEVISION, configurations, dataset_name

ROOT = Path(__file__).resolve().parents[2]
# Other YAML of the examples says what is joined (graft_4b.yaml) or where sets are.
RECIPES = [
    path for path in sorted((ROOT / "examples").rglob("*.yaml")) if "stage: " in path.read_text(encoding="utf-8")
]
CUSTOM = ROOT / "examples/custom_vision"  # on sets of the user's own
STAGES = ("1", "2.1", "2.2", "3")
CAPTIONS = ["LLaVA_ReCap_558K", "LLaVA_ReCap_CC12M", "LLaVA_ReCap_CC3M", "synthdog_zh", "synthdog_en"]
REASONING = ["text2image", "image_thinking"]

GENERAL = [dataset_name(config) for config in configurations(ONEVISION)]

COMMON = {
    "stage": "sft",
    "finetuning_type": "full",
    "deepspeed": "examples/deepspeed/ds_z3_config.json",
    "bf16": True,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "cutoff_len": 8096,
    "image_max_pixels": 262144,
    "video_max_pixels": 16384,
    "freeze_vision_tower": True,
    "freeze_multi_modal_projector": False,
    "logging_steps": 1,
    "save_steps": 200,
    "save_strategy": "steps",
    "save_total_limit": 10,
    "save_only_model": False,
    "plot_loss": True,
    "report_to": "wandb",
    "do_train": True,
    "dataset_dir": "data",
    "seed": 42,
    "overwrite_output_dir": False,
    "overwrite_cache": False,
}
# freeze_language_model, datasets, template, learning rate, per-device batch, accumulation, epochs
PUBLISHED = {
    "1": (True, CAPTIONS[:1], "qwen_merge_vl_pt", 5e-4, 8, 4, 5.0),
    "2.1": (False, CAPTIONS, "qwen_merge_vl_pt", 5e-5, 8, 8, 1.2),
    "2.2": (False, GENERAL, "qwen_merge_vl_pt", 5e-5, 8, 8, 1.2),
    "3": (False, REASONING, "qwen_merge_vl", 5e-5, 4, 4, 1.2),
}


def recipe_path(size: str, stage: str) -> Path:
    return ROOT / f"examples/train_qwen_merge/train_qwen_merge_vl_{size}_stage{stage}.yaml"


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def names(dataset: str) -> list[str]:
    return [name.strip() for name in dataset.split(",")]


def without_gpu(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "deepspeed"} | {"use_cpu": True}


@pytest.fixture(scope="module")
def factory():
    """LLaMA-Factory's parser module, silent; its import takes 15 seconds, so only this file's tests pay for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMAFACTORY_VERBOSITY", "ERROR")
        patch.delenv("ALLOW_EXTRA_ARGS", raising=False)
        from llamafactory.hparams import parser

        yield parser


def check_types(factory, config: dict) -> None:
    """Each value must read back as itself through a parser that knows its type."""
    parser = factory.HfArgumentParser(factory._TRAIN_ARGS)
    arguments = [text for key, value in config.items() for text in (f"--{key}", str(value))]
    parsed = {}
    for part in parser.parse_args_into_dataclasses(args=arguments):
        parsed.update(vars(part))
    for key, value in config.items():
        got = parsed[key].value if isinstance(parsed[key], Enum) else parsed[key]
        expected = names(value) if isinstance(got, list) else value
        if key == "cutoff_len" and config.get("neat_packing"):
            expected -= 1  # LLaMA-Factory takes one off for its own packs
        assert got == expected, f"{key}: {value!r} is read as {got!r}"


def test_every_recipe_of_the_published_runs_is_there():
    expected = {recipe_path(size, stage) for size in ("4B", "8B") for stage in STAGES}
    assert expected <= set(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_llamafactory_accepts_the_recipe(factory, path):
    config = without_gpu(read(path))
    factory._parse_train_args(copy.deepcopy(config))
    check_types(factory, config)
    if path != CUSTOM / "baseline.yaml":  # for another LLaMA-Factory, which refuses its stack's DeepSpeed
        assert (ROOT / read(path)["deepspeed"]).is_file()


@pytest.mark.parametrize("size", ["4B", "8B"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_fast_recipe_is_the_plain_one_packed(size, stage):
    plain = read(recipe_path(size, stage))
    path = recipe_path(size, stage)
    fast = read(path.with_name(f"{path.stem}_fast.yaml"))
    changed = {key for key in plain.keys() | fast.keys() if plain.get(key) != fast.get(key)}
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert changed == batch | {"neat_packing", "torch_compile", "optim", "deepspeed"}


# seed 003: projector 1e-5 to 2e-5, LoRA 2e-5 to 1e-6, the tower 1e-6; 576*28*28 and 16*28*28 pixels
def test_the_custom_encoder_recipes_are_the_seed_s():
    found = {path.stem: read(path) for path in RECIPES if path.parent == CUSTOM}
    assert set(found) == {"baseline", "one_stage", "stage1", "stage2", "encoder"}
    for name, config in found.items():
        by_lora = config["finetuning_type"] == "lora"
        assert by_lora == (name != "stage1") == (not config["freeze_language_model"])
        assert config["freeze_vision_tower"] == (name != "encoder")
        assert not config["freeze_multi_modal_projector"]
        assert (config["image_max_pixels"], config["image_min_pixels"]) == (576 * 28 * 28, 16 * 28 * 28)
        if by_lora:
            assert (config["lora_rank"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.0)
            assert 1e-6 <= config["learning_rate"] <= 2e-5
        if name not in ("baseline", "stage1"):
            assert 1e-5 <= config["projector_learning_rate"] <= 2e-5
    assert found["baseline"]["additional_target"] == "visual.merger"
    assert all(config["mask_history"] is True for config in found.values())  # one objective: --turns each
    assert found["encoder"]["vision_learning_rate"] == 1e-6
    assert found["stage2"]["projector_learning_rate"] < found["stage1"]["learning_rate"] <= 2e-5
    assert found["stage2"]["model_name_or_path"] == found["stage1"]["output_dir"]


@pytest.mark.parametrize("size", ["4B", "8B"])
def test_the_custom_encoder_grafts_are_the_seed_s(size):
    from qwen_merge.graft.recipe import read as read_graft

    recipe = read_graft(CUSTOM / f"graft_{size.lower()}.yaml")
    assert (recipe.vision.source, recipe.llm.source) == ("microsoft/rad-dino", f"Qwen/Qwen3-VL-{size}-Instruct")
    assert recipe.projector == {"kind": "linear"}
    first = {"one_stage", "stage1"}
    for path in RECIPES:
        if path.parent == CUSTOM and path.stem in first:
            assert read(path)["model_name_or_path"].replace("4b", size.lower()) == str(recipe.output)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_opening_comment_is_about_this_recipe(path):
    header = path.read_text(encoding="utf-8").split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in header.splitlines())
    # The paths a recipe names, so that a copied header does not send a user to another run.
    assert f"llamafactory-cli train {path.relative_to(ROOT)}" in header
    assert f" {read(path)['model_name_or_path']} " in header
    for word in ("NNODES=2", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "FORCE_TORCHRUN=1", "report_to=", "estimate"):
        assert word in header


def test_control_a_misspelt_key_is_refused(factory):
    config = without_gpu(read(recipe_path("4B", "1")))
    config["freeze_vision_towr"] = config.pop("freeze_vision_tower")
    with pytest.raises(ValueError, match="freeze_vision_towr"):
        factory._parse_train_args(config)


def test_control_a_value_of_another_type_is_refused(factory):
    config = without_gpu(read(recipe_path("4B", "1")))
    # YAML reads 5e-4, without a dot, as text.
    with pytest.raises(AssertionError, match="learning_rate: '5e-4'"):
        check_types(factory, config | yaml.safe_load("learning_rate: 5e-4"))
    with pytest.raises(SystemExit):
        check_types(factory, config | {"plot_loss": "maybe"})
    with pytest.raises(SystemExit):
        check_types(factory, config | {"finetuning_type": "ful"})


@pytest.mark.parametrize("size", ["4B", "8B"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_hyper_parameters_are_the_published_ones(size, stage):
    config = read(recipe_path(size, stage))
    frozen, datasets, template, rate, batch, accumulation, epochs = PUBLISHED[stage]
    previous = {"1": f"Qwen-Merge-VL-{size}-base"}
    previous |= {b: f"outputs/Qwen-Merge-VL-{size}-stage{a}" for a, b in pairwise(STAGES)}
    expected = COMMON | {
        "model_name_or_path": previous[stage],
        "output_dir": f"outputs/Qwen-Merge-VL-{size}-stage{stage}",
        "run_name": f"Qwen-Merge-VL-{size}-stage{stage}",
        "freeze_language_model": frozen,
        "template": template,
        "learning_rate": rate,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs,
    }
    assert {key: config.get(key) for key in expected} == expected
    assert names(config["dataset"]) == datasets
    # What shapes a run and is not in the table must not come in unseen.
    rest = {"dataset", "ddp_timeout", "preprocessing_batch_size", "preprocessing_num_workers", "dataloader_num_workers"}
    rest |= {"mask_history"} if stage == "3" else set()  # tests/unit/test_training_and_inference.py says why
    assert set(config) - set(expected) == rest


def test_4b_and_8b_differ_in_names_only():
    for stage in STAGES:
        small = recipe_path("4B", stage).read_text(encoding="utf-8").split("### model")[1]
        large = recipe_path("8B", stage).read_text(encoding="utf-8").split("### model")[1]
        assert small.replace("4B", "8B") == large


def test_a_relaunch_resumes_and_never_starts_over(factory, tmp_path, monkeypatch):
    """The newest checkpoint is found by number. Control: with overwrite_output_dir the run would start anew."""
    from transformers import TrainingArguments
    from transformers.training_args import ParallelMode

    # Only the question whether torchrun started this process; nothing is trained.
    monkeypatch.setattr(TrainingArguments, "parallel_mode", property(lambda self: ParallelMode.DISTRIBUTED))
    config = without_gpu(read(recipe_path("4B", "2.1"))) | {"output_dir": str(tmp_path / "run")}
    parse = lambda **more: factory.get_train_args(copy.deepcopy(config) | more)[2].resume_from_checkpoint  # noqa: E731
    assert parse() is None
    for step in (200, 1000, 800):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    assert parse() == str(tmp_path / "run" / "checkpoint-1000")
    assert parse(overwrite_output_dir=True) is None
    # What scripts/train.sh makes of a checkpoint that was cut short is not found.
    (tmp_path / "run" / "checkpoint-1000").rename(tmp_path / "run" / "incomplete-checkpoint-1000.1700000000")
    assert parse() == str(tmp_path / "run" / "checkpoint-800")


# DeepSpeed


def zero_config(stage: int) -> dict:
    return json.loads((ROOT / f"examples/deepspeed/ds_z{stage}_config.json").read_text())


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_its_values_from_the_recipe(factory, stage):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = without_gpu(read(recipe_path("4B", "2.1")))
    arguments = factory._parse_train_args(config)[2]
    filled = HfTrainerDeepSpeedConfig(zero_config(stage))
    filled.trainer_config_process(arguments)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=2560))
    filled.trainer_config_finalize(arguments, model, num_training_steps=1000)
    assert "auto" not in json.dumps(filled.config)
    assert filled.config["train_micro_batch_size_per_gpu"] == 8
    assert filled.config["gradient_accumulation_steps"] == 8
    assert filled.config["bf16"]["enabled"] is True
    assert filled.config["fp16"]["enabled"] is False
    assert DeepSpeedZeroConfig(**filled.config["zero_optimization"]).stage == stage
    # As in LLaMA-Factory's own files: with it, losses of 0 were reported (LLaMA-Factory#6966, LLaVA#1231).
    assert filled.config["zero_optimization"]["overlap_comm"] is False
    if stage == 3:
        # Without it the trained model is saved as shards that only DeepSpeed reads.
        assert filled.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_control_deepspeed_refuses_an_unknown_key():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    with pytest.raises(ValueError, match="overlap_com"):
        DeepSpeedZeroConfig(stage=2, overlap_com=False)


# dataset_info.json


def dataset_info() -> dict:
    return json.loads((ROOT / "data/dataset_info.json").read_text(encoding="utf-8"))


def test_the_recipes_and_dataset_info_name_the_same_sets():
    used = {name for path in RECIPES if path.parent != CUSTOM for name in names(read(path)["dataset"])}
    assert used == set(dataset_info())
    assert used == {*CAPTIONS, *GENERAL, *REASONING}
    assert len(used) == 5 + 84 + 2


def test_onevision_configurations_become_the_listed_names():
    assert dataset_name("CLEVR-Math(MathV360K)") == "CLEVR_Math_MathV360K"
    assert dataset_name("GeoQA+(MathV360K)") == "GeoQA+_MathV360K"
    assert dataset_name("ai2d(cauldron,llava_format)") == "ai2d_cauldron_llava_format"
    assert names(read(recipe_path("4B", "2.2"))["dataset"]) == GENERAL


def test_dataset_info_holds_the_record_format():
    for name, entry in dataset_info().items():
        assert entry == {
            "file_name": f"llavaonevision_converted/{name}" if name in GENERAL else name,
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        }


def test_a_set_is_a_folder_of_parquet_shards(factory, tmp_path):
    """Loaded by LLaMA-Factory's own loader. Control: any other file in the folder stops it."""
    from datasets import Dataset, Features, Image, Sequence, Value
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list

    features = Features(
        {"messages": [{"role": Value("string"), "content": Value("string")}], "images": Sequence(Image())}
    )
    folder = tmp_path / "data/llavaonevision_converted/geo3k"
    folder.mkdir(parents=True)
    for shard in range(2):
        turns = [
            {"role": "user", "content": f"<image>\nquestion {shard}"},
            {"role": "assistant", "content": f"answer {shard}"},
        ]
        rows = Dataset.from_list([{"messages": turns, "images": []}], features=features)
        rows.to_parquet(folder / f"{shard:05d}.parquet")
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(dataset_info()))

    config = {"model_name_or_path": "none", "cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "run")}
    config |= {"dataset_dir": str(tmp_path / "data"), "use_cpu": True, "report_to": "none"}
    model_args, data_args, training_args, *_ = factory._parse_train_args(config)
    (attributes,) = get_dataset_list(["geo3k"], data_args.dataset_dir)
    loaded = _load_single_dataset(attributes, model_args, data_args, training_args)
    turns = sorted((row["_prompt"][0]["content"], row["_response"][0]["content"]) for row in loaded)
    assert turns == [("<image>\nquestion 0", "answer 0"), ("<image>\nquestion 1", "answer 1")]

    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="File types should be identical"):
        _load_single_dataset(attributes, model_args, data_args, training_args)
