"""Plans of packed epochs: full, complete, balanced, the same again; against what LLaMA-Factory's own packing gives."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from qwen_merge.architecture.configuration_qwen2_5_vl_merge import Qwen2_5_VL_MergeConfig
from qwen_merge.architecture.modeling_qwen2_5_vl_merge import Qwen2_5_VL_MergeForConditionalGeneration
from qwen_merge.bench.real_sizes import QWEN2_5_VL, QWEN3

COST = 0.08
FILE = Path(__file__).parents[2] / "src/qwen_merge/overlays/llamafactory/files/qwen_merge_plan.py"


@pytest.fixture(scope="module")
def planner():
    spec = importlib.util.spec_from_file_location("qwen_merge_plan", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stage_two(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and patches as of stage 2.1: a third text only, pictures of up to 324 tokens, some long answers."""
    dice = np.random.default_rng(seed)
    tokens = np.where(dice.random(samples) < 1 / 3, 0, dice.integers(60, 325, samples))
    text = np.minimum(dice.lognormal(5.5, 0.8, samples).astype(int) + 10, 7500)
    return tokens + text, 4 * tokens


def fill(packs: list, lengths: np.ndarray, capacity: int) -> float:
    return lengths.sum() / (len(packs) * capacity)


def test_packs_are_full_over_the_epoch(planner):
    lengths, patches = stage_two(20_000)
    plan = planner.make_plan(lengths, patches, 8096, 8, seed=1, patch_cost=COST)
    assert plan.fill > 0.98
    assert sorted(plan.members.tolist()) == list(range(20_000))
    assert all(lengths[plan.pack(i)].sum() <= 8096 for i in range(len(plan)))
    assert len(plan) % 8 == 0

    # Control: samples in their order, a new pack when one does not fit.
    packs, room = 0, 0
    for length in lengths.tolist():
        packs, room = (packs, room - length) if room >= length else (packs + 1, 8096 - length)
    assert lengths.sum() / (packs * 8096) < 0.97


def test_ranks_of_a_step_have_the_same_work(planner):
    lengths, patches = stage_two(40_000)
    cost = lengths + COST * patches

    def balance(plan) -> float:
        """Mean over slowest, averaged over the steps."""
        packs = np.array([cost[plan.pack(i)].sum() for i in range(len(plan))]).reshape(-1, plan.group)
        return float((packs.mean(1) / packs.max(1)).mean())

    plan = planner.make_plan(lengths, patches, 8096, 8, seed=1, patch_cost=COST)
    assert balance(plan) > 0.99
    shuffled = np.random.default_rng(0).permutation(len(plan))  # the control
    members = [plan.pack(i) for i in shuffled]
    control = planner.Plan(np.concatenate(members), np.cumsum([0, *map(len, members)]), 8, 8096, plan.tokens, COST)
    assert balance(control) < balance(plan)


def real_config(size: str) -> Qwen2_5_VL_MergeConfig:
    vision = {**QWEN2_5_VL["72B"]["vision_config"], "out_hidden_size": 8192}
    return Qwen2_5_VL_MergeConfig(**QWEN3[size], vision_config=vision)


@pytest.mark.parametrize("size", ["4B", "8B"])
def test_a_patch_costs_what_its_weights_do(planner, size):
    """Against the weights of the real architecture, and the numbers of the recipes by hand."""
    config = real_config(size)
    with torch.device("meta"):
        model = Qwen2_5_VL_MergeForConditionalGeneration(config)
    sizes = {
        name: sum(p.numel() for p in part.parameters() if p.ndim > 1)
        for name, part in (
            ("tower", model.model.visual.blocks),
            ("projector", model.model.visual.merger),
            ("llm", model.model.language_model.layers),
        )
    }
    tower, projector, llm = sizes["tower"], sizes["projector"] / 4, sizes["llm"]
    stage1, stage2, whole = (
        planner.patch_cost(config, *trains)
        for trains in ((False, True, False), (False, True, True), (True, True, True))
    )
    assert stage1 == pytest.approx((tower + 3 * projector) / (2 * llm))
    assert stage2 == pytest.approx((tower + 3 * projector) / (3 * llm))
    assert whole == pytest.approx((tower + projector) / llm)
    assert planner.patch_cost(config, False, False, True) == pytest.approx((tower + projector) / (3 * llm))
    by_hand = {"4B": (0.0966, 0.0644, 0.1808), "8B": (0.0511, 0.0341, 0.0950)}  # 0.63 of 3.6 and of 6.9 billion
    assert (stage1, stage2, whole) == pytest.approx(by_hand[size], rel=0.01)


