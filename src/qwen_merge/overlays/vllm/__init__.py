"""Teaches vLLM 0.9.1 and 0.12 the architecture through its own plug-in entry point: no file of vLLM is changed.

`pyproject.toml` names `register` under `vllm.general_plugins`. vLLM calls it in every process it starts (API server,
model inspection, engine core, workers), so that plain `vllm serve DIR` works wherever this package is installed.
`qwen-merge overlay verify vllm` proves it by effect. On 0.12 all of it works but thinking budgets: a
request that asks for one is refused.
"""

ARCHITECTURE = "Qwen2_5_VL_MergeForConditionalGeneration"
MODEL_TYPE = "qwen2_5_vl_merge"
MODEL_CLASS = f"{__name__}.model:{ARCHITECTURE}"


def register() -> None:
    """Register configuration, model and what its requests need; safe to call again in every process.

    Imports no torch code of this package itself: vLLM imports the model by its name, when it needs it.
    """
    from vllm import ModelRegistry

    from qwen_merge.architecture import register as register_in_transformers
    from qwen_merge.overlays.vllm import chat, cpu, media, reasoning, thinking_budget

    register_in_transformers()
    module, _, name = MODEL_CLASS.partition(":")
    registered = ModelRegistry.models.get(ARCHITECTURE)
    if (getattr(registered, "module_name", None), getattr(registered, "class_name", None)) != (module, name):
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    chat.hook_placeholders()
    cpu.prepare()
    media.hook()
    reasoning.register()
    thinking_budget.hook()
    chat.hook_checks()
