"""The variants of an ablation with one seed, each made, trained in two stages and asked, one after the other.

    python -m qwen_merge.demo.trial ABLATION_FOLDER SEED

One process for all of them, because a launch of LLaMA-Factory imports for most of a minute: what is called is what
`llamafactory-cli train` and `export` call behind their imports, with the demo's recipes and overrides. What has a
result is not done again, a stage that was cut off starts anew.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from qwen_merge.demo.stages import STAGES, Stage, overrides
from qwen_merge.demo.variants import Graft, Plan, Variant, result_file
from qwen_merge.errors import UserError

CAPTIONS, QUESTIONS = "LLaVA_ReCap_558K", "sharegpt4o"  # a set of each stage's recipe
TRAINED = ((STAGES[0], CAPTIONS), (STAGES[2], QUESTIONS))
CLOCK = "cpu_seconds.json"  # the last file of a finished stage
TEMPLATE = "qwen_merge_vl_pt"


def recipe_of(graft: Graft, plan: Plan, output: Path, seed: int) -> dict[str, Any]:
    """The content of its `graft.yaml`."""
    pixels = {"min_pixels": graft.pixels, "max_pixels": graft.pixels} if graft.pixels else {}
    return {
        "vision": {"source": plan.vlm, **pixels},
        "projector": dict(graft.projector),
        "llm": {"source": plan.llm},
        "positions": graft.positions,
        "seed": seed,
        "output": str(output),
    }


def make_graft(graft: Graft, plan: Plan, folder: Path, seed: int) -> Path:
    """The graft in `folder`/base, its file beside it.

    Raises:
        UserError: `qwen-merge graft` refuses it, and why.
    """
    import yaml

    from qwen_merge.graft.make import make
    from qwen_merge.graft.recipe import read

    output, file = folder / "base", folder / "graft.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe_of(graft, plan, output, seed), sort_keys=False))
    if not output.exists():
        make(read(file))
    return output


def settings(
    stage: Stage, dataset: str, model: Path, plan: Plan, output: Path, seed: int, steps: int
) -> dict[str, Any]:
    """What a launch of this stage has behind the recipe's name: the demo's overrides, and an ablation's own."""
    words = {key: value for key, value, _ in overrides(stage, model, Path(plan.data), output, seed)}
    return {
        **words,
        "trust_remote_code": "true",  # a graft brings its code
        "dataset": dataset,  # one set as large as needed; 84 small ones take longer to open than to learn
        "group_by_length": "true",  # else a third of the work is padding
        "max_steps": steps,
        "save_steps": 10**6,  # only the result: a stage takes a minute (a strategy of `no` is a YAML false)
        "overwrite_output_dir": "true",
        "logging_steps": 10,
        "plot_loss": "false",
    }


def train(stage: Stage, values: dict[str, Any]) -> Path:
    """One stage, unless it was finished before. Returns its checkpoint."""
    output = Path(values["output_dir"])
    if (output / CLOCK).is_file():
        return output
    from llamafactory.train.tuner import run_exp
    from omegaconf import OmegaConf
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Of the processor, on one thread: who else uses the machine makes little difference."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.began = time.process_time()

        def on_train_end(self, args, state, control, **kwargs):
            self.seconds = time.process_time() - self.began

    shutil.rmtree(output, ignore_errors=True)
    words = OmegaConf.from_dotlist([f"{key}={value}" for key, value in values.items()])
    clock = Clock()
    run_exp(OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(stage.recipe), words)), [clock])
    (output / CLOCK).write_text(json.dumps(round(clock.seconds, 1)))
    return output


def merged(base: Path, adapter: Path) -> Path:
    """A LoRA adapter in its base, as `llamafactory-cli export` writes it."""
    from llamafactory.train.tuner import export_model

    output = adapter.with_name(f"{adapter.name}-merged")
    shutil.rmtree(output, ignore_errors=True)
    export_model(
        {
            "model_name_or_path": str(base),
            "adapter_name_or_path": str(adapter),
            "export_dir": str(output),
            "finetuning_type": "lora",
            "template": TEMPLATE,
            "trust_remote_code": True,
            "infer_dtype": "float32",
        }
    )
    return output


def parameters(checkpoint: Path, prefixes: tuple[str, ...] = ("",)) -> int:
    """How many there are in the tensors that begin so, of a checkpoint or an adapter."""
    from safetensors import safe_open

    total = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                if name.startswith(prefixes):
                    shape = tensors.get_slice(name).get_shape()
                    product = 1
                    for side in shape:
                        product *= side
                    total += product
    return total


def moved(before: Path, after: Path) -> int:
    """How many parameters are in tensors that differ between two checkpoints."""
    from safetensors.torch import load_file

    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return sum(new[name].numel() for name in old if not old[name].equal(new[name]))


def tokens_of_a_picture(checkpoint: Path) -> int:
    """As its own processor counts them."""
    from transformers import AutoProcessor

    from qwen_merge.architecture import register
    from qwen_merge.demo.world import Stream

    register()
    processor = AutoProcessor.from_pretrained(checkpoint)
    stream = Stream("held-out picture to count the tokens of")
    picture = stream.drawing(stream.scene("shape"))
    ids = processor(text=[processor.image_token], images=[picture])["input_ids"][0]
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return sum(token == image for token in ids)


def trial(plan: Plan, variant: Variant, folder: Path, seed: int) -> dict[str, Any]:
    """Make, train and ask one variant. A graft that is refused gives the reason and nothing else."""
    from qwen_merge.demo.evaluation import evaluate

    began = time.monotonic()
    shared, own = folder / f"seed{seed}" / variant.graft.name, folder / f"seed{seed}" / variant.name
    try:
        base = make_graft(variant.graft, plan, shared, seed)
    except UserError as refusal:
        return {"refused": str(refusal)}
    checkpoint, trained, times = base, 0, [0.0]
    if variant.changes is not None:
        outputs, model = (shared / STAGES[0].name, own / STAGES[2].name), base
        for (stage, dataset), output, steps in zip(TRAINED, outputs, plan.budget.steps, strict=True):
            values = settings(stage, dataset, model, plan, output, seed, steps)
            before, model = model, train(stage, {**values, **(variant.changes if stage is STAGES[2] else {})})
            times.append(json.loads((model / CLOCK).read_text()))
        if variant.changes.get("finetuning_type") == "lora":
            trained, checkpoint = parameters(model), merged(before, model)
        else:
            trained, checkpoint = moved(before, model), model
    result = evaluate(checkpoint, "pt", plan.seed, plan.budget.asked)
    del result["examples"]
    return {
        **result,
        "tokens": tokens_of_a_picture(base),
        "projector_parameters": parameters(base, ("projector.", "visual.merger.")),
        "trained_parameters": trained,
        "cpu_seconds": round(sum(times), 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        raise UserError("usage: python -m qwen_merge.demo.trial ABLATION_FOLDER SEED")
    folder, seed = Path(argv[0]), int(argv[1])
    plan = Plan.load((folder / "plan.json").read_text())
    if missing := [parent for parent in (plan.vlm, plan.llm) if not Path(parent, "config.json").is_file()]:
        raise UserError.from_list(
            "the parents of the grafts are gone; take another --output:",
            [f"{path} holds no config.json" for path in missing],
        )
    for variant in plan.variants:
        target = result_file(folder, variant, seed)
        if target.exists():
            continue
        result = trial(plan, variant, folder, seed)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        fresh.write_text(json.dumps(result, indent=1) + "\n")
        fresh.replace(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