def test_what_a_patch_costs_decides_which_packs_meet(planner):
    lengths, patches = stage_two(20_000)
    plans = {cost: planner.make_plan(lengths, patches, 8096, 8, 1, patch_cost=cost) for cost in (0.03, 0.2)}

    def balance(plan, cost: float) -> float:
        work = lengths + cost * patches
        packs = np.array([work[plan.pack(i)].sum() for i in range(len(plan))]).reshape(-1, plan.group)
        return float((packs.mean(1) / packs.max(1)).mean())

    for cost, other in ((0.03, 0.2), (0.2, 0.03)):
        assert balance(plans[cost], cost) > balance(plans[other], cost)
        assert plans[cost].patch_cost == cost


def test_the_seed_decides(planner):
    lengths, patches = stage_two(3000)
    one, again, other = (planner.make_plan(lengths, patches, 8096, 4, seed, patch_cost=COST) for seed in (1, 1, 2))
    assert np.array_equal(one.members, again.members)
    assert np.array_equal(one.offsets, again.offsets)
    assert not np.array_equal(one.members, other.members)


def test_epochs_take_the_steps_in_other_orders_and_all_of_them(planner):
    lengths, patches = stage_two(3000)
    plan = planner.make_plan(lengths, patches, 8096, 4, seed=1, patch_cost=COST)
    sampler = planner.PlanSampler(plan, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == list(range(len(plan)))
    assert second != first
    assert sorted(second) == first
    assert all(second[i] // 4 == second[i + 3] // 4 for i in range(0, len(second), 4))  # steps stay together
    sampler.set_epoch(1)
    assert list(sampler) == second


def loader(sampler, rank: int, ranks: int):
    """What Trainer makes of the plan; of two ranks, one."""
    plain = DataLoader(range(len(sampler)), batch_size=1, sampler=sampler)
    if ranks == 1:
        return Accelerator(cpu=True).prepare(plain)
    return prepare_data_loader(plain, num_processes=ranks, process_index=rank, put_on_device=False)


def numbers_of(batches) -> list[int]:
    return [int(batch) for batch in batches]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("goes_back", [False, True])
def test_the_rest_of_a_later_epoch_is_that_of_the_whole_one(planner, monkeypatch, ranks, goes_back):
    """Trainer resumes so; Accelerate's loader for the rest begins with epoch 0 and says so to the sampler."""
    if goes_back:  # the control
        monkeypatch.setattr(planner.PlanSampler, "set_epoch", lambda self, epoch: setattr(self, "epoch", epoch))
    lengths, patches = stage_two(1500)
    plan = planner.make_plan(lengths, patches, 8096, 2, seed=1, patch_cost=COST)
    skipped, complete, whole, resumed = 5, True, [], []
    for rank in range(ranks):
        uninterrupted = loader(planner.PlanSampler(plan, seed=1), rank, ranks)
        for epoch in range(2):
            uninterrupted.set_epoch(epoch)
            numbers = numbers_of(uninterrupted)
        again = loader(planner.PlanSampler(plan, seed=1), rank, ranks)
        again.set_epoch(1)
        rest = numbers_of(skip_first_batches(again, skipped))
        again.set_epoch(2)  # and what comes behind it
        uninterrupted.set_epoch(2)
        assert numbers_of(again) == numbers_of(uninterrupted)
        complete &= numbers[skipped:] == rest
        whole += numbers
        resumed += numbers[:skipped] + rest
    assert sorted(whole) == list(range(len(plan)))
    # Over several ranks the sampler lies deeper than Accelerate looks.
    assert complete == (not goes_back or ranks == 2)
    assert (sorted(resumed) == list(range(len(plan)))) == complete


@pytest.mark.parametrize("samples", [1, 3, 5, 17])
def test_too_few_samples_for_all_ranks(planner, samples):
    lengths = np.full(samples, 30)
    plan = planner.make_plan(lengths, lengths * 0, 100, 8, seed=0, patch_cost=COST)
    assert sorted(plan.members.tolist()) == list(range(samples))
    assert len(plan) == 8 if samples >= 8 else len(plan) == samples
    assert sorted(planner.PlanSampler(plan, 0)) == list(range(len(plan)))


def test_lengths_that_fit_nowhere(planner):
    with pytest.raises(ValueError, match="1 to 100 tokens are needed, got 5 to 101"):
        planner.best_fit(np.array([5, 101]), 100, 0)


def test_an_exact_fit_is_found(planner):
    packs = planner.best_fit(np.array([60, 50, 50, 40, 30, 70]), 100, 0)
    assert len(packs) == 3
