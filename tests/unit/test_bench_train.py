"""The arithmetic of `qwen-merge bench train`, and a run of it on a CPU at tiny size."""

import argparse
import json

import pytest
import torch

from qwen_merge import cli
from qwen_merge.architecture.modeling_qwen2_5_vl_merge import Qwen2_5_VL_MergeForConditionalGeneration
from qwen_merge.bench.command import TRAIN_CHANGES, TRAIN_RECIPES
from qwen_merge.bench.train import AS_PLAIN, arguments_of
from qwen_merge.bench.train_flops import Counts, Sizes, attention_flops, matrix_flops
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


def test_a_change_is_taken_out_of_the_fast_recipe_and_nothing_else(tmp_path):
    options = argparse.Namespace(size="4B", stage="2", steps=1, warm_up=1, device="cuda", cards=1, set=[])
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


@pytest.mark.slow
def test_a_tiny_run_of_both_recipes(tmp_path, capsys):
    options = ["--size", "tiny", "--stage", "1", "--device", "cpu", "--steps", "1", "--warm-up", "1", "--samples", "24"]
    files = ["--json", str(tmp_path / "figures.json"), "--png", str(tmp_path / "parts.png")]
    assert cli.main(["bench", "train", *options, *files]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["fast"]["counts"]["tokens"] == figures["fast"]["counts"]["places"]
    assert figures["stock"]["counts"]["tokens"] < figures["stock"]["counts"]["places"]
    assert (tmp_path / "parts.png").stat().st_size > 5000
    assert "fast / stock, real tokens a second" in capsys.readouterr().out
