"""Training speed through LLaMA-Factory, recipe against recipe: `qwen-merge bench train`.

    qwen-merge bench train --size 4B --stage 2                 # on a GPU: stock and fast recipe, one after the other
    qwen-merge bench train --recipe fast fast-packing          # the fast recipe, and what it is without its packing
    qwen-merge bench train --size tiny --stage 1 --device cpu  # shows that it runs
    qwen-merge bench train --recipe fast --cards 1 2 4         # how it scales, under the recipe's DeepSpeed file

The model has the real sizes and random weights, the data are made by program: JPEG pictures and texts as long as those
of the stage's sets. Each recipe trains in a process of its own, on the same samples, through LLaMA-Factory's own code
(`train_worker`). On one card alone optimizer states are bfloat16 (`pure_bf16`), without DeepSpeed; with several numbers
of cards each runs under torchrun and DeepSpeed, one card too, so that like is compared with like. Utilisation is
counted as `train_flops` says, the share of communication and the balance of the ranks as `train_profile` does.

`plain` and `fast` are the recipes as this kit runs them; `stock` is the plain one with transformers' own vision blocks
and logits for all positions, as the original trains.
"""

import argparse
import copy
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qwen_merge.bench.command import TRAIN_RECIPES
from qwen_merge.bench.data import CAPTION, photograph
from qwen_merge.bench.train_report import draw, label, measured, show, summary
from qwen_merge.errors import UserError

EXAMPLES = Path(__file__).parents[3] / "examples/train_qwen_merge"
STAGE_FILES = {"1": "1", "2": "2.1", "3": "3"}
# What `fast-NAME` sets as in the plain recipe; the other names of TRAIN_CHANGES are settings of the worker.
AS_PLAIN = {
    "packing": ("neat_packing", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "compile": ("torch_compile",),
    "optimizer": ("optim",),
}
WORDS = tuple(CAPTION.split())

# Width and height of pictures, and how often each comes: photographs (captions); with documents, charts and diagrams
# (general sets); made by a text-to-image model (reasoning).
PHOTOS = {(640, 480): 6, (480, 640): 3, (500, 333): 3, (512, 512): 2, (1024, 683): 2, (336, 448): 1, (300, 225): 1}
GENERAL = {**PHOTOS, (800, 1100): 3, (850, 600): 2, (1280, 720): 1, (420, 140): 1, (224, 224): 1}
DRAWN = {(1024, 1024): 5, (512, 512): 3, (768, 512): 2, (512, 768): 2, (640, 480): 2}
# The pictures, the share of samples with one, and the median and spread (of the logarithm) of words a text.
SHAPES = {
    "1": (PHOTOS, 1.0, 200, 0.35),
    "2": (GENERAL, 0.9, 180, 0.6),
    "3": (DRAWN, 0.7, 600, 0.7),
}
PICTURES = 48  # different ones, which the samples take in turns
SET = "bench"
TINY_LLM = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 32,
}
TINY_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "fullatt_block_indexes": [1]}


