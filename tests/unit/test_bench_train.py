"""The arithmetic of `qwen-merge bench train`, and a run of it on a CPU at tiny size."""

import argparse
import json
import re
from io import BytesIO

import pytest
import torch

from qwen_merge import cli
from qwen_merge.architecture.modeling_qwen2_5_vl_merge import Qwen2_5_VL_MergeForConditionalGeneration
from qwen_merge.bench.command import TRAIN_CHANGES, TRAIN_RECIPES
from qwen_merge.bench.train import AS_PLAIN, SHAPES, arguments_of, make_data
from qwen_merge.bench.train_flops import Counts, Sizes, attention_flops, formula, matrix_flops
from qwen_merge.bench.train_profile import shares
from qwen_merge.bench.train_report import summary
from qwen_merge.bench.train_worker import count, upstream_tower


@pytest.fixture
def model(tied):
    return Qwen2_5_VL_MergeForConditionalGeneration.from_pretrained(tied.merged)


def freeze(model, *trained: str) -> Sizes:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    return Sizes.of(model)


def test_frozen_parts_are_counted_by_what_has_to_be_done(model):
    counts = Counts(tokens=1000, labelled=100, patches=400)
    stage1, stage2 = freeze(model, "merger"), freeze(model, "merger", "language_model")
    common = 2 * stage1.vision * 400 + 6 * stage1.projector * 100
    assert matrix_flops(stage1, counts) == common + 4 * stage1.llm * 1000 + 4 * stage1.head * 100
    assert matrix_flops(stage2, counts) == common + 6 * stage2.llm * 1000 + 6 * stage2.head * 100
    text = formula(stage2, counts)
    numbers = [float(number.replace(",", "")) for number in re.findall(r"(\d)N x ([\d,]+)", text) for number in number]
    sizes = [1e6 * float(number.replace(",", "")) for number in re.findall(r"N = ([\d.,]+) million", text)]
    found = sum(times * number * size for times, number, size in zip(numbers[::2], numbers[1::2], sizes, strict=True))
    assert found == pytest.approx(matrix_flops(stage2, counts), rel=1e-3)
    assert "6N x 1,000 tokens (llm, N = " in text
    assert "4N x 1,000 tokens (llm, N = " in formula(stage1, counts)
    nothing = freeze(model, "language_model")
    assert matrix_flops(nothing, counts) == matrix_flops(stage2, counts) - 4 * stage1.projector * 100


def test_forward_flops_are_pytorchs(tied):
    """PyTorch's own counter over a real forward: 2N a token, and the products of attention."""
    from torch.utils.flop_counter import FlopCounterMode

    # eager: the counter does not know the CPU's sdpa
    model = Qwen2_5_VL_MergeForConditionalGeneration.from_pretrained(tied.merged, attn_implementation="eager")
    freeze(model)
    ids = torch.randint(0, 300, (2, 50))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    sizes = Sizes.of(model)
    found = counter.get_total_flops()
    norms = sum(p.numel() for n, p in model.named_parameters() if "language_model.layers" in n and p.ndim == 1)
    matrices = 2 * (sizes.llm - norms) * 100 + 2 * sizes.head * 100
    square = 4 * sizes.layers * sizes.attention_width * 2 * 50 * 50  # PyTorch counts the masked half, too
    assert found == matrices + square
    counts = Counts(tokens=100, squares=2 * 50 * 50)
    assert attention_flops(sizes, counts) == square / 2


