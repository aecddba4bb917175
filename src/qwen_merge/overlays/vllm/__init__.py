"""Teaches vLLM 0.9.1 and 0.12 both architectures through its own plug-in entry point: no file of vLLM is changed.

`pyproject.toml` names `register` under `vllm.general_plugins`. vLLM calls it in every process it starts (API server,
model inspection, engine core, workers), so that plain `vllm serve DIR` works wherever this package is installed.
`qwen-merge overlay verify vllm` proves it by effect. On 0.12 all of it works but thinking budgets: a
request that asks for one is refused.
"""

MODEL_TYPE, GRAFT = "qwen2_5_vl_merge", "qwen_merge_graft"
MODEL_TYPES = (MODEL_TYPE, GRAFT)
# Architecture, as config.json names it -> where vLLM imports it from.
MODEL_CLASSES = {
    name: f"{__name__}.{module}:{name}"
    for module, name in (
        ("model", "Qwen2_5_VL_MergeForConditionalGeneration"),
        ("graft", "QwenMergeGraftForConditionalGeneration"),
    )
}


def register() -> None:
    """Register configuration, model and what its requests need; safe to call again in every process.

    Imports no torch code of this package itself: vLLM imports the model by its name, when it needs it.
    """
    from vllm import ModelRegistry

    from qwen_merge.architecture import register as register_in_transformers
    from qwen_merge.overlays.vllm import chat, cpu, media, positions, reasoning, thinking_budget

    register_in_transformers()
    for architecture, model_class in MODEL_CLASSES.items():
        module, _, name = model_class.partition(":")
        registered = ModelRegistry.models.get(architecture)
        if (getattr(registered, "module_name", None), getattr(registered, "class_name", None)) != (module, name):
            ModelRegistry.register_model(architecture, model_class)
    positions.hook()
    chat.hook_placeholders()
    cpu.prepare()
    media.hook()
    reasoning.register()
    thinking_budget.hook()
    chat.hook_checks()
