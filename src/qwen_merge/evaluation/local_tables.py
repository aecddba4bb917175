"""A score for a table of one's own with short answers, for which VLMEvalKit has none.

VLMEvalKit takes any `<LMUData>/<name>.tsv`. With columns A and B it is multiple choice and is scored; without, it is a
`CustomVQADataset`, whose answers are collected and whose `evaluate` is a bare NotImplementedError. With `openended` in
its name the questions get the request for short words that published sets get.

    python -m vlmeval.run --data MyTable_openended --model Qwen-Merge-VL-4B --judge exact_matching
"""

import json
from pathlib import Path
from typing import Any

from qwen_merge.errors import UserError


def accepted(answer: Any) -> list[str]:
    """The accepted answers of one row: the text itself, or each item of a JSON list. Never evaluated as code."""
    text = str(answer)
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except ValueError:
            return [text]
        if isinstance(items, list) and items and not any(isinstance(item, (dict, list)) for item in items):
            return [str(item) for item in items]
    return [text]


def exact_share(self, eval_file: str, **_: Any):
    """Percent of predictions that equal an accepted answer after VQA's usual clean-up (case, articles, punctuation).

    Writes `<eval_file>_acc.csv` in the form that VLMEvalKit's short-answer sets have: `Overall`, then each category.

    Raises:
        UserError: the table has no answers.
    """
    import pandas
    from vlmeval.dataset.utils.vqa_eval import process_answer
    from vlmeval.smp import dump, load

    rows = load(eval_file)
    if "answer" not in rows:
        raise UserError(f"{self.dataset_name}.tsv has no column `answer`, so there is nothing to score; add one.")
    clean = [process_answer(str(text)) for text in rows["prediction"]]
    marks = pandas.Series(
        [
            bool(said) and said in [process_answer(text) for text in accepted(answer)]
            for said, answer in zip(clean, rows["answer"], strict=True)
        ]
    )
    shares = {"Overall": 100 * marks.mean()}
    if "category" in rows:
        shares |= {str(name): 100 * part.mean() for name, part in marks.groupby(rows["category"].astype(str))}
    score = pandas.DataFrame({name: [round(value, 2)] for name, value in shares.items()})
    file = Path(eval_file)
    dump(score, str(file.with_name(f"{file.stem}_acc.csv")))
    return score


def score_local_tables() -> None:
    """Give VLMEvalKit's `CustomVQADataset` this score; safe to call again."""
    from vlmeval.dataset import image_vqa

    image_vqa.CustomVQADataset.evaluate = exact_share
