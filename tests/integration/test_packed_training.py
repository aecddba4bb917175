"""Packing through LLaMA-Factory: the steps of an unpacked run, exact to resume, complete over ranks and in streams."""

import json
import os
import signal
import subprocess
import time
from argparse import Namespace
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, DataLoader

from qwen_merge.data import check_recipe
from qwen_merge.data.schema import Record
from record_sets import enlist, parted_rows, picture, records, settings, turns, write_set
from training import REPOSITORY, command, environment, losses, recipe, train

pytestmark = pytest.mark.slow

# Two rows of `even` fill a pack of this many tokens, and never three.
CAPACITY = 200
EVEN = 160
# As in stage 2.1, whose recipe is launched here: what trains decides which packs meet.
TRAINED = {"freeze_vision_tower": True, "freeze_multi_modal_projector": False, "freeze_language_model": False}


def even_records() -> list[Record]:
    """Rows of like length, each of its own: with a picture, with two, and without any."""
    made = []
    for i in range(EVEN):
        pictures = [picture(28 * (2 + i % 3), 56)] * (i % 4 > 0) + [picture(56, 56)] * (i % 8 == 5)
        words = "".join(chr(97 + (i * 7 + k) % 26) for k in range(60 - 5 * len(pictures)))
        made.append(Record(turns("<image>" * len(pictures) + f"Number {i}?", words), pictures))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    write_set(folder, "even", even_records(), shards=2)
    write_set(folder, "mixed", records(40), shards=2)
    write_set(folder, "more", records(25, seed=9))
    return folder


def loaded(folder, model, dataset: str, **values) -> dict:
    """What LLaMA-Factory's own `get_dataset` gives in this process."""
    from llamafactory.data import get_dataset

    config = settings(folder, model, dataset, **{"neat_packing": True, "bf16": False, **TRAINED, **values})
    arguments, problems = check_recipe.parse(config)
    assert arguments is not None, problems
    tokenizer, processor, template = check_recipe.load(arguments)
    arguments.data.finetuning_args = arguments.finetuning
    parts = (arguments.model, arguments.data, arguments.training)
    return get_dataset(template, *parts, "sft", tokenizer=tokenizer, processor=processor)["train_dataset"]


def collator(folder, model):
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask
    from transformers import AutoModelForImageTextToText

    arguments, problems = check_recipe.parse(settings(folder, model, "mixed", bf16=False))
    assert arguments is not None, problems
    tokenizer, processor, template = check_recipe.load(arguments)
    loaded_model = AutoModelForImageTextToText.from_pretrained(model)
    parts = {"template": template, "tokenizer": tokenizer, "processor": processor}
    return SFTDataCollatorWith4DAttentionMask(model=loaded_model, label_pad_token_id=-100, **parts)


def lengths(pack: dict) -> list[int]:
    return [len(feature["input_ids"]) for feature in pack["pack"]]


def texts(packs) -> list[tuple]:
    return sorted(tuple(feature["input_ids"]) for pack in packs for feature in pack["pack"])


def cached(folder) -> int:
    """Bytes of what `datasets` keeps of its maps, without the sets themselves."""
    return sum(path.stat().st_size for path in folder.rglob("cache-*.arrow"))


def test_every_sample_once_as_llama_factory_tokenises_it_and_no_copy_of_its_pictures(data, tied, tmp_path):
    options = {"folder": data, "model": tied.merged, "dataset": "mixed,more", "cutoff_len": 1400}
    packed = loaded(**options, cache_dir=str(tmp_path / "packed"))
    plain = loaded(**options, cache_dir=str(tmp_path / "plain"), neat_packing=False)
    rows = list(zip(plain["input_ids"], plain["labels"], strict=True))
    found = [(f["input_ids"], f["labels"]) for i in range(len(packed)) for f in packed[i]["pack"]]
    assert sorted(found) == sorted(rows)
    assert max(sum(lengths(packed[i])) for i in range(len(packed))) <= 1400
    pictures = sum(len(image["bytes"]) for images in plain["images"] for image in images or [])
    assert cached(tmp_path / "packed") < 0.1 * pictures
    assert cached(tmp_path / "plain") > pictures  # the control


