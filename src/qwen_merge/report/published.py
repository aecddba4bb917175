"""The published table, the settings it was made with, and where VLMEvalKit leaves each of its numbers.

The numbers are data, so that a report can stand beside them without anyone copying figures by hand. The file names and
columns are those that `vlmeval/dataset/*.py` writes at commit 21b00fa; ms-vlmeval 0.0.18 writes the same.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One column of the published table, as VLMEvalKit names, scores and stores it.

    `score` is what follows `<model>_<data set>` in the file name, `*` the judge. `row` selects (column, value) in a
    CSV with several rows. `scale` turns the number into percent. `judges` is a family of tasks whose judge is one
    choice; tasks of different families use different judges by nature, and None is scored without any.
    `questions` is the size of the whole set where it is known: a part of a set is not compared with the whole.
    """

    name: str
    dataset: str
    score: str
    column: str
    scale: float
    judges: str | None
    questions: int | None
    row: tuple[str, str] | None = None
    split: str | None = None  # the published one, where the file has several
    published_judge: str | None = "chatgpt-0125"  # the command's --judge


def _options(name: str, dataset: str, questions: int | None, split: str | None = None) -> Task:
    """Multiple choice: report_acc writes fractions, one row a split."""
    return Task(name, dataset, "_acc.csv", "Overall", 100, "options", questions, split=split)


def _short(name: str, dataset: str, questions: int) -> Task:
    """Short answers by rule: one row, columns are splits and `Overall`, already in percent."""
    return Task(name, dataset, "_acc.csv", "Overall", 1, None, questions, published_judge=None)


TASKS = (
    _options("WorldMedQA-V", "WorldMedQA-V", None),
    _short("TextVQA", "TextVQA_VAL", 5000),
    Task("OCRBench", "OCRBench", "_score.json", "Final Score Norm", 1, None, 1000, published_judge=None),
    Task("MMVet", "MMVet", "_*_score.csv", "acc", 1, "mmvet", 218, row=("Category", "Overall")),
    _options("AI2D_TEST", "AI2D_TEST", 3088),
    _short("ChartQA_TEST", "ChartQA_TEST", 2500),
    _options("MMStar", "MMStar", 1500),
    # Which split was published is not said. All four numbers are multiples of 1/150, which is the size of dev;
    # among the 900 of validation that would be a chance of 1 in 1296.
    _options("MMMU_DEV_VAL", "MMMU_DEV_VAL", 1050, split="dev"),
    # VLMEvalKit's LogicVista refuses the judge of the published command, so which one was used is unknown.
    Task(
        "LogicVista", "LogicVista", "_*_score.csv", "acc", 1, "logicvista", 447, ("Task&Skill", "Overall"), None, None
    ),
    Task("MathVista_MINI", "MathVista_MINI", "_*_score.csv", "acc", 1, "math", 1000, row=("Task&Skill", "Overall")),
    Task("MathVision_MINI", "MathVision_MINI", "_*_score.csv", "acc", 1, "math", 304, row=("Subject", "Overall")),
    _options("ScienceQA_VAL", "ScienceQA_VAL", 2097),
    _options("VisOnlyQA", "VisOnlyQA-VLMEvalKit", None),
)
BY_DATASET = {task.dataset: task for task in TASKS}

_NUMBERS = {
    "Qwen2.5-VL-3B-Instruct": "29.59 79.32 82.6 35.32 78.14 83.88 56.40 49.33 39.37 61.7 21.51 79.40 38.76",
    "Qwen2.5-VL-7B-Instruct": "25.70 85.36 88.2 37.75 81.06 85.96 64.27 54.00 47.43 66.5 27.30 89.46 43.34",
    "Qwen-Merge-VL-4B-stage3": "29.40 68.56 74.8 25.87 76.13 65.56 60.46 54.67 47.20 66.40 28.95 91.13 43.27",
    "Qwen-Merge-VL-8B-stage3": "28.00 69.97 75.5 33.67 78.36 66.00 61.86 58.00 48.77 67.90 34.21 91.75 44.18",
}
PUBLISHED: dict[str, dict[str, float]] = {
    model: dict(zip((task.dataset for task in TASKS), map(float, numbers.split()), strict=True))
    for model, numbers in _NUMBERS.items()
}
ROW_OF_SIZE = {"3B": "Qwen2.5-VL-3B-Instruct", "7B": "Qwen2.5-VL-7B-Instruct"} | {
    "4B": "Qwen-Merge-VL-4B-stage3",
    "8B": "Qwen-Merge-VL-8B-stage3",
}
CORRECTIONS = (
    "MathVista_MINI of the two Qwen-Merge models is the number its authors corrected later; "
    "first published were 45.81 (4B) and 53.05 (8B).",
    "MMMU_DEV_VAL is compared on dev: all four published numbers are multiples of 1/150, the size of that split.",
    "The settings behind the two Qwen2.5-VL rows are not stated, so no difference to them counts as comparable.",
)

# Of the Qwen-Merge rows; a seed was not published.
SETTINGS: dict[str, object] = {
    "min_pixels": 1280 * 28 * 28,
    "max_pixels": 16384 * 28 * 28,
    "max_new_tokens": 8192,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "post_process": True,
    "thinking": True,
}
SETTINGS_OF_ROW: dict[str, dict[str, object] | None] = {
    model: SETTINGS if model.startswith("Qwen-Merge") else None for model in PUBLISHED
}
