"""Grafts in vLLM against transformers: greedy tokens, float32, on the CPU's V1 engine; every kind of part once.

The whole product of towers, projectors and LLMs is `tests/support_table.py`'s.
"""

import pytest

import grafts
from greedy import QUICK, by_transformers, by_vllm, make_adapter, picture_requests, tokens_of, with_names_of_memory

pytestmark = pytest.mark.slow

# Every tower, projector, LLM and numbering.
COVERING = (
    ("qwen2_5_vl", "extended", "qwen3_moe", "mrope"),
    ("qwen2_5_vl", "patch_merger", "qwen3", "mrope-2d"),
    ("qwen2_vl", "mlp", "qwen2", "mrope"),
    ("qwen2_vl", "extended", "qwen3", "1d"),
    ("clip", "linear", "qwen3", "mrope"),
    ("siglip", "mlp", "qwen2", "1d"),
    ("siglip", "resampler", "qwen3", "mrope"),
    ("dinov2", "patch_merger", "qwen3_moe", "mrope-2d"),
    ("dinov2_with_registers", "linear", "qwen2", "mrope"),
    ("siglip2", "linear", "qwen3_vl", "mrope"),
    *grafts.HAS_QWEN3_VL * [("qwen3_vl", "extended", "qwen3", "mrope")],
)
# DeepStack in both of vLLM's LLMs that take it: Qwen3-VL put together again, and one whose pictures chunks cut.
DEEPSTACK = grafts.HAS_QWEN3_VL * (
    ("qwen3_vl", "own", "qwen3_vl", "mrope"),
    ("qwen3_vl", "linear", "qwen3_moe", "1d"),
)
CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
INTERPOLATED = ("siglip", "dinov2_with_registers")  # any size for a tower of one
MAIN, UNTIED = COVERING[4], COVERING[2]


@pytest.fixture(scope="session")
def requests(tmp_path_factory) -> dict[str, dict]:
    return picture_requests(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def checkpoints(graft, tmp_path_factory):
    """Each of COVERING and DEEPSTACK with a projector whose pictures change the answer."""
    folder, found = tmp_path_factory.mktemp("covering"), {}
    for parts in COVERING + DEEPSTACK:
        vision = {"deepstack": True} if parts in DEEPSTACK else {}
        if parts[0] in INTERPOLATED:
            vision = {"resolution": "interpolated", "min_pixels": 28 * 28, "max_pixels": 112 * 112}
        made = graft(*parts, name="any-size" if vision else "", vision=vision)
        found[parts] = grafts.with_projector(made, folder / made.name, seed=1)
    return found


@pytest.fixture(scope="session")
def answers(checkpoints, requests, tmp_path_factory):
    """Every engine of this module but the one that needs two processes, in one go."""
    folder, mixed = tmp_path_factory.mktemp("vllm-grafts"), list(requests.values())
    other = grafts.with_projector(checkpoints[MAIN], folder / "other-projector", seed=2)
    adapter = make_adapter(checkpoints[MAIN], folder / "adapter")
    eager = {**QUICK, "limit_mm_per_prompt": {"image": 2}}
    jobs = [
        # The second round finds the first one's prompts in the prefix cache.
        {"name": "-".join(parts), "model": str(checkpoint), "rounds": [mixed, mixed]}
        | {"engine": {**eager, **(CHUNKS if parts in DEEPSTACK[1:] else {})}}
        for parts, checkpoint in checkpoints.items()
    ]
    jobs += [
        {"name": "other projector", "model": str(other), "rounds": [mixed], "engine": eager},
        {
            "name": "names of memory, compiled, in chunks",
            "model": str(with_names_of_memory(checkpoints[UNTIED], folder / "renamed")),
            "rounds": [mixed],
            "engine": {**CHUNKS, "limit_mm_per_prompt": {"image": 2}},
        },
        {
            "name": "LoRA",
            "model": str(checkpoints[MAIN]),
            "engine": {**eager, "enable_lora": True, "max_lora_rank": 8},
            "rounds": [[{**request, "lora": str(adapter)} for request in mixed], mixed],
        },
    ]
    return by_vllm(jobs, folder) | {"adapter": adapter}


@pytest.mark.parametrize("parts", COVERING + DEEPSTACK, ids="-".join)
def test_a_mixed_batch_gives_the_tokens_of_transformers(parts, answers, checkpoints, requests):
    first, second = (tokens_of(requests, outputs) for outputs in answers["-".join(parts)])
    assert first == by_transformers(checkpoints[parts], requests)
    assert second == first
    assert len({tuple(tokens) for tokens in first.values()}) == len(first), "answers that are all alike prove nothing"


def test_the_prefix_cache_is_hit(answers, requests):
    first, second = answers["-".join(MAIN)]
    cached = [dict(zip(requests, (output["cached"] for output in outputs), strict=True)) for outputs in (first, second)]
    shared = cached[0]["two pictures"]  # it begins as the request with one picture does
    assert shared <= 16 < cached[1]["two pictures"]


def test_control_another_projector_gives_other_tokens_for_every_picture(answers, requests):
    ours, others = (tokens_of(requests, answers[name][0]) for name in ("-".join(MAIN), "other projector"))
    assert {name for name in requests if ours[name] != others[name]} == requests.keys() - {"text"}


@pytest.mark.parametrize("parts", DEEPSTACK, ids="-".join)
def test_control_without_its_levels_deepstack_gives_other_tokens(parts, answers, checkpoints, requests, tmp_path):
    flat = grafts.with_projector(checkpoints[parts], tmp_path / "flat", seed=1, silent="projector.deepstack.")
    ours, others = tokens_of(requests, answers["-".join(parts)][0]), by_transformers(flat, requests)
    assert {name for name in requests if ours[name] != others[name]} == requests.keys() - {"text"}


def test_the_names_of_memory_load_too_and_chunks_cut_pictures(answers, requests):
    outputs = answers["names of memory, compiled, in chunks"][0]
    assert tokens_of(requests, outputs) == tokens_of(requests, answers["-".join(UNTIED)][0])
    assert max(output["prompt_tokens"] for output in outputs) > 64, "no prompt is longer than a chunk"


def test_an_adapter_on_the_llm_gives_the_tokens_of_peft(answers, requests, checkpoints):
    adapted, plain = (tokens_of(requests, outputs) for outputs in answers["LoRA"])
    assert adapted == by_transformers(checkpoints[MAIN], requests, answers["adapter"])
    assert plain == tokens_of(requests, answers["-".join(MAIN)][0])
    assert all(adapted[name] != plain[name] for name in requests)  # control: the adapter does something


def test_two_tensor_parallel_ranks_give_the_tokens_of_one(answers, requests, checkpoints, tmp_path):
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **QUICK}
    job = {"name": "two", "model": str(checkpoints[MAIN]), "rounds": [list(requests.values())], "engine": engine}
    two = by_vllm([job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1")["two"]
    assert tokens_of(requests, two[0]) == tokens_of(requests, answers["-".join(MAIN)][0])