def write_videos(folder) -> None:
    """Rows with one video each, or with none: 2 to 6 frames, which LLaMA-Factory reads from files."""
    import av
    from PIL import Image

    rows = []
    for number in range(9):
        row = {"messages": turns(f"Number {number}?", "Red. " * (1 + number)), "videos": []}
        if number % 3:
            path = folder / f"{number}.avi"
            with av.open(str(path), "w") as container:
                stream = container.add_stream("mjpeg", rate=2)
                stream.width, stream.height, stream.pix_fmt = 56 + 28 * (number % 2), 56, "yuvj420p"
                for frame in range(1 + number % 5 + 1):
                    image = Image.new("RGB", (stream.width, stream.height), (40 * frame, 0, 90))
                    container.mux(stream.encode(av.VideoFrame.from_image(image)))
                container.mux(stream.encode(None))
            row["messages"][0]["content"] = "<video>" + row["messages"][0]["content"]
            row["videos"] = [str(path)]
        rows.append(row)
    (folder / "clips.json").write_text(json.dumps(rows))
    enlist(folder, "clips", file_name="clips.json", columns={"messages": "messages", "videos": "videos"})


def test_videos_are_packed_as_llama_factory_tokenises_them(data, tied):
    from llamafactory.data.qwen_merge_packing import collate_packs  # the overlay's, so not on the second stack

    write_videos(data)
    options = {"folder": data, "model": tied.merged, "dataset": "clips", "cutoff_len": 300}
    packed, plain = loaded(**options), loaded(**options, neat_packing=False)
    assert texts(packed[i] for i in range(len(packed))) == sorted(map(tuple, plain["input_ids"]))
    batch = collate_packs(collator(data, tied.merged), [packed[i] for i in range(len(packed))])
    config = json.loads((tied.merged / "config.json").read_text())
    patches = int(batch["video_grid_thw"].prod(1).sum())
    assert len(batch["pixel_values_videos"]) == patches
    assert int((batch["input_ids"] == config["video_token_id"]).sum()) * 4 == patches
    assert len(batch["cu_seq_lens_q"]) == 1 + 9
    # What the model need not ask the device for.
    ids, told = batch["input_ids"][0], [config["image_token_id"], config["video_token_id"]]
    assert batch["samples"] == batch["cu_seq_lens_q"].diff().tolist()
    assert batch["grids"] == batch["video_grid_thw"].tolist()
    assert batch["features"].tolist() == [i for token in told for i in range(len(ids)) if ids[i] == token]
    assert batch["labelled"].tolist() == [i - 1 for i in range(1, len(ids)) if batch["labels"][0, i] != -100]


def test_a_sample_whose_picture_is_cut_is_left_out_with_a_word(data, tied, caplog):
    with caplog.at_level("WARNING"):
        packed = loaded(data, tied.merged, "mixed", cutoff_len=300, cache_dir=str(data / "short"))
    kept = len(packed.plan.members)
    assert 0 < kept < 40
    assert f"{40 - kept} of 40 samples are left out" in caplog.text


def spread(packs, samples: list[tuple]) -> float:
    """By how many rounds the sample that was taken most often is ahead of the one that was taken least often."""
    taken, copies = Counter(texts(packs)), Counter(samples)
    assert set(taken) <= set(copies)
    rounds = [taken[sample] / copies[sample] for sample in copies]
    return max(rounds) - min(rounds)


