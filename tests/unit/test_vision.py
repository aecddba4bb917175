"""The vision tower's attention within windows and frames: the same features and gradients as transformers' own."""

import copy
import random

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from qwen_merge.architecture import vision_qwen2_5_vl_merge as vision
from qwen_merge.architecture.configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeVisionConfig


class Stock(Qwen2_5_VisionTransformerPretrainedModel):
    """transformers' forward and attention, with the longer projector."""

    config_class = Qwen2_5_VL_MergeVisionConfig

    def __init__(self, config):
        super().__init__(config)
        self.merger = vision.Qwen2_5_VL_MergePatchMerger(config)


@pytest.fixture(scope="module")
def towers():
    config = Qwen2_5_VL_MergeVisionConfig(
        depth=4,
        hidden_size=64,
        intermediate_size=96,
        num_heads=2,
        fullatt_block_indexes=[1, 3],
        out_hidden_size=48,
        out_hidden_size2=40,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    ours, stock = vision.Qwen2_5_VL_MergeVisionTransformer(config), Stock(config)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to four pictures and videos of 4 to 30 patches a side, and their grids."""
    pick = random.Random(seed)
    grid = torch.tensor(
        [
            [pick.choice((1, 1, 1, 2, 3)), 2 * pick.randint(1, 15), 2 * pick.randint(1, 15)]
            for _ in range(pick.randint(1, 4))
        ]
    )
    patches = int(grid.prod(1).sum())
    return torch.randn(patches, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed)), grid


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("seed", range(30))
def test_features_and_gradients_equal_the_stock_towers(towers, seed):
    ours, stock = towers
    pixels, grid = batch(seed)
    features, expected = ours(pixels, grid), stock(pixels, grid)
    assert distance(features, expected) < 1e-5
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed + 100))
    for tower, output in ((ours, features), (stock, expected)):
        tower.zero_grad()
        (output * weights).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        # A bias of keys has no influence on a softmax: its gradient is rounding.
        scale = other.grad.norm().clamp(min=1e-3)
        assert ((parameter.grad - other.grad).norm() / scale).item() < 1e-4, name


def test_without_the_segments_the_features_differ(towers, monkeypatch):
    """The control: everything attends to everything."""
    ours, stock = towers
    pixels, grid = batch(3)
    plain = vision.attend_in_batches
    monkeypatch.setattr(vision, "attend_in_batches", lambda q, k, v, lengths: plain(q, k, v, (sum(lengths),)))
    assert distance(ours(pixels, grid), stock(pixels, grid)) > 1e-2


def test_one_picture_does_not_change_another(towers):
    ours, _ = towers
    pixels, grid = batch(5)
    first = int(grid[0].prod())
    alone = ours(pixels[:first], grid[:1])
    assert distance(ours(pixels, grid)[: first // 4], alone) < 1e-5


def test_a_frozen_tower_keeps_no_graph_and_its_projector_does(towers):
    ours, _ = towers
    pixels, grid = batch(7)
    seen = []
    hook = ours.merger.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    try:
        ours(pixels, grid)
        for part in (ours.patch_embed, ours.blocks):
            part.requires_grad_(False)
        features = ours(pixels, grid)
    finally:
        hook.remove()
        ours.requires_grad_(True)
    assert seen == [True, False]
    assert features.requires_grad


def test_gradient_checkpointing_changes_nothing(towers):
    ours, _ = towers
    pixels, grid = batch(9)
    gradients = []
    for checkpointing in (False, True):
        ours.zero_grad()
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.train()
        ours(pixels, grid).square().sum().backward()
        gradients.append(ours.patch_embed.proj.weight.grad.clone())
    ours.gradient_checkpointing_disable()
    assert torch.equal(*gradients)


def test_compiled_blocks_give_the_same_and_share_their_graphs(towers):
    ours, _ = towers
    expected, graphs = [ours(*batch(seed)) for seed in (11, 12)], []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = copy.deepcopy(ours)
    compiled.compile_blocks(backend=backend, dynamic=True)
    for seed, features in zip((11, 12), expected, strict=True):
        assert distance(compiled(*batch(seed)), features) < 1e-6
    assert len(graphs) == 2  # before and after the attention, for all blocks and both batches


def test_windows_of_a_frame():
    order, sizes = vision.windows_of(2, 3, 2)
    assert order.tolist() == [0, 1, 3, 4, 2, 5]
    assert sizes.tolist() == [4, 2]
