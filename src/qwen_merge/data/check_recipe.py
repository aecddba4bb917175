"""A recipe as LLaMA-Factory reads it: its arguments, its tokenizer and processor, its template.

    qwen-merge data check examples/train_qwen_merge/train_qwen_merge_vl_4B_stage1.yaml

LLaMA-Factory's own parser and loaders are called, so that nothing is understood differently here than in training.
Only what needs a GPU is left out (DeepSpeed, the logger). Its import takes some 15 seconds.
"""

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_merge.errors import UserError

# What a machine without a GPU cannot parse, and what says nothing about data.
HERE = {"use_cpu": True, "report_to": "none", "deepspeed": None, "fsdp": ""}
# Image processors that say, or of which is known, how many tokens a picture of some size has.
COUNTED = ("Qwen2VLImageProcessor", "QwenMergeGraftImageProcessor")
PREPARE = "`qwen-merge overlay apply llamafactory` registers it"


@dataclass
class Arguments:
    """LLaMA-Factory's dataclasses: ModelArguments, DataArguments, TrainingArguments, FinetuningArguments."""

    model: Any
    data: Any
    training: Any
    finetuning: Any


def require_llamafactory() -> None:
    """Make LLaMA-Factory silent and importable.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process a worker, not a thread a core in each
    if importlib.util.find_spec("llamafactory") is None:
        raise UserError(
            "LLaMA-Factory is not installed; rows are counted with its own code. Install it with "
            "`pip install 'qwen-merge[train]'`, then `qwen-merge overlay apply llamafactory`."
        )


def read(path: Path, overrides: list[str] | None = None, model: str | None = None) -> dict:
    """The recipe with `key=value` overrides applied, as `llamafactory-cli train PATH key=value` reads it.

    Raises:
        UserError: no such file, no YAML, no mapping, or an override that is no key=value.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a recipe. Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected `key: value` lines, as in examples/.")
    wrong = [text for text in overrides or [] if "=" not in text]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: expected key=value, as in cutoff_len=4096.")
    try:
        given = OmegaConf.from_cli(overrides or [])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"{' '.join(overrides or [])}: a value is not YAML ({first}); expected key=value, as in cutoff_len=4096."
        ) from None
    try:
        config = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(content), given))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as LLaMA-Factory reads it ({first}).") from None
    assert isinstance(config, dict)
    if model is not None:
        config["model_name_or_path"] = model
    return {str(key): value for key, value in config.items()}


def parse(config: dict) -> tuple[Arguments | None, list[str]]:
    """The arguments, and what is wrong with the recipe. Unknown keys are left out so that the rest can be checked."""
    require_llamafactory()
    from llamafactory.hparams import parser

    problems = []
    known = {field.name for part in parser._TRAIN_ARGS for field in dataclasses.fields(part)}
    kept = {}
    for key, value in config.items():
        if key in known:
            kept[key] = value
        else:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ". Remove it."
            problems.append(f"{key} is no key of LLaMA-Factory{hint}")
    deepspeed = config.get("deepspeed")
    if isinstance(deepspeed, str) and not Path(deepspeed).is_file():
        problems.append(
            f"deepspeed: {deepspeed} is not a file, seen from {Path.cwd()}. Run from the repository's root."
        )
    if not config.get("dataset"):
        problems.append("dataset names no set; expected names of dataset_info.json, separated by commas.")
    if config.get("stage", "sft") != "sft":
        problems.append(f"stage: {config['stage']}; only sft, which all recipes of this kit are, can be checked.")
    try:
        with _restored_environment():
            model, data, training, finetuning, _ = parser._parse_train_args({**kept, **HERE})
    except (ValueError, TypeError, AssertionError, KeyError, OSError, ImportError) as error:
        return None, [*problems, f"LLaMA-Factory refuses the recipe: {error}"]
    if isinstance(data.cutoff_len, int) and data.cutoff_len > 0:
        return Arguments(model, data, training, finetuning), problems
    return None, [*problems, f"cutoff_len: {data.cutoff_len!r}; expected a number of tokens."]


@contextmanager
def _restored_environment() -> Iterator[None]:
    """TrainingArguments writes to os.environ (ACCELERATE_MIXED_PRECISION=bf16 among others), where whatever this
    process starts next would find it: a run that says `bf16: false` would train in bfloat16 all the same.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def load(arguments: Arguments) -> tuple[Any, Any, Any]:
    """Tokenizer, processor and template, fixed by LLaMA-Factory as for training.

    Raises:
        UserError: the model or the template is not there, or the model has no image processor.
    """
    from huggingface_hub.utils import logging as hub_logging
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.template import TEMPLATES
    from llamafactory.model import load_tokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # a missing model is one line of ours, not ten of retries
    name, problems = arguments.model.model_name_or_path, []
    template_name = arguments.data.template
    if template_name is not None and template_name not in TEMPLATES:
        problems.append(f"template {template_name} is unknown to LLaMA-Factory; if it is this kit's, {PREPARE}.")
    try:
        if _is_missing_output(name, arguments.training.output_dir):
            raise FileNotFoundError("there is no such folder")
        module = load_tokenizer(arguments.model)
    except (OSError, ValueError, KeyError) as error:
        cause = error.__cause__ or error
        first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        problems.append(
            f"model_name_or_path: no tokenizer and processor can be read from {name} ({first.rstrip('.')}). Without "
            "them no tokens are counted; if a stage still has to make it, give the base model with --model."
        )
        raise _explained(problems) from None
    tokenizer, processor = module["tokenizer"], module["processor"]
    if processor is None:
        problems.append(f"{name} has a tokenizer but no processor (preprocessor_config.json); pictures need one.")
    elif not (kind := type(processor.image_processor).__name__).startswith(COUNTED):
        problems.append(f"{name} has a {kind}; tokens of pictures can be counted for {' and '.join(COUNTED)} only.")
    if problems:
        raise _explained(problems)
    return tokenizer, processor, get_template_and_fix_tokenizer(tokenizer, arguments.data)


def _is_missing_output(name: str, output_dir: str) -> bool:
    """Whether the model is one that a stage or the merger has yet to make, which the hub need not be asked for."""
    path = Path(name)
    if path.exists():
        return False
    return path.is_absolute() or len(path.parts) != 2 or path.parts[0] == Path(output_dir).parts[0]


def _explained(problems: list[str]) -> UserError:
    return UserError(problems[0]) if len(problems) == 1 else UserError.from_list("cannot count tokens:", problems)
