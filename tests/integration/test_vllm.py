"""vLLM against transformers on the same tiny checkpoints: greedy tokens, float32, on the CPU's V1 engine."""

import numpy as np
import pytest

from greedy import LONG, by_transformers, by_vllm, make_adapter, picture_requests, tokens_of, with_names_of_memory
from qwen_merge.merger.merge import MergeOptions, merge

pytestmark = pytest.mark.slow

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="session")
def requests(tmp_path_factory) -> dict[str, dict]:
    """Name -> request as tests/vllm_jobs.py takes it."""
    folder = tmp_path_factory.mktemp("media")
    np.save(folder / "clip.npy", np.random.default_rng(0).integers(0, 256, (6, 56, 84, 3), dtype=np.uint8))
    return {
        **picture_requests(folder),
        "video": {"prompt": f"{VIDEO}Describe it.", "videos": [str(folder / "clip.npy")]},
        "long text": {"prompt": LONG * 6},
    }


@pytest.fixture(scope="session")
def answers(tied, untied, requests, tmp_path_factory):
    """Every engine of this module but those that need processes of their own, run in one go."""
    folder = tmp_path_factory.mktemp("vllm")
    other_projector = folder / "other-projector"
    merge(MergeOptions(vlm=str(tied.vlm), llm=str(tied.llm), output=other_projector, seed=1))
    adapter = make_adapter(tied.merged, folder / "adapter")
    mixed = list(requests.values())
    small_chunks = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    jobs = [
        # The second round finds the first one's prompts in the prefix cache.
        {"name": "tied", "model": str(tied.merged), "rounds": [mixed, mixed]},
        {"name": "untied", "model": str(untied.merged), "rounds": [mixed], "engine": small_chunks},
        {
            "name": "names of memory",
            "model": str(with_names_of_memory(untied.merged, folder / "renamed")),
            "rounds": [mixed],
        },
        {"name": "other projector", "model": str(other_projector), "rounds": [mixed]},
        {
            "name": "LoRA",
            "model": str(tied.merged),
            "engine": {"enable_lora": True, "max_lora_rank": 8},
            "rounds": [[{**request, "lora": str(adapter)} for request in mixed], mixed],
        },
    ]
    return by_vllm(jobs, folder) | {"adapter": adapter}


@pytest.mark.parametrize("source", ["tied", "untied"])
def test_a_mixed_batch_gives_the_tokens_of_transformers(source, answers, requests, request):
    """Text, pictures and video in one batch; for `untied` in chunks of 64 tokens that cut prompts and pictures."""
    expected = by_transformers(request.getfixturevalue(source).merged, requests)
    assert tokens_of(requests, answers[source][0]) == expected
    longest = max(output["prompt_tokens"] for output in answers[source][0])
    assert longest > 64, "no prompt is longer than a chunk"


def test_the_prefix_cache_changes_no_token(answers, requests):
    first, second = answers["tied"]
    assert [output["tokens"] for output in second] == [output["tokens"] for output in first]
    cached = dict(zip(requests, (output["cached"] for output in second), strict=True))
    assert cached["two pictures"] > 0
    assert cached["picture after a long text"] > 0
    assert dict(zip(requests, (output["cached"] for output in first), strict=True))["two pictures"] == 0  # control


def test_the_names_of_memory_load_too(answers):
    assert answers["names of memory"] == answers["untied"]


def test_control_another_projector_layer_gives_other_tokens(answers, requests):
    """Only `visual.merger.mlp.4` differs: if vLLM skipped the layer, nothing here would."""
    ours, others = (tokens_of(requests, answers[job][0]) for job in ("tied", "other projector"))
    for name, request in requests.items():
        assert (ours[name] != others[name]) == ("prompt" in request and len(request) > 1), name


def test_an_adapter_on_the_llm_gives_the_tokens_of_peft(answers, requests, tied):
    adapted, plain = (tokens_of(requests, outputs) for outputs in answers["LoRA"])
    assert adapted == by_transformers(tied.merged, requests, answers["adapter"])
    assert plain == tokens_of(requests, answers["tied"][0])
    assert all(adapted[name] != plain[name] for name in requests)  # control: the adapter does something


def test_two_tensor_parallel_ranks_give_the_tokens_of_one(answers, requests, untied, tmp_path):
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    job = {"name": "two", "model": str(untied.merged), "rounds": [list(requests.values())], "engine": engine}
    two = by_vllm([job], tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1")["two"]
    assert tokens_of(requests, two[0]) == tokens_of(requests, answers["untied"][0])
