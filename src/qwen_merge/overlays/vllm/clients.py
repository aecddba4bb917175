"""The classes through which vLLM 0.9.1's servers reach an engine: one for V1, two for the older V0.

V0 answers where V1 cannot (`VLLM_USE_V1=0`, GPUs and options that V1 does not know). What stops an engine stops either,
so prompts are checked in front of both.
"""

from typing import Any


def of_v1() -> list[Any]:
    from vllm.v1.engine.async_llm import AsyncLLM

    return [AsyncLLM]


def of_v0() -> list[Any]:
    """Without those that stand for V1's client: with VLLM_USE_V1=1, the name AsyncLLMEngine does."""
    from vllm.engine.async_llm_engine import AsyncLLMEngine
    from vllm.engine.multiprocessing.client import MQLLMEngineClient

    return [client for client in (MQLLMEngineClient, AsyncLLMEngine) if client not in of_v1()]


def model_config_of(client):
    """The client's ModelConfig; that of V0 in the server's own process leaves it with its engine."""
    return client.model_config if hasattr(client, "model_config") else client.engine.model_config
