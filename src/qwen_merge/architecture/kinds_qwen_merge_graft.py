"""Names of what a graft can be made of, in one place: for the configuration, and for whoever reads a `graft.yaml`.

Imports nothing heavy: a file with a spelling mistake is refused before transformers is loaded.
"""

LLMS = ("qwen3", "qwen3_moe", "qwen2")  # `model_type` of the decoder
POSITIONS = ("mrope", "1d")
# Projectors: the settings of each beside its kind, and what each must be at least.
PROJECTORS: dict[str, dict[str, int]] = {
    "own": {},
    "extended": {},
    "patch_merger": {"merge_size": 1},
    "linear": {},
    "mlp": {"merge_size": 1, "hidden_size": 1},
    "resampler": {"queries": 1, "heads": 1},
}
OF_THE_SOURCE = ("own", "extended")  # projectors that go on with the patch merger of the tower's VLM
QUERIES = 256  # of a resampler, as in Qwen-VL

# The modules that travel with a checkpoint, which import each other by these names.
CODE = (
    "configuration_qwen2_5_vl_merge",
    "vision_qwen2_5_vl_merge",
    "modeling_qwen2_5_vl_merge",
    "kinds_qwen_merge_graft",
    "configuration_qwen_merge_graft",
    "projectors_qwen_merge_graft",
    "encoder_qwen_merge_graft",
    "towers_qwen_merge_graft",
    "modeling_qwen_merge_graft",
    "processing_qwen_merge_graft",
)
