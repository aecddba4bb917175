"""The classes through which vLLM's servers reach an engine.

vLLM 0.9.1 has one for V1 and two for the older V0, which answers where V1 cannot (`VLLM_USE_V1=0`, GPUs and options
that V1 lacks). What stops an engine stops either, so prompts are checked in front of both. vLLM 0.12 has V1 alone,
and makes a request of the engine's out of every prompt before it calls `generate`: there that maker is hooked.
"""

from typing import Any


def request_maker() -> Any:
    """What makes an engine's request of a prompt in vLLM 0.12; None in 0.9.1, whose clients do."""
    try:
        from vllm.v1.engine.input_processor import InputProcessor
    except ImportError:
        return None
    return InputProcessor


def of_v1() -> list[Any]:
    """Those that are given prompts."""
    if request_maker():
        return []
    from vllm.v1.engine.async_llm import AsyncLLM

    return [AsyncLLM]


def of_v0() -> list[Any]:
    """Without those that stand for V1's client: with VLLM_USE_V1=1, the name AsyncLLMEngine does."""
    if request_maker():
        return []
    from vllm.engine.async_llm_engine import AsyncLLMEngine
    from vllm.engine.multiprocessing.client import MQLLMEngineClient

    return [client for client in (MQLLMEngineClient, AsyncLLMEngine) if client not in of_v1()]


def model_config_of(client):
    """The client's ModelConfig; that of V0 in the server's own process leaves it with its engine."""
    return client.model_config if hasattr(client, "model_config") else client.engine.model_config