def test_a_stream_gives_every_sample_in_full_packs_round_after_round(data, tied, monkeypatch):
    monkeypatch.setattr("llamafactory.data.qwen_merge_packing.STREAMED_STEPS", 4)
    streaming = {"streaming": True, "max_steps": 5, "buffer_size": 8, "dataloader_num_workers": 1}
    stream = loaded(data, tied.merged, "mixed,more", cutoff_len=400, **streaming)
    whole = loaded(data, tied.merged, "mixed,more", cutoff_len=400)
    samples = texts(whole[i] for i in range(len(whole)))
    rounds = 4
    packs = list(islice(stream, int(rounds * sum(map(len, samples)) / 400)))
    assert max(map(sum, map(lengths, packs))) <= 400
    assert sum(map(sum, map(lengths, packs))) > 0.85 * 400 * len(packs)
    assert spread(packs, samples) <= 1
    again = list(islice(stream, len(packs)))
    assert [texts([pack]) for pack in packs] == [texts([pack]) for pack in again]
    half = len(packs) // rounds
    assert [texts([pack]) for pack in packs[:half]] != [texts([pack]) for pack in packs[half : 2 * half]]


def test_a_stream_in_two_ranks_with_two_workers_each_and_resumed_behind_its_first_round(data, tied, monkeypatch):
    monkeypatch.setattr("llamafactory.data.qwen_merge_packing.STREAMED_STEPS", 4)
    streaming = {"streaming": True, "max_steps": 5, "buffer_size": 8, "dataloader_num_workers": 2}
    options = {"folder": data, "model": tied.merged, "dataset": "even", "cutoff_len": CAPACITY}
    stream = loaded(**options, per_device_train_batch_size=2, **streaming)
    plain = loaded(**options)
    samples = texts(plain[i] for i in range(len(plain)))
    assert len(set(samples)) == EVEN

    def read(rank: int, skipped: int, steps: int) -> list[dict]:
        loader = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=lambda packs: packs[0])
        loader = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        loader.set_epoch(0)
        return list(islice(skip_first_batches(loader, skipped) if skipped else loader, steps))

    a_round = len(plain) // 2
    whole = [read(rank, 0, 3 * a_round) for rank in range(2)]
    # Each step's two packs, one for each rank.
    steps = DataLoader(stream, batch_size=2, num_workers=2, collate_fn=list)
    for ranks, together in zip(zip(*whole, strict=True), steps, strict=False):
        assert [texts([pack]) for pack in ranks] == [texts([pack]) for pack in together]
    for ranks in zip(*whole, strict=True):
        assert not set(texts(ranks[:1])) & set(texts(ranks[1:]))
    assert spread(chain(*whole), samples) <= 2
    assert spread(chain(whole[0], whole[0]), samples) > 2  # the control: ranks with the same packs
    for rank in range(2):
        rest = read(rank, 2 * a_round, a_round)
        assert [texts([pack]) for pack in rest] == [texts([pack]) for pack in whole[rank][2 * a_round :]]
        assert len(rest) == a_round


def test_a_stream_without_a_number_of_steps_is_refused(data, tied, caplog):
    with caplog.at_level("ERROR"), pytest.raises(SystemExit) as stop:
        loaded(data, tied.merged, "mixed", streaming=True, max_steps=0)
    assert stop.value.code == 2
    assert "max_steps must say how many steps are trained" in caplog.text


def test_packing_alone_keeps_samples_apart_too(data, tied, caplog):
    from llamafactory.data.qwen_merge_packing import collate_packs, packs_samples

    options = {"folder": data, "model": tied.merged, "dataset": "mixed,more", "cutoff_len": 1400}
    neat = loaded(**options)
    with caplog.at_level("WARNING"):
        plain = loaded(**options, neat_packing=False, packing=True)
    assert "samples of a pack never see each other" in caplog.text
    assert [texts([plain[i]]) for i in range(len(plain))] == [texts([neat[i]]) for i in range(len(neat))]
    batch = collate_packs(collator(data, tied.merged), [plain[0]])
    assert batch["cu_seq_lens_q"].tolist() == np.cumsum([0, *lengths(plain[0])]).tolist()
    # The controls: a template of others', and captions read as plain text, where packing is on without a word.
    other = loaded(**options, neat_packing=False, packing=True, template="qwen2_vl")
    assert not hasattr(other, "plan")
    assert not packs_samples(Namespace(packing=True, template="qwen_merge_vl"), "pt")
    assert packs_samples(Namespace(packing=True, template="qwen_merge_vl"), "sft")


