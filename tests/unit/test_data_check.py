"""`qwen-merge data check`: its counts are LLaMA-Factory's own, and all that would stop a run is named at once."""

import argparse
import copy
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_merge.data import check_recipe, check_rows, check_sets
from qwen_merge.data.check import check, units_of
from qwen_merge.data.check_steps import map_batches, steps
from qwen_merge.data.check_summary import Histogram, Summary
from qwen_merge.data.schema import SCHEMA, Record
from qwen_merge.data.show import look_at
from qwen_merge.errors import UserError
from record_sets import enlist, picture, records, run, settings, turns, write_recipe, write_set


@pytest.fixture(scope="module")
def model(tied) -> Path:
    return tied.merged


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two sets of sound rows, one of them in three shards."""
    folder = tmp_path_factory.mktemp("data")
    write_set(folder, "first", records(41), shards=3)
    write_set(folder, "second", records(17, seed=1))
    return folder


def trained_on(config: dict) -> list[dict]:
    """The samples that LLaMA-Factory itself makes of a recipe, by the function its training calls."""
    from llamafactory.data import get_dataset

    arguments, problems = check_recipe.parse(config)
    assert arguments is not None
    assert not problems
    tokenizer, processor, template = check_recipe.load(arguments)
    module = get_dataset(
        template, arguments.model, arguments.data, arguments.training, "sft", tokenizer=tokenizer, processor=processor
    )
    return list(module["train_dataset"].select_columns(["input_ids", "labels"]))


STAGES = {
    "stage 1 and 2": {"template": "qwen_merge_vl_pt", "mask_history": False},
    "stage 3": {},
    "small pictures": {"image_max_pixels": 10000},
    "without thoughts": {"enable_thinking": False},
    "loss on the question": {"mask_history": False, "train_on_prompt": True},
    "first rows only": {"max_samples": 12},
}


@pytest.mark.parametrize("stage", STAGES)
def test_token_counts_are_llama_factorys_own(stage, data, model):
    config = settings(data, model, "first,second", **STAGES[stage])
    samples = trained_on(config)
    result = check(config)
    assert result.problems == []
    assert sum(each.samples for each in result.sets) == len(samples)
    assert sum(each.tokens for each in result.sets) == sum(len(sample["input_ids"]) for sample in samples)
    with_loss = sum(sum(label != -100 for label in sample["labels"]) for sample in samples)
    assert sum(each.summary.trained for each in result.sets) == with_loss
    # Control: the totals above can tell other settings apart.
    other = check({**config, "image_max_pixels": 131072})
    if stage != "small pictures":
        assert other.sets[0].tokens != result.sets[0].tokens


@pytest.mark.parametrize("mask_history", [True, False])
def test_each_row_has_llama_factorys_length_also_when_it_is_cut(mask_history, data, model):
    config = settings(data, model, "first", cutoff_len=150, mask_history=mask_history)
    samples = trained_on(config)
    unit = {"recipe": config, "count": True, "attributes": vars(attributes(data, "first"))}
    reader = check_rows.reader_of(unit)
    rows = []
    for shard in sorted((data / "first").iterdir()):
        rows += [reader.measure(row) for _, row in check_rows.rows_of(str(shard), ["messages", "images"], [0])]
    assert [row.tokens for row in rows] == [len(sample["input_ids"]) for sample in samples]
    assert [row.trained for row in rows] == [sum(label != -100 for label in sample["labels"]) for sample in samples]
    whole = [len(sample["input_ids"]) for sample in trained_on({**config, "cutoff_len": 8096})]
    assert [row.full for row in rows] == whole
    assert any(length > 150 for length in whole)
    assert any(length <= 150 for length in whole)
    (checked,) = check(config).sets
    assert checked.summary.over == sum(length > 150 for length in whole)


def attributes(folder: Path, name: str):
    from llamafactory.data.parser import get_dataset_list

    return get_dataset_list([name], str(folder))[0]


def test_the_control_of_picture_tokens_would_see_a_difference(data, model):
    """Every process compares its first pictures with the real image processor."""
    config = settings(data, model, "first")
    arguments, _ = check_recipe.parse(config)
    encoder = check_rows.Encoder(arguments)
    reader = check_rows.Reader(attributes(data, "first"), arguments, encoder)
    _, row = next(check_rows.rows_of(str(data / "first/part-00000-000.parquet"), ["messages", "images"], [0]))
    assert reader.measure(row).problems == []
    assert encoder.controls == check_rows.CONTROLS - 1
    encoder.grids.real = copy.copy(encoder.grids.real)
    encoder.grids.real.size = {"shortest_edge": 28 * 28 * 50, "longest_edge": 28 * 28 * 60}
    with pytest.raises(RuntimeError, match="differs from the image processor"):
        reader.measure(row)


def test_packing_is_counted_as_llama_factory_packs(data, model):
    config = settings(data, model, "first,second", packing=True, cutoff_len=1400, template="qwen2_vl")
    result = check(config)
    assert result.steps is not None
    packed = len(trained_on(config))
    assert result.steps.samples == packed
    assert packed < 41 + 17


@pytest.mark.parametrize("name", ["packing", "neat_packing"])
def test_planned_packing_is_counted_as_the_overlay_plans(data, model, name):
    from llamafactory.data import get_dataset

    config = settings(data, model, "first,second", **{name: True}, cutoff_len=1400)
    arguments, _ = check_recipe.parse(config)
    tokenizer, processor, template = check_recipe.load(arguments)
    parts = (arguments.model, arguments.data, arguments.training)
    module = get_dataset(template, *parts, "sft", tokenizer=tokenizer, processor=processor)
    assert check(config, world_size=1).steps.samples == len(module["train_dataset"])


def test_steps_are_the_trainers():
    """By hand: 23 samples, 2 a batch, 3 processes: 12 batches, 4 each; 2 accumulated: 2 steps; 1.2 epochs: 3."""
    assert vars(steps(23, 2, 2, 3, 1.2)) == {
        "samples": 23, "global_batch": 12, "per_epoch": 2, "total": 3, "epochs": 1.2,
    }  # fmt: skip
    assert steps(23, 2, 3, 3, 1.0).per_epoch == 2  # the rest of an accumulation is a step
    assert steps(24, 2, 2, 3, 1.0).per_epoch == 2
    assert steps(25, 2, 2, 3, 1.0).per_epoch == 3  # one sample more is a batch more for every process
    assert steps(1, 8, 8, 64, 5.0).total == 5
    cut = steps(1000, 8, 8, 8, 5.0, max_steps=7)
    assert (cut.per_epoch, cut.total, cut.epochs) == (2, 7, 3.5)


@pytest.mark.parametrize(("rows", "workers", "batch"), [(10, 3, 2), (2, 16, 8), (58, 4, 8), (5, None, 2)])
def test_batches_are_those_in_which_datasets_maps(rows, workers, batch):
    from datasets import Dataset

    whole = Dataset.from_dict({"row": range(rows)})
    shards = min(workers or 1, rows)  # as Dataset.map does
    expected = []
    for index in range(shards):
        shard = whole.shard(shards, index, contiguous=True)
        expected += [len(part["row"]) for part in shard.iter(batch)]
    assert map_batches(rows, workers, batch) == expected


@pytest.mark.parametrize(("samples", "batch", "accumulation", "processes"), [
    (23, 2, 2, 3), (24, 2, 2, 3), (25, 2, 2, 3), (7, 8, 4, 2), (100, 3, 4, 5), (1, 1, 1, 8),
])  # fmt: skip
def test_steps_equal_accelerates_sharded_loader_and_transformers_arithmetic(samples, batch, accumulation, processes):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler
    from transformers import Trainer

    batches = BatchSampler(SequentialSampler(range(samples)), batch, drop_last=False)
    lengths = {len(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)}
    assert len(lengths) == 1

    class Loader:
        dataset = range(samples)

        def __len__(self):
            return next(iter(lengths))

    values = argparse.Namespace(max_steps=-1, gradient_accumulation_steps=accumulation, num_train_epochs=1.2)
    trainer = Trainer.__new__(Trainer)  # the method uses nothing of the trainer but num_examples
    _, per_epoch, _, _, _, _, total = trainer.set_initial_training_values(values, Loader(), 0)
    ours = steps(samples, batch, accumulation, processes, 1.2)
    assert (ours.per_epoch, ours.total) == (per_epoch, total)


# What is wrong with a set


def break_rows(folder: Path) -> None:
    """A set with every kind of broken row, beside two sound ones."""
    sound = picture(64, 48)
    rows = [
        Record(turns("<image>What?", "This."), [sound]),
        Record(turns("<image>What?", "This."), []),
        Record(turns("What?", "This."), [sound]),
        Record(turns("<image>What?", "This."), [sound[:-300]]),
        Record(turns("<image>What?", "This."), [b"no picture"]),
        Record(list(reversed(turns("<image>What?", "This."))), [sound]),
        Record(turns("<image>What?", "This.", "And?"), [sound]),
        Record([], []),
        Record([{"role": "system", "content": "Be brief."}, *turns("<image>What?", "This.")], [sound]),
        Record([{"role": "user", "content": None}, {"role": "assistant", "content": "This."}], []),
        Record(turns("<video>What?", "This."), []),
        Record(turns("<image>What is <|image_pad|>?", "This."), [sound]),
        Record(turns("What?", "This."), []),
    ]
    texts = [[{"role": m["role"], "content": m["content"]} for m in row.messages] for row in rows]
    images = [[{"bytes": data, "path": None} for data in row.images] for row in rows]
    place = folder / "broken"
    place.mkdir(parents=True)
    pq.write_table(pa.table({"messages": texts, "images": images}, schema=SCHEMA), place / "part-00000-000.parquet")
    enlist(folder, "broken")


def test_every_kind_of_broken_row_is_counted_with_its_place(tmp_path, model):
    break_rows(tmp_path)
    result = check(settings(tmp_path, model, "broken"))
    (checked,) = result.sets
    left_out = {reason: entry["rows"] for reason, entry in checked.summary.rows.drops.items()}
    assert left_out == {check_rows.NOT_ALTERNATING: 2, check_rows.ODD: 1, check_rows.NO_TURNS: 1}
    stops = {reason: entry["rows"] for reason, entry in checked.summary.stops.drops.items()}
    assert stops == {
        check_rows.TAGS: 2, check_rows.UNDECODABLE: 2, check_rows.NO_TEXT: 1, check_rows.OTHER_MEDIA: 1,
        check_rows.PICTURE_TOKEN: 1,
    }  # fmt: skip
    assert (checked.summary.rows.rows_in, checked.summary.rows.rows_out) == (13, 9)
    text = "\n".join(result.problems)
    assert len(result.problems) == 8
    assert "broken: LLaMA-Factory would leave out 2 rows: roles do not alternate" in text
    assert "part-00000-000.parquet row 5: assistant user; part-00000-000.parquet row 8: system user assistant" in text
    assert "row 1: 1 tags, 0 pictures; part-00000-000.parquet row 2: 0 tags, 1 pictures" in text


@pytest.mark.parametrize(("kept", "stops"), [
    ([0, 12], False), ([1, 12], True), ([2, 12], True), ([3, 12], True), ([4, 12], True), ([5, 12], False),
    ([6, 12], False), ([7, 12], False), ([8, 12], False), ([9, 12], True), ([10, 12], True),
])  # fmt: skip
def test_llama_factory_stops_at_exactly_the_rows_that_are_said_to_stop_it(kept, stops, tmp_path, model):
    """A control of the two groups of problems: LLaMA-Factory itself is run on each row beside a sound one."""
    break_rows(tmp_path)
    file = tmp_path / "broken/part-00000-000.parquet"
    pq.write_table(pq.read_table(file).take(kept), file)
    config = settings(tmp_path, model, "broken")
    result = check(config)
    assert any("training stops at" in problem for problem in result.problems) == stops
    if stops:
        with pytest.raises(Exception, match=r".") as error:
            trained_on(config)
        assert not isinstance(error.value, AssertionError)
    else:
        assert len(trained_on(config)) == result.sets[0].samples


def test_a_picture_that_cutoff_len_cuts_away_is_found(tmp_path, model):
    """With mask_history the first turns go first, and the picture with them."""
    long = turns("<image>What is it?", "A circle.", "Why? " * 40, "So. " * 40)
    write_set(tmp_path, "long", [Record(long, [picture(112, 112)]), Record(turns("A", "B"), [])])
    config = settings(tmp_path, model, "long", cutoff_len=120)
    (problem,) = check(config).problems
    assert "training stops at 1 row: cutoff_len cuts a picture away" in problem
    assert "part-00000-000.parquet row 0: 0 of its 16 tokens are left" in problem
    assert check({**config, "mask_history": False}).problems == []  # control: the last turn is cut instead


def test_all_problems_of_recipe_sets_and_rows_are_named_at_once(tmp_path, model, capsys):
    break_rows(tmp_path)
    write_set(tmp_path, "twins", records(4))
    shutil.copy(tmp_path / "twins/part-00000-000.parquet", tmp_path / "twins/part-00000-001.parquet")
    write_set(tmp_path, "second_type", records(2))
    (tmp_path / "second_type/notes.json").write_text("{}")
    write_set(tmp_path, "cut_short", records(2))
    file = tmp_path / "cut_short/part-00000-000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    write_set(tmp_path, "other_columns", records(2))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other_columns/part-00000-000.parquet")
    for name in ("absent", "synthdog_en", "image_thinking"):
        enlist(tmp_path, name)
    (tmp_path / "empty").mkdir()
    enlist(tmp_path, "empty")
    names = "broken,twins,second_type,cut_short,other_columns,absent,synthdog_en,image_thinking,empty,twin,twins"
    recipe = write_recipe(
        tmp_path / "stage.yaml",
        settings(tmp_path, tmp_path / "untrained", names, template="qwen_merge_v", freeze_vision_towr=True)
        | {"deepspeed": "nowhere/ds_z3.json"},
    )
    with pytest.raises(UserError) as error:
        run("check", recipe, "--json", tmp_path / "figures.json")
    text = str(error.value)
    for said in (
        "freeze_vision_towr is no key of LLaMA-Factory; did you mean freeze_vision_tower?",
        "deepspeed: nowhere/ds_z3.json is not a file",
        "template qwen_merge_v is unknown",
        "--model",
        "twin is not in",
        "did you mean twins?",
        "twins is named twice",
        "twins: 1 shards are not those of twins.manifest.json; part-00000-001.parquet has 4 rows in",
        "second_type: ",
        "also holds notes.json",
        "cut_short: part-00000-000.parquet is not readable parquet",
        "other_columns: part-00000-000.parquet has the columns text; dataset_info.json says messages, images too",
        "absent does not exist. Check file_name",
        "synthdog_en does not exist. Make the set with `qwen-merge data convert synthdog_en`.",
        "image_thinking does not exist. Make the set with `qwen-merge data image-thinking judge`.",
        "empty is empty",
        "broken: training stops at 2 rows: a picture does not decode",
    ):
        assert said in text, said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["sets"]["twins"]["rows"] == 8
    assert figures["sets"]["twins"]["tokens"] is None  # no tokenizer: everything else is counted all the same
    assert figures["sets"]["twins"]["read"]["rows"]["rows_out"] == 8
    assert figures["problems"]
    assert "8 sets" not in capsys.readouterr().out


def test_a_sound_stage_prints_its_figures(data, model, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "stage.yaml", settings(data, tmp_path / "untrained", "first,second"))
    assert run("check", recipe, "num_train_epochs=2", "--model", model, "--world-size", 4) == 0
    out = capsys.readouterr().out
    total = sum(len(sample["input_ids"]) for sample in trained_on(settings(data, model, "first,second")))
    assert f"epoch   {total:,} tokens" in out
    assert "batch   2 x 2 accumulated x 4 GPUs = 16 samples a step" in out
    assert "steps   4 an epoch of 58 samples, 8 in 2 epochs" in out
    assert "no problem found" in out


def test_workers_and_samples(data, model):
    config = settings(data, model, "first,second")
    alone, two = check(config, workers=1), check(config, workers=2)
    assert [each.summary for each in two.sets] == [each.summary for each in alone.sets]
    some = check(config, sample=10, seed=3)
    assert [each.summary.rows.rows_in for each in some.sets] == [10, 10]
    assert [each.samples for each in some.sets] == [41, 17]
    assert [each.tokens for each in some.sets] == [
        round(each.summary.tokens.total * each.used / 10) for each in some.sets
    ]
    again, other = check(config, sample=10, seed=3), check(config, sample=10, seed=4)
    assert again.sets[0].summary == some.sets[0].summary
    assert other.sets[0].summary != some.sets[0].summary
    wanted = [row for unit in units_of(some.sets[0], 10, 3) for row in unit["wanted"]]
    assert len(wanted) == 10
    assert max(wanted) < 14  # numbers in a shard's file


def test_what_is_no_recipe(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [")
    for path, said in (("absent.yaml", "cannot be read"), ("list.yaml", "holds list"), ("broken.yaml", "is not YAML")):
        with pytest.raises(UserError, match=said):
            check_recipe.read(tmp_path / path)
    (tmp_path / "sound.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match="expected key=value"):
        check_recipe.read(tmp_path / "sound.yaml", ["cutoff_len"])
    for override in ("cutoff_len=[1", "a=${b", "a={"):
        with pytest.raises(UserError, match=r"a value is not YAML .*; expected key=value"):
            check_recipe.read(tmp_path / "sound.yaml", [override])
    (tmp_path / "half.yaml").write_text("a: ${b\n")
    with pytest.raises(UserError, match=r"half\.yaml cannot be read as LLaMA-Factory reads it"):
        check_recipe.read(tmp_path / "half.yaml")
    assert check_recipe.read(tmp_path / "sound.yaml", ["a=2", "b.c=x"]) == {"a": 2, "b": {"c": "x"}}


ENTRIES: dict[str, tuple[object, str]] = {
    "nothing": ({}, "it has no file_name"),
    "text": ("x", "it is 'x'; expected an object"),
    "null": (None, "it is None; expected an object"),
    "list": ([], "it is []; expected an object"),
    "number": ({"file_name": 3}, "its place is [3]; expected a text"),
    "columns": ({"file_name": "f", "columns": []}, "columns is []; expected an object of texts"),
    "a column": ({"file_name": "f", "columns": {"messages": 5}}, "columns is {'messages': 5}; expected"),
    "tags": ({"file_name": "f", "tags": 3}, "tags is 3; expected an object of texts"),
    "form": ({"file_name": "f", "formatting": "share"}, "formatting is 'share'; expected sharegpt"),
    "rows": ({"file_name": "f", "num_samples": "9"}, "num_samples is '9'; expected a number"),
}


def test_entries_of_dataset_info_that_are_none_are_named_together(tmp_path):
    """Control: a sound set among them is found all the same."""
    write_set(tmp_path, "sound", records(2))
    path = tmp_path / "dataset_info.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), **{name: entry for name, (entry, _) in ENTRIES.items()}})
    )
    found, problems = check_sets.find_sets(["sound", *ENTRIES], str(tmp_path))
    assert problems == []
    assert found[0].problems == []
    assert found[0].rows == 2
    for files, (name, (_, said)) in zip(found[1:], ENTRIES.items(), strict=True):
        (problem,) = files.problems
        assert problem.startswith(f"{name}: its entry in {path} cannot be used: {said}")
        assert files.shards == []
        with pytest.raises(UserError, match="cannot be shown"):
            look_at(name, dataset_dir=tmp_path)


def test_where_the_figures_go_is_looked_at_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(check_recipe, "read", lambda *_: pytest.fail("the recipe was read"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file/figures.json"):
        with pytest.raises(UserError, match=r"is a folder; expected|cannot be written: "):
            run("check", tmp_path / "stage.yaml", "--json", path)
    with pytest.raises(pytest.fail.Exception):
        run("check", tmp_path / "stage.yaml", "--json", tmp_path / "new/figures.json")


def test_the_kits_own_recipes_parse_and_name_their_missing_sets(monkeypatch, model):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    for path in sorted((root / "examples/train_qwen_merge").glob("*_4B_*.yaml")):
        config = check_recipe.read(path, [f"dataset_dir={root / 'data'}"], str(model))
        arguments, problems = check_recipe.parse(config)
        assert problems == []
        assert arguments.data.dataset == config["dataset"].replace(" ", "").split(",")


def test_the_environment_is_left_as_it_was(data, model, monkeypatch):
    """transformers leaves ACCELERATE_MIXED_PRECISION=bf16 behind, and the next launch trains in it."""
    check_recipe.require_llamafactory()
    from llamafactory.hparams import parser

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    before, plain, seen = dict(os.environ), parser._parse_train_args, []

    def parse(config):
        parsed = plain(config)
        seen.append(os.environ.get("ACCELERATE_MIXED_PRECISION"))  # the control: it was there
        return parsed

    monkeypatch.setattr(parser, "_parse_train_args", parse)
    arguments, problems = check_recipe.parse(settings(data, model, "1", bf16=True))
    assert arguments is not None, problems
    assert seen == ["bf16"]
    assert dict(os.environ) == before


def test_feature_metadata_is_noted(tmp_path, model):
    """With it LLaMA-Factory's loader decodes and re-encodes the pictures. Control: our own shards have none."""
    from datasets import Dataset, Features, Image, Sequence, Value

    features = Features(
        {"messages": [{"role": Value("string"), "content": Value("string")}], "images": Sequence(Image())}
    )
    row = {"messages": turns("<image>What?", "This."), "images": [{"bytes": picture(64, 48), "path": None}]}
    (tmp_path / "marked").mkdir()
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "marked/part.parquet")
    enlist(tmp_path, "marked")
    write_set(tmp_path, "plain", records(3))
    result = check(settings(tmp_path, model, "marked,plain"))
    assert [note.split(":")[0] for note in result.notes if "feature metadata" in note] == ["marked"]
    assert [note.split(":")[0] for note in result.notes if "no manifest" in note] == ["marked"]


def test_histograms_add_up():
    draw = random.Random(0)
    values = [draw.randrange(0, 5000) for _ in range(2000)]
    whole, parts = Histogram(), [Histogram(), Histogram()]
    for index, value in enumerate(values):
        whole.add(value)
        parts[index % 2].add(value)
    parts[0].merge(Histogram.from_json(json.loads(json.dumps(parts[1].to_json()))))
    assert parts[0] == whole
    assert (whole.least, whole.most, whole.total) == (min(values), max(values), sum(values))
    assert whole.quantile(0.5) == pytest.approx(sorted(values)[1000], rel=0.1)
    assert Histogram().quantile(0.5) is None
    summary = Summary()
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
