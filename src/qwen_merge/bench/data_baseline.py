"""The plain way to convert a ReCap-shaped set, as the yardstick: load all of it, map, filter, write it.

    python -m qwen_merge.bench.data_baseline SOURCE_FOLDER OUTPUT.parquet CACHE_FOLDER

`datasets` as its introduction shows it, and as the original uses it: pictures pass through PIL, so that every one is
decoded and encoded again. Kinder than it could be: the filter does not look at pictures.
"""

import os
import sys


def main(source: str, output: str, cache: str) -> None:
    os.environ.update(HF_HOME=cache, HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    from datasets import Features, Image, Sequence, Value, load_dataset

    roles = {"human": "user", "gpt": "assistant"}

    def convert(row: dict) -> dict:
        messages = [{"role": roles.get(turn["from"], ""), "content": turn["value"]} for turn in row["conversations"]]
        return {"messages": messages, "images": [row["image"]]}

    def good(messages: list[dict]) -> bool:
        alternating = [turn["role"] for turn in messages] == ["user", "assistant"] * (len(messages) // 2)
        return bool(messages) and alternating and sum(turn["content"].count("<image>") for turn in messages) == 1

    features = Features(
        {"messages": [{"role": Value("string"), "content": Value("string")}], "images": Sequence(Image())}
    )
    dataset = load_dataset("parquet", data_files=f"{source}/*.parquet", split="train")
    dataset = dataset.map(convert, remove_columns=dataset.column_names, features=features)
    dataset = dataset.filter(good, input_columns=["messages"])
    dataset.to_parquet(output)
    print(f"{len(dataset)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