def test_ranks_see_disjoint_and_complete_data(data, tied):
    packed = loaded(data, tied.merged, "mixed,more", cutoff_len=600, per_device_train_batch_size=4)  # as 2 ranks of 2
    batches = BatchSampler(packed.sampler, 2, drop_last=False)
    shards = [list(chain(*BatchSamplerShard(batches, 2, rank))) for rank in range(2)]
    assert sorted(chain(*shards)) == list(range(len(packed)))


STEPS = EVEN // 4  # of an epoch, with two packs accumulated in each


@pytest.fixture(scope="module")
def twice(data, untied, tmp_path_factory):
    """Nearly two epochs packed, and the samples of the first one step by step unpacked.

    The folder of the runs, and the arguments of both.
    """
    folder = tmp_path_factory.mktemp("runs")
    packed = loaded(data, untied.merged, "even", cutoff_len=CAPACITY, per_device_train_batch_size=1)
    assert [len(packed.plan.pack(i)) for i in range(len(packed))] == [2] * (EVEN // 2)
    rows = even_records()
    write_set(data, "reordered", [rows[packed.row[sample]] for sample in packed.plan.members])
    arguments = {
        "model": untied.merged,
        "data": data,
        "gradient_accumulation_steps": 2,
        "cutoff_len": CAPACITY,
        "seed": 42,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    stage = recipe("8B", "2.1")
    one = {**arguments, "dataset": "even", "neat_packing": "true", "per_device_train_batch_size": 1}
    one |= {"max_steps": 2 * STEPS - 5, "save_steps": STEPS // 2}
    train(stage, output=folder / "packed", **one)
    two = {**arguments, "dataset": "reordered", "per_device_train_batch_size": 2, "disable_shuffling": "true"}
    two |= {"max_steps": STEPS}
    train(stage, output=folder / "unpacked", **two)
    return folder, one, two


def weights(folder):
    return load_file(folder / "model.safetensors")


def distance(one: dict, other: dict, base: dict) -> float:
    """||one - other|| / ||one - base||."""
    apart = sum((one[name] - other[name]).square().sum() for name in one)
    return float((apart / sum((one[name] - base[name]).square().sum() for name in one)).sqrt())


def test_forty_packed_steps_end_where_unpacked_ones_do(twice, untied):
    folder, *_ = twice
    base, unpacked = weights(untied.merged), weights(folder / "unpacked")
    packed = weights(folder / f"packed/checkpoint-{STEPS}")
    assert distance(packed, unpacked, base) < 1e-4
    assert losses(folder / "packed")[:STEPS] == pytest.approx(losses(folder / "unpacked"), abs=2e-4)
    halfway = weights(folder / f"packed/checkpoint-{STEPS // 2}")  # the control: where the steps end can be told
    assert distance(packed, halfway, base) > 1e-2


def test_a_packed_run_killed_in_its_second_epoch_resumes_exactly(data, twice):
    folder, arguments, _ = twice
    output, newest = folder / "killed", STEPS // 2 * 3
    with (folder / "killed.log").open("w") as log:
        process = subprocess.Popen(
            command(recipe("8B", "2.1"), output=output, **arguments),
            env=environment(data),
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while process.poll() is None and not (output / f"checkpoint-{newest}/trainer_state.json").exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (folder / "killed.log").read_text()[-3000:]
    assert not (output / "model.safetensors").exists(), "the run had ended before the kill"

    run = train(recipe("8B", "2.1"), output=output, **arguments)
    assert f"Continuing training from global step {newest}" in run.stdout
    whole, again = weights(folder / "packed"), weights(output)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert losses(output)[-5:] == losses(folder / "packed")[-5:]
    at_the_kill = weights(output / f"checkpoint-{newest}")  # the control: the steps behind it matter
    assert any(not torch.equal(whole[name], at_the_kill[name]) for name in whole)


def test_another_plan_is_not_resumed(data, tied, tmp_path, caplog):
    options = {"folder": data, "model": tied.merged, "dataset": "mixed,more", "cutoff_len": 1400}
    options["output_dir"] = str(tmp_path)
    loaded(**options)
    loaded(**options, resume_from_checkpoint="checkpoint-1")  # the control: the same plan goes on
    for other in ({"seed": 7}, {"freeze_vision_tower": False}):
        caplog.clear()
        with caplog.at_level("ERROR"), pytest.raises(SystemExit) as stop:
            loaded(**options, resume_from_checkpoint="checkpoint-1", **other)
        assert stop.value.code == 2
        assert "packed its samples otherwise" in caplog.text


def test_two_ranks_take_the_steps_of_one_though_a_rank_has_no_picture(data, untied, tmp_path):
    """All packs have as many labels, so that a mean over ranks is one over tokens. Some steps give a rank text only."""
    write_set(data, "parted", parted_rows())
    same = {"model": untied.merged, "data": data, "dataset": "parted", "neat_packing": "true", "cutoff_len": CAPACITY}
    packs = loaded(data, untied.merged, "parted", cutoff_len=CAPACITY, per_device_train_batch_size=2)
    assert [len(packs.plan.pack(i)) for i in range(len(packs))] == [2] * 24
    labels = [sum(x != -100 for f in packs[i]["pack"] for x in f["labels"]) for i in packs.sampler]
    assert len(set(labels)) == 1
    pictured = [any(f["images"] for f in packs[i]["pack"]) for i in packs.sampler]
    assert {True, False} <= {a != b for a, b in zip(pictured[::2], pictured[1::2], strict=True)}
    same |= {"max_steps": 12, "seed": 42, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    stage = recipe("8B", "2.1")
    train(stage, output=tmp_path / "one", per_device_train_batch_size=2, **same)
    two = {"processes": 2, "ddp_backend": "gloo", "per_device_train_batch_size": 1}
    train(stage, output=tmp_path / "two", **two, **same)
    base, one, other = weights(untied.merged), weights(tmp_path / "one"), weights(tmp_path / "two")
    assert distance(one, other, base) < 1e-4
    train(stage, output=tmp_path / "half", per_device_train_batch_size=1, **same)  # the control: half a step's packs
    assert distance(one, weights(tmp_path / "half"), base) > 1e-2


def test_lora_adapters_of_packs_are_those_of_the_samples_alone(twice):
    folder, packed, unpacked = twice
    lora = {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "freeze_vision_tower": "true"}
    lora |= {"max_steps": 6, "save_steps": 3, "learning_rate": 0.5}
    found = []
    for name, arguments in (("packed", packed), ("unpacked", unpacked)):
        train(recipe("8B", "2.1"), output=folder / f"lora-{name}", **{**arguments, **lora})
        files = [folder / f"lora-{name}{step}/adapter_model.safetensors" for step in ("", "/checkpoint-3")]
        # B begins with zeros, so that it is how far the adapter went.
        found += [{key: x for key, x in load_file(file).items() if "lora_B" in key} for file in files]
    one, halfway, other, _ = found
    start = {name: torch.zeros_like(values) for name, values in one.items()}
    assert len(one) > 0
    assert distance(one, other, start) < 1e-3
    assert distance(one, halfway, start) > 0.05  # the control
    assert losses(folder / "lora-packed") == pytest.approx(losses(folder / "lora-unpacked"), abs=2e-4)
    assert losses(folder / "lora-packed")[0] == pytest.approx(losses(folder / "packed")[0], abs=2e-4)


def test_compiled_layers_train_alike(twice):
    folder, arguments, _ = twice
    compiled = {"torch_compile": "true", "torch_compile_backend": "aot_eager"}
    output = folder / "compiled"
    run = train(recipe("8B", "2.1"), output=output, **{**arguments, **compiled, "max_steps": 3})
    assert "The layers of both towers are compiled" in run.stdout
    assert losses(output) == pytest.approx(losses(folder / "packed")[:3], abs=2e-4)
