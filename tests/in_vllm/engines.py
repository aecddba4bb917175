"""Both of vLLM's engines have their prompts checked; the older one refuses thinking budgets.

Run by `tests/unit/test_vllm_plugin.py`, in a process of its own.
"""

from types import SimpleNamespace

import pytest

from qwen_merge.overlays.vllm import chat, clients, thinking_budget

CONFIG = SimpleNamespace(image_token_id=5, video_token_id=6, vision_start_token_id=7)


@pytest.fixture
def hooked(monkeypatch):
    """vLLM's engine clients with this kit's hooks over a `generate` that accepts everything; undone afterwards."""
    from vllm.entrypoints.openai.protocol import ChatCompletionRequest

    found = (*clients.of_v1(), *clients.of_v0())
    for client in found:
        monkeypatch.setattr(client, "generate", lambda self, prompt, params, request_id: "generated")
    for name in ("to_sampling_params", "to_beam_search_params"):
        original = getattr(ChatCompletionRequest, name)
        monkeypatch.setattr(ChatCompletionRequest, name, getattr(original, "__wrapped__", original))
    for _ in range(2):  # safe to call again
        thinking_budget.hook()
        chat.hook_checks()
    return {client.__name__: client for client in found}


def engine(client, model_type: str = "qwen2_5_vl_merge"):
    """As much of a client as the hooks look at."""
    config = SimpleNamespace(model_type=model_type, **vars(CONFIG))
    model_config = SimpleNamespace(hf_config=config)
    where = SimpleNamespace(model_config=model_config)
    return SimpleNamespace(engine=where) if client == "AsyncLLMEngine" else where


def params(budget: int | None):
    return SimpleNamespace(extra_args=None if budget is None else {"thinking_budget": budget})


@pytest.mark.parametrize("client", ["MQLLMEngineClient", "AsyncLLMEngine"])
def test_a_budget_is_refused_by_the_older_engine(hooked, client):
    generate = hooked[client].generate
    with pytest.raises(ValueError, match="needs vLLM's V1 engine, and this server runs the older V0"):
        generate(engine(client), {"prompt_token_ids": [1]}, params(5), "id")
    assert generate(engine(client), {"prompt_token_ids": [1]}, params(None), "id") == "generated"  # control
    assert generate(engine(client, "qwen3"), {"prompt_token_ids": [1]}, params(5), "id") == "generated"


@pytest.mark.parametrize("client", ["AsyncLLM", "MQLLMEngineClient", "AsyncLLMEngine"])
def test_prompts_are_checked_in_front_of_every_engine(hooked, client):
    generate = hooked[client].generate
    with pytest.raises(ValueError, match="no picture follows"):
        generate(engine(client), {"prompt_token_ids": [1, 7]}, params(None), "id")
    assert generate(engine(client), {"prompt_token_ids": [1]}, params(None), "id") == "generated"  # control
    assert generate(engine(client, "qwen3"), {"prompt_token_ids": [1, 7]}, params(None), "id") == "generated"