def test_batches_are_counted_without_their_padding(model):
    inputs = {
        "labels": torch.tensor([[-100, 5, 6, 7], [-100, -100, 5, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "image_grid_thw": torch.tensor([[1, 8, 10]]),
    }
    found = count(inputs, model.model.visual)
    assert (found.samples, found.tokens, found.places, found.labelled, found.patches) == (2, 7, 8, 4, 80)
    assert (found.squares, found.frame_squares) == (16 + 9, 80 * 80)
    assert found.window_squares == 64 * 64 + 16 * 16  # windows of 8 x 8 patches: one whole, one of 8 x 2
    row = {"labels": torch.tensor([[-100, 5, 6, 7, -100, -100, 5]]), "cu_seq_lens_q": torch.tensor([0, 4, 7])}
    packed = count(row, model.model.visual)
    assert (packed.samples, packed.tokens, packed.places, packed.squares) == (2, 7, 7, 25)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_pictures_lie_stand_and_are_square_as_the_stage_says(tmp_path, stage):
    from datasets import load_dataset
    from PIL import Image

    found = []
    for folder in (tmp_path / "one", tmp_path / "again"):
        make_data(folder, stage, 60, shrink=4)
        rows = load_dataset(str(folder / "bench"), split="train", cache_dir=str(tmp_path / "cache"))
        pictures = [image["bytes"] if isinstance(image, dict) else image for row in rows for image in row["images"]]
        found.append(
            [image.size if isinstance(image, Image.Image) else Image.open(BytesIO(image)).size for image in pictures]
        )
    assert found[0] == found[1]
    assert set(found[0]) <= {(width // 4, height // 4) for width, height in SHAPES[stage][0]}
    assert {(width > height) - (width < height) for width, height in found[0]} == {-1, 0, 1}
    assert len(set(found[0])) >= 4


def test_a_change_is_taken_out_of_the_fast_recipe_and_nothing_else(tmp_path):
    options = argparse.Namespace(size="4B", stage="2", steps=1, warm_up=1, device="cuda", cards=[1], set=[], zero=None)
    found = {recipe: arguments_of(recipe, options, tmp_path) for recipe in TRAIN_RECIPES}
    same = {"cache_dir", "output_dir"}  # of each run
    fast = found["fast"]
    for change in TRAIN_CHANGES:
        other = found[f"fast-{change}"]
        names = {name for name in fast.keys() | other.keys() if fast.get(name) != other.get(name)} - same
        assert names == set(AS_PLAIN.get(change, ()))
        assert all(other.get(name) == found["plain"].get(name) for name in names)


def test_the_upstream_tower_gives_the_same_features(model):
    tower, grids = model.model.visual.eval(), torch.tensor([[1, 8, 10], [1, 18, 4]])
    patches = torch.randn(152, 1176, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = tower(patches, grids)
        upstream_tower(tower)
        assert torch.allclose(tower(patches, grids), ours, atol=1e-5)
    assert "forward" in vars(tower)  # it is another function
    assert type(tower.blocks[0]).__module__ == "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"


def figures(tokens: list[int], seconds: list[float], work: float) -> dict:
    """Of one rank, as its worker writes them."""
    counts = dict.fromkeys(vars(Counts()), 0) | {"samples": 10, "tokens": sum(tokens), "places": 2 * sum(tokens)}
    return {
        "device": "NVIDIA H200",
        "torch": "2.11.0",
        "attention": "sdpa",
        "step_tokens": tokens,
        "step_seconds": seconds,
        "counts": counts,
        "parts": {"waiting": 0.5, "backward": 2.5},
        "matrix_flops": 989e12,
        "attention_flops": 98.9e12,
        "peak_bytes": int(work * 2**30),
        "checkpointed_layers": 0,
        "layers": 36,
        "profile": {"seconds": 2.0, "work": work, "collectives": 0.6, "exposed": 0.5},
    }


def test_ranks_are_added_up_and_the_slowest_says_how_long_a_step_takes():
    ranks = [figures([100, 300], [1.0, 1.0], 1.5), figures([200, 100], [2.0, 0.5], 1.0)]
    found = summary({"recipe": "fast", "cards": 2, "ranks": ranks})
    assert found["tokens_per_second"] == (300 / 2 + 400 / 1) / 2
    assert found["samples_per_second"] == 20 / 3
    assert found["padding"] == 0.5
    assert found["utilisation"] == pytest.approx(2 / 3 / 2)
    assert found["with_attention"] == pytest.approx(2.2 / 3 / 2)
    assert found["communication"] == 0.25
    assert found["balance"] == 1.25 / 1.5
    assert found["peak_gib"] == 1.5


def test_a_table_of_several_files(tmp_path, capsys):
    runs = [
        {"recipe": "fast", "cards": 1, "deepspeed": "ds_z2_config.json", "ranks": [figures([100], [1.0], 1.0)]},
        {"recipe": "stock", "cards": 1, "deepspeed": "ds_z3_config.json", "out_of_memory": ["OutOfMemoryError: …"]},
    ]
    pair = [figures([90], [1.0], 1.0), figures([90], [1.0], 0.9)]
    other = [{"recipe": "fast", "cards": 2, "deepspeed": "ds_z2_config.json", "ranks": pair}]
    for name, content in (("one", runs), ("two", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"size": "4B", "stage": "2", "runs": content}))
    files = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    outputs = ["--markdown", str(tmp_path / "t.md"), "--png", str(tmp_path / "t.png")]
    assert cli.main(["bench", "scaling", *files, *outputs]) == 0
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[2] == "| 4B | 2 | fast, ZeRO-2 | 1 | 100 |  | 100.0%, 110.0% |  |  | 0 of 36 | 1 GiB |"
    assert lines[3] == "| 4B | 2 | fast, ZeRO-2 | 2 | 90 | 90.0% | 100.0%, 110.0% | 25.0% | 0.950 | 0 of 36 | 1 GiB |"
    assert lines[4].startswith("| 4B | 2 | stock, ZeRO-3 | 1 | out of memory |")
    assert len({line.count("|") for line in lines}) == 1
    assert (tmp_path / "t.png").stat().st_size > 5000
    (tmp_path / "two.json").write_text('{"runs": 3}')
    capsys.readouterr()
    assert cli.main(["bench", "scaling", *files]) == 2
    assert "two.json is not what" in capsys.readouterr().err


def test_a_trace_is_divided_into_work_and_collectives(tmp_path):
    def event(name, begin, length, cat="kernel"):
        return {"name": name, "cat": cat, "ts": begin * 1e6, "dur": length * 1e6}

    events = [
        event("gemm", 1, 2),
        event("gemm", 2, 2),  # beside the first one, for a second
        event("ncclDevKernel_AllReduce", 3, 3),  # a second of it beside the work
        event("Memcpy", 7, 1, "gpu_memcpy"),
        event("aten::mm", 0, 9, "cpu_op"),
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert shares(tmp_path / "trace.json") == {"seconds": 7.0, "work": 4.0, "collectives": 3.0, "exposed": 2.0}
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events[4:]}))
    with pytest.raises(ValueError, match="holds no kernels"):
        shares(tmp_path / "trace.json")


@pytest.mark.slow
def test_a_tiny_run_of_both_recipes_and_one_of_two_processes(tmp_path, capsys):
    options = ["--size", "tiny", "--stage", "1", "--device", "cpu", "--steps", "1", "--warm-up", "1", "--samples", "48"]
    files = {cards: tmp_path / f"{cards}.json" for cards in ("1", "2")}
    assert cli.main(["bench", "train", *options, "--json", str(files["1"]), "--png", str(tmp_path / "parts.png")]) == 0
    said = capsys.readouterr().out
    assert "fast / stock, real tokens a second" in said
    runs = json.loads(files["1"].read_text())["runs"]
    assert all(f"FLOP of weights = {run['ranks'][0]['formula']}\n" in said for run in runs)
    assert (tmp_path / "parts.png").stat().st_size > 5000
    assert cli.main(["bench", "train", *options, "--recipe", "fast", "--cards", "2", "--json", str(files["2"])]) == 0
    assert "fast, 2 cards" in capsys.readouterr().out
    stock, fast, two = (run["ranks"] for file in files.values() for run in json.loads(file.read_text())["runs"])
    assert stock[0]["counts"]["tokens"] < stock[0]["counts"]["places"]
    assert all(rank["counts"]["tokens"] == rank["counts"]["places"] for rank in (*fast, *two))
    assert two[0]["counts"] != two[1]["counts"]  # each rank has samples of its own
