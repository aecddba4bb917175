"""What of the tests needs one of the two stacks, and why; conftest.py skips it on the other.

The first is .venv, the reproduction's pins; the second .venv-current.

    ./scripts/test.sh --stack current

Everything that is not named here runs on both stacks. A key is a file below tests/, or a pattern of tests in one.
"""

from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version

FIRST_STACK = {"transformers": "4.52.3"}  # what tells it from others

MS_SWIFT = "ms-swift and EvalScope are in the second stack's lock"
NEEDS_SECOND_STACK = {
    "integration/test_custom_vision_baseline.py": "Qwen3-VL itself needs transformers 4.57",
    "integration/test_simple_vl.py": MS_SWIFT,
    "unit/test_simple_vl_script.py": MS_SWIFT,
    "unit/test_swift.py": MS_SWIFT,
}
LLAMAFACTORY = "LLaMA-Factory learns the architecture by an overlay, which is for 0.9.3"
THINKING_BUDGETS = "thinking budgets are refused on vLLM 0.12"
MEND = "vLLM 0.12's kernels load without the mend"
NEEDS_FIRST_STACK = {
    "integration/test_overlays.py": "overlays are for the first stack's versions",
    "integration/test_training.py": LLAMAFACTORY,
    "integration/test_packed_training.py": LLAMAFACTORY,
    "integration/test_data_training.py": LLAMAFACTORY,
    "integration/test_demo_ablation_run.py": LLAMAFACTORY,
    "integration/test_data_distil.py": LLAMAFACTORY,
    "unit/test_bench_train.py::test_a_tiny_run*": LLAMAFACTORY,
    "unit/test_data_check.py": LLAMAFACTORY,
    "unit/test_data_show.py::test_every_row_is_there_with*": LLAMAFACTORY,
    "unit/test_data_show.py::test_a_set_of_which_no_row_can_be*": LLAMAFACTORY,
    "unit/test_graft_parts.py": LLAMAFACTORY,
    "integration/test_graft_training.py": LLAMAFACTORY,
    "integration/test_graft_zero3.py": LLAMAFACTORY,
    "integration/test_custom_vision.py": LLAMAFACTORY,
    "unit/test_layer_checkpointing.py": LLAMAFACTORY,
    "unit/test_recipes.py::test_llamafactory_accepts*": LLAMAFACTORY,
    "unit/test_templates.py": LLAMAFACTORY,
    "unit/test_training_and_inference.py": LLAMAFACTORY,
    "integration/test_vlmevalkit.py": "VLMEvalKit's run.py learns the options by an overlay",
    "integration/test_data_engines.py": "Ray is in the first stack's lock",
    "integration/test_env.py::test_a_half_made_environment*": "makes a .venv",
    "unit/test_vllm_plugin.py::test_one_byte_is_changed*": MEND,
    "unit/test_vllm_plugin.py::test_in_a_process_with_vllm*engines.py]": "vLLM 0.12 has one engine left",
    "unit/test_vllm_plugin.py::test_other_versions_stay_required": MEND,
    "integration/test_server.py::*budget*": THINKING_BUDGETS,
    "integration/test_server.py::test_a_thought_that_opens_late*": THINKING_BUDGETS,
    "integration/test_server.py::test_a_client_that_leaves*a thought]": THINKING_BUDGETS,
}


def first_stack() -> bool:
    try:
        return all(version(package) == wanted for package, wanted in FIRST_STACK.items())
    except PackageNotFoundError:
        return False


def reason_to_skip(node_id: str) -> str | None:
    """Why the test of this node id (`tests/unit/test_x.py::test_y[z]`) does not run here; None if it does."""
    which, listed = ("second", NEEDS_SECOND_STACK) if first_stack() else ("first", NEEDS_FIRST_STACK)
    test = node_id.removeprefix("tests/")
    for name, why in listed.items():
        if fnmatchcase(test, name if "::" in name else f"{name}::*"):
            return f"{which} stack only: {why}"
    return None
