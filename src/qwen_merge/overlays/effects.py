"""The checks behind `qwen-merge overlay verify`, in the upstream: python -m qwen_merge.overlays.effects NAME FOLDER.

Each check builds something small and real, and raises when what answers is not this kit's.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

from qwen_merge.overlays.manifest import PACKAGES
from qwen_merge.overlays.vllm.effects import CHECKS as VLLM_CHECKS

MODEL_TYPE = "qwen2_5_vl_merge"
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": None,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "image_token_id": 125,
    "video_token_id": 126,
    "vision_start_token_id": 123,
    "vision_end_token_id": 124,
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
    },
}
# freeze_vision_tower, freeze_multi_modal_projector, freeze_language_model -> the groups that train
STAGES = {(True, False, True): {"projector"}, (True, False, False): {"projector", "LLM", "head"}}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def tiny_model(tie_word_embeddings: bool):
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(MODEL_TYPE, tie_word_embeddings=tie_word_embeddings, **TINY)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config)


def tiny_graft(tie_word_embeddings: bool):
    from qwen_merge.architecture.configuration_qwen_merge_graft import QwenMergeGraftConfig
    from qwen_merge.architecture.modeling_qwen_merge_graft import QwenMergeGraftForConditionalGeneration

    picture = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    not_the_llms = ("rope_scaling", "vision_config")
    config = QwenMergeGraftConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, **picture},
        projector_config={"kind": "mlp", "merge_size": 2},
        text_config={
            "model_type": "qwen3",
            "tie_word_embeddings": tie_word_embeddings,
            **{key: value for key, value in TINY.items() if key not in not_the_llms},
        },
    )
    return QwenMergeGraftForConditionalGeneration(config)


# --- transformers ---


def auto_classes_give_this_architecture() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForVision2Seq

    config = AutoConfig.for_model(MODEL_TYPE, **TINY)
    folder = f"transformers.models.{MODEL_TYPE}"
    require(type(config).__module__.startswith(folder), f"AutoConfig answers with {type(config)}")
    for auto_class, name in (
        (AutoModel, "Qwen2_5_VL_MergeModel"),
        (AutoModelForImageTextToText, "Qwen2_5_VL_MergeForConditionalGeneration"),
        (AutoModelForVision2Seq, "Qwen2_5_VL_MergeForConditionalGeneration"),
    ):
        model = auto_class.from_config(config)
        seen = f"{type(model).__module__}.{type(model).__name__}"
        require(seen == f"{folder}.modeling_{MODEL_TYPE}.{name}", f"{auto_class.__name__} answers with {seen}")


def processors_are_known() -> None:
    from transformers import AutoConfig
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    config_class = type(AutoConfig.for_model(MODEL_TYPE, **TINY))
    for mapping, name in (
        (PROCESSOR_MAPPING, "Qwen2_5_VLProcessor"),
        (IMAGE_PROCESSOR_MAPPING, "Qwen2VLImageProcessor"),
        (VIDEO_PROCESSOR_MAPPING, "Qwen2VLVideoProcessor"),
        (TOKENIZER_MAPPING, "Qwen2Tokenizer"),
    ):
        answer = mapping[config_class]
        first = answer[0] if isinstance(answer, tuple) else answer
        require(first.__name__ == name, f"expected {name}, got {first}")


def saves_keep_the_names_of_the_disk() -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForImageTextToText

    model = tiny_model(tie_word_embeddings=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder, "model.safetensors"), "pt") as file:
            names = set(file.keys())
        wrong = [name for name in names if name.startswith(("model.visual", "model.language_model"))]
        require(not wrong and "visual.merger.mlp.4.weight" in names, f"names on the disk: {sorted(names)[:3]} …")
        again = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    require(all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items()), "round trip differs")


def text_logits_equal_those_of_qwen3() -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = tiny_model(tie_word_embeddings=False).eval()
    text = {k: v for k, v in TINY.items() if k not in ("rope_scaling", "vision_config") and not k.endswith("_id")}
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**text)).eval()
    qwen3.model.load_state_dict(model.model.language_model.state_dict())
    qwen3.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        difference = (model(input_ids=ids).logits - qwen3(input_ids=ids).logits).abs().max().item()
    require(difference <= 1e-5, f"logits differ by {difference}")


# --- LLaMA-Factory ---


def templates_are_registered() -> None:
    from llamafactory.data.template import TEMPLATES, ReasoningTemplate

    for name in ("qwen_merge_vl", "qwen_merge_vl_pt"):
        require(name in TEMPLATES, f"no template {name}")
        plugin = TEMPLATES[name].mm_plugin
        require((plugin.image_token, plugin.video_token) == ("<|image_pad|>", "<|video_pad|>"), f"{name}: {plugin}")
    seen = type(TEMPLATES["qwen_merge_vl"])
    require(issubclass(seen, ReasoningTemplate), "qwen_merge_vl does not know thoughts")
    require(
        seen is not ReasoningTemplate, "qwen_merge_vl shows the thoughts of earlier turns, which inference does not"
    )


def freeze_groups_hold_under_the_model_type() -> None:
    from llamafactory.hparams import FinetuningArguments, ModelArguments
    from llamafactory.model.adapter import init_adapter
    from llamafactory.model.model_utils.qwen_merge import check_training
    from llamafactory.model.model_utils.qwen_merge_parts import part_of, parts_of

    for make, tied in product((tiny_model, tiny_graft), (True, False)):
        for (vision, projector, llm), expected in STAGES.items():
            model = make(tied)
            arguments = FinetuningArguments(
                finetuning_type="full",
                freeze_vision_tower=vision,
                freeze_multi_modal_projector=projector,
                freeze_language_model=llm,
            )
            init_adapter(model.config, model, ModelArguments(model_name_or_path="none"), arguments, True)
            trained = set()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    trained.add(part_of(parts_of(model.config), name))
            wanted = expected - {"head"} if tied else expected
            require(trained == wanted, f"{'tied' if tied else 'untied'}: {trained} train, the stage says {wanted}")
            check_training(model, arguments)


def a_wrong_trainable_set_stops_the_run() -> None:
    from llamafactory.hparams import FinetuningArguments, ModelArguments
    from llamafactory.model import loader

    arguments = FinetuningArguments(finetuning_type="full", freeze_vision_tower=True, freeze_language_model=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(tie_word_embeddings=False).save_pretrained(folder)
        model_arguments = ModelArguments(model_name_or_path=folder)
        tokenizer = SimpleNamespace(init_kwargs={})  # all that loading a model asks of it
        loader.load_model(tokenizer, model_arguments, arguments, is_trainable=True)
        # The control: freezing that does nothing, as with groups under a name that nobody looks up.
        loader.init_adapter = lambda config, model, *_: model
        try:
            loader.load_model(tokenizer, model_arguments, arguments, is_trainable=True)
        except SystemExit as stopped:
            require(stopped.code == 2, f"stopped with exit code {stopped.code}")
        else:
            raise AssertionError("a run in which everything trains was not stopped")


def the_model_group_is_listed() -> None:
    from llamafactory.extras.constants import DEFAULT_TEMPLATE, MULTIMODAL_SUPPORTED_MODELS, SUPPORTED_MODELS

    for name in ("Qwen-Merge-VL-4B", "Qwen-Merge-VL-8B"):
        require(name in SUPPORTED_MODELS and name in MULTIMODAL_SUPPORTED_MODELS, f"{name} is not listed")
        require(DEFAULT_TEMPLATE[name] == "qwen_merge_vl", f"{name} has template {DEFAULT_TEMPLATE[name]}")


def liger_kernels_are_dispatched() -> None:
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
    from llamafactory.hparams import ModelArguments
    from llamafactory.model.model_utils.liger_kernel import apply_liger_kernel
    from transformers import AutoConfig

    arguments = ModelArguments(model_name_or_path="none", enable_liger_kernel=True)
    config = AutoConfig.for_model(MODEL_TYPE, **TINY)
    apply_liger_kernel(config, arguments, is_trainable=True, require_logits=False)
    model = tiny_model(tie_word_embeddings=False)  # built, not run: the kernels need a GPU
    layer = model.model.language_model.layers[0]
    require(isinstance(layer.mlp, LigerSwiGLUMLP), f"the LLM's MLP is {type(layer.mlp)}")
    require(isinstance(layer.input_layernorm, LigerRMSNorm), f"the LLM's norm is {type(layer.input_layernorm)}")
    require(isinstance(model.visual.blocks[0].norm1, LigerRMSNorm), "the vision tower's norm is not Liger's")


# --- VLMEvalKit ---


def parsed_by_run(*arguments: str):
    """What `run.py` makes of a command line: its own in an installed package, the one beside it in a checkout."""
    import importlib

    import vlmeval

    installed = Path(next(iter(vlmeval.__path__)), "run.py").is_file()
    run = importlib.import_module("vlmeval.run" if installed else "run")
    before, sys.argv = sys.argv, ["run.py", *arguments]
    try:
        return run.parse_args()
    finally:
        sys.argv = before


def tiny_folder(parent: str, model_type: str) -> str:
    """As much of a checkpoint as choosing a class may look at."""
    folder = Path(parent, model_type, "Qwen2-VL-merger")  # a name that tells nothing, or the wrong thing
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    return str(folder)


def the_runner_takes_a_model_path_and_knows_the_entries() -> None:
    from vlmeval.config import supported_VLM

    from qwen_merge.evaluation.vlmevalkit import ENTRIES

    with tempfile.TemporaryDirectory() as folder:
        path = tiny_folder(folder, MODEL_TYPE)
        arguments = ["--data", "MMStar", "--model", "Qwen-Merge-VL-4B", "--model-path", path, "--work-dir", folder]
        seen = parsed_by_run(*arguments, "--reuse").model_path
        require(seen == path, f"--model-path gives {seen}")
        missing = [name for name in ENTRIES if name not in supported_VLM]
        require(len(ENTRIES) == 4 and not missing, f"entries that are not registered: {missing}")
        model = supported_VLM["Qwen-Merge-VL-4B"]()
        require(type(model).__module__ == "qwen_merge.evaluation.models", f"the entry gives {type(model)}")
        seen = (model.min_pixels, model.max_pixels, model.settings.temperature, model.model_path)
        require(seen == (1280 * 28 * 28, 16384 * 28 * 28, 0.6, path), f"the entry's settings are {seen}")


def the_model_type_decides_not_the_path() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_folder(folder, "qwen2_5_vl")
        try:
            parsed_by_run("--data", "MMStar", "--model", "Qwen-Merge-VL-4B", "--model-path", path, "--work-dir", folder)
        except SystemExit as stopped:
            require(stopped.code == 2, f"stopped with exit code {stopped.code}")
        else:
            raise AssertionError("a checkpoint of another model_type was taken")


def long_answers_survive_the_spreadsheet() -> None:
    import pandas
    from vlmeval.smp import dump, load

    answers = ["x" * 100_000, "", "None", "=2", "3"]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "answers.xlsx"))
        dump(pandas.DataFrame({"index": range(len(answers)), "prediction": answers}), file)
        seen = list(load(file)["prediction"])
    require(seen == answers, f"answers of lengths {[len(answer) for answer in answers]} come back as {seen!r:.200}")


CHECKS: dict[str, tuple[Callable[[], None], ...]] = {
    "transformers": (
        auto_classes_give_this_architecture,
        processors_are_known,
        saves_keep_the_names_of_the_disk,
        text_logits_equal_those_of_qwen3,
    ),
    "llamafactory": (
        templates_are_registered,
        freeze_groups_hold_under_the_model_type,
        a_wrong_trainable_set_stops_the_run,
        the_model_group_is_listed,
        liger_kernels_are_dispatched,  # last: it changes classes for the rest of the process
    ),
    "vllm": VLLM_CHECKS,
    "vlmevalkit": (
        the_runner_takes_a_model_path_and_knows_the_entries,
        the_model_type_decides_not_the_path,
        long_answers_survive_the_spreadsheet,
    ),
}


def main(upstream: str, package: str) -> int:
    # The libraries log to standard output, some through file descriptor 1: the report gets a copy of it for itself.
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = __import__(PACKAGES.get(upstream, upstream))
    origin = Path(next(iter(module.__path__))).resolve()
    if origin != Path(package):
        print(f"  FAIL  Python imports {upstream} from {origin}, not from {package}", file=report)
        return 1
    failed = 0
    for check in CHECKS[upstream]:
        title = check.__name__.replace("_", " ")
        try:
            check()
            print(f"  ok    {title}", file=report)
        except Exception as error:  # whatever an upstream raises, the other checks are worth knowing
            failed += 1
            print(f"  FAIL  {title}: {type(error).__name__}: {error}", file=report)
            traceback.print_exc()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