def make_model(folder: Path, size: str) -> Path:
    """Everything of a merged checkpoint but the weights: configuration, tokenizer, processors."""
    from qwen_merge.bench.real_sizes import QWEN2_5_VL, QWEN3, vlm_shapes
    from qwen_merge.bench.synthetic import PREPROCESSOR
    from qwen_merge.demo.checkpoints import make_tokenizer
    from qwen_merge.merger.companions import CHAT_TEMPLATE, MATERIALS
    from qwen_merge.merger.configuration import merged_config
    from qwen_merge.merger.safetensors_file import StoredTensor

    vlm = copy.deepcopy(QWEN2_5_VL["72B"])
    llm = dict(QWEN3["0.6B" if size == "tiny" else size])
    if size == "tiny":
        llm.update(TINY_LLM)
        vlm["vision_config"].update(TINY_VISION, out_hidden_size=96)
        vlm.update(hidden_size=96, num_attention_heads=3, num_key_value_heads=1, intermediate_size=80)
        vlm["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    vlm["num_hidden_layers"] = 1  # of its LLM only the vision tower's neighbours matter
    for name in [name for name in vlm if name.endswith("_token_id")]:
        del vlm[name]  # the tokenizer's then
    stored = {
        name: StoredTensor("BF16", shape, "model.safetensors", 0, 2 * math.prod(shape))
        for name, shape in vlm_shapes({**vlm, "vocab_size": 8}).items()
        if name.startswith("visual.")
    }
    tokenizer = make_tokenizer(folder)
    if size == "tiny":
        llm["vocab_size"] = len(tokenizer)
    config = merged_config(vlm, llm, stored, tokenizer.get_vocab()).config
    config.pop("auto_map")  # no code beside it
    config["torch_dtype"] = "float32" if size == "tiny" else "bfloat16"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text((MATERIALS / CHAT_TEMPLATE).read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def make_data(folder: Path, stage: str, samples: int, shrink: int = 1) -> Path:
    """`samples` rows of the record format as one set; pictures and texts `shrink` times smaller."""
    from qwen_merge.data.schema import Record
    from qwen_merge.data.shards import ShardWriter

    sizes, share, words, spread = SHAPES[stage]
    dice = random.Random(0)
    drawn = dice.choices(list(sizes), list(sizes.values()), k=PICTURES)
    pictures = [photograph(seed, (width // shrink, height // shrink)) for seed, (width, height) in enumerate(drawn)]
    with ShardWriter(folder / SET, "part-00000") as writer:
        for number in range(samples):
            image = [pictures[number % len(pictures)]] if dice.random() < share else []
            length = max(4, min(int(dice.lognormvariate(math.log(words / shrink), spread)), 6000))
            answer = " ".join(dice.choices(WORDS, k=length))
            question = "<image>" * len(image) + " ".join(dice.choices(WORDS, k=max(4, 24 // shrink)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            writer.add(Record(turns, image))
        writer.close()
    entry = {
        "file_name": SET,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({SET: entry}), encoding="utf-8")
    return folder


def is_launched(options: argparse.Namespace) -> bool:
    """Whether the runs go through torchrun: several ranks, or one to compare several with."""
    return options.cards != [1]


def profiled(options: argparse.Namespace) -> int:
    """How many steps are traced behind the measured ones."""
    return options.profiled if is_launched(options) and options.device != "cpu" else 0


def arguments_of(recipe: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """LLaMA-Factory's arguments: the recipe's, with what the benchmark must change."""
    import yaml

    size = "4B" if options.size == "tiny" else options.size

    def read(suffix: str) -> dict[str, Any]:
        path = EXAMPLES / f"train_qwen_merge_vl_{size}_stage{STAGE_FILES[options.stage]}{suffix}.yaml"
        if not path.is_file():
            raise UserError(f"{path} is not there: the benchmark runs the recipes of a checkout. Run it from one.")
        return yaml.safe_load(path.read_text(encoding="utf-8"))

    values, (_, _, left_out) = read("_fast" if recipe.startswith("fast") else ""), recipe.partition("-")
    for name in AS_PLAIN.get(left_out, ()):
        del values[name]
        values.update({key: value for key, value in read("").items() if key == name})
    values.update(
        model_name_or_path=str(work / "model"),
        train_from_scratch=True,
        dataset_dir=str(work / "data"),
        dataset=SET,
        cache_dir=str(work / "cache" / recipe),
        output_dir=str(work / "output" / recipe),
        overwrite_output_dir=True,
        max_steps=options.warm_up + options.steps + profiled(options),
        warmup_ratio=0,
        report_to="none",
        plot_loss=False,
        save_strategy="no",
        preprocessing_num_workers=min(values["preprocessing_num_workers"], os.cpu_count() or 1),
        disable_tqdm=True,
    )
    if options.device == "cpu":
        values.update(use_cpu=True, bf16=False, deepspeed=None, cutoff_len=512, per_device_train_batch_size=2)
        values.update(gradient_accumulation_steps=1, dataloader_num_workers=0)
        if is_launched(options):
            values["ddp_backend"] = "gloo"
        values.pop("torch_compile", None)
    elif not is_launched(options):
        values.update(deepspeed=None, pure_bf16=True)
    elif options.zero is not None:
        values["deepspeed"] = f"examples/deepspeed/ds_z{options.zero}_config.json"
    for text in options.set:
        key, _, value = text.partition("=")
        values[key] = yaml.safe_load(value)
    return values


def measure(recipe: str, cards: int, options: argparse.Namespace, work: Path) -> dict:
    """One run in processes of its own: `ranks`, the figures of each, or what was said when memory ran out.

    Raises:
        UserError: it failed; the end of its output is in the message.
    """
    name = f"{recipe}-{cards}"
    job, output, log = work / f"{name}.json", work / f"{name}-figures", work / f"{name}.log"
    content = {"arguments": arguments_of(recipe, options, work), "device": options.device, "output": str(output)}
    upstream = ["tower", "loss"] if recipe == "stock" else [recipe.partition("-")[2]]
    content |= {"warm_up": options.warm_up, "upstream": upstream}
    content["profiled"] = profiled(options)
    job.write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, "-m", "qwen_merge.bench.train_worker", str(job)]
    if is_launched(options):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cards}"]
        command = [*launcher, *command[1:]]
    with log.open("wb") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    run = {"recipe": recipe, "cards": cards, "deepspeed": content["arguments"]["deepspeed"]}
    files = [work / f"{output.name}-{rank}.json" for rank in range(cards)]
    if not code and all(file.is_file() for file in files):
        return run | {"ranks": [json.loads(file.read_text()) for file in files]}
    text = log.read_text(errors="replace")
    if "out of memory" in text:
        words = ("Activation checkpointing:", "OutOfMemoryError:")
        return run | {"out_of_memory": [line for line in text.splitlines() if any(word in line for word in words)]}
    raise UserError(f"the {recipe} recipe failed on {cards} cards:\n{text[-3000:]}")


def run(options: argparse.Namespace) -> int:
    recipes = [recipe for recipe in TRAIN_RECIPES if recipe in options.recipe]
    content: dict[str, Any] = {"size": options.size, "stage": options.stage, "runs": []}
    with tempfile.TemporaryDirectory(prefix="qwen-merge-bench-", dir=options.work_dir) as folder:
        work = Path(folder)
        make_model(work / "model", options.size)
        make_data(work / "data", options.stage, options.samples, 8 if options.size == "tiny" else 1)
        for cards in options.cards:
            for recipe in recipes:
                figures = measure(recipe, cards, options, work)
                content["runs"].append(figures)
                show(figures)
                if options.json:  # after each: a later one may fail
                    options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    rates = {(run["recipe"], run["cards"]): summary(run)["tokens_per_second"] for run in measured(content)}
    for (recipe, cards), rate in rates.items():
        if recipe in ("stock", "plain") and ("fast", cards) in rates:
            print(f"fast / {label(recipe, cards)}, real tokens a second: {rates['fast', cards] / rate:.2f}")
        if cards > 1 and (recipe, 1) in rates:
            print(f"{label(recipe, cards)}: {rate / cards / rates[recipe, 1]:.1%} of {cards} times one card")
    if options.png:
        draw(content, options.png)
    return 0
