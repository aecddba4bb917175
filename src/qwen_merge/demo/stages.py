"""The four stages as the demo runs them: the kit's real recipes, and every value that the tiny world changes, with why.

A change is a `key=value` behind the recipe's name, which LLaMA-Factory merges over the file. Nothing else differs from
the real run: data set names, templates, what is frozen, schedule, warm-up and epochs are the recipe's.
"""

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path("examples/train_qwen_merge")
DATASET_INFO = Path("data/dataset_info.json")


@dataclass(frozen=True)
class Stage:
    """One training run. `form` is how its result is asked: `pt` (bare) or `chat` (ChatML with thoughts)."""

    name: str
    recipe: Path
    form: str
    batch: int
    learning_rate: float
    trains: str


STAGES = (
    Stage("stage1", RECIPES / "train_qwen_merge_vl_4B_stage1.yaml", "pt", 32, 2e-3, "projector"),
    Stage("stage2.1", RECIPES / "train_qwen_merge_vl_4B_stage2.1.yaml", "pt", 32, 1e-3, "projector and LLM"),
    Stage("stage2.2", RECIPES / "train_qwen_merge_vl_4B_stage2.2.yaml", "pt", 32, 1e-3, "projector and LLM"),
    Stage("stage3", RECIPES / "train_qwen_merge_vl_4B_stage3.yaml", "chat", 16, 1e-3, "projector and LLM"),
)


def overrides(stage: Stage, model: Path, data: Path, output: Path, seed: int) -> list[tuple[str, str, str]]:
    """(key, value, reason) of everything that differs from the recipe."""
    return [
        ("model_name_or_path", str(model), "the tiny checkpoint of the step before"),
        ("dataset_dir", str(data), "the tiny world under the same data set names"),
        ("output_dir", str(output), "the demo's own folder"),
        ("run_name", f"demo-{stage.name}", "as the output folder"),
        ("use_cpu", "true", "no GPU is needed"),
        ("bf16", "false", "a million parameters on a CPU are quicker and exacter in float32"),
        ("deepspeed", "null", "one process has nothing to share out"),
        ("report_to", "none", "no account, no network"),
        ("learning_rate", f"{stage.learning_rate:g}", "a model of a million parameters takes larger steps"),
        ("per_device_train_batch_size", str(stage.batch), "one process holds what several GPUs hold together"),
        ("gradient_accumulation_steps", "1", "the batch fits in one piece"),
        ("cutoff_len", "512", "the longest sample has about 80 tokens"),
        ("preprocessing_num_workers", "1", "starting sixteen processes takes longer than the work"),
        ("dataloader_num_workers", "0", "both cores already train"),
        ("preprocessing_batch_size", "1000", "tiny pictures are far from Arrow's 2 GiB"),
        ("seed", str(seed), "the demo's seed"),
    ]


def root() -> Path:
    """The repository's root: where the recipes are and where they expect to be run.

    Raises:
        UserError: the package was installed without the repository.
    """
    from qwen_merge.errors import UserError

    folder = Path(__file__).resolve().parents[3]
    needed = [*(stage.recipe for stage in STAGES), DATASET_INFO]
    missing = [str(path) for path in needed if not (folder / path).is_file()]
    if missing:
        raise UserError.from_list(
            f"the demo runs the repository's own recipes and these are not in {folder} "
            "(run it from a checkout with the package installed from there: pip install -e .):",
            missing,
        )
    return folder
