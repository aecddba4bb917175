"""`qwen-merge data check STAGE.yaml` and `qwen-merge data show SET`. Imports nothing heavy at its top."""

import argparse
from pathlib import Path

from qwen_merge.data.numbers import at_least

RECIPES = Path("examples/train_qwen_merge")


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    check = subparsers.add_parser(
        "check",
        help="a stage's sets, pictures, tokens and steps, before a GPU is rented",
        description="Reads a recipe and every row of its sets as LLaMA-Factory will: each set found, rows, bytes, "
        "pictures decode, <image> tags equal pictures, roles alternate, tokens, share over cutoff_len, steps. All "
        "problems are named at once, and then the exit code is 2. Needs the `train` extra and its overlay.",
    )
    check.add_argument("recipe", metavar="STAGE.yaml", type=Path, help="the recipe that llamafactory-cli will be given")
    check.add_argument(
        "overrides", metavar="key=value", nargs="*", help="values that replace the recipe's, as for llamafactory-cli"
    )
    check.add_argument(
        "--model",
        help="folder or hub id with the tokenizer and processor, when model_name_or_path is still to be trained "
        "(every stage has those of the base model)",
    )
    check.add_argument("--world-size", type=at_least(1), default=8, help="GPUs of all nodes (default: %(default)s)")
    check.add_argument(
        "--sample",
        type=at_least(1),
        metavar="N",
        help="read only N rows of each set, drawn uniformly; tokens and steps are then estimates (default: every row)",
    )
    check.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    check.add_argument(
        "--workers", type=at_least(1), help="processes (default: as many as cores, fewer for small sets)"
    )
    check.add_argument("--json", type=Path, help="also write the figures and problems to this file")
    check.set_defaults(run=_run_check)

    show = subparsers.add_parser(
        "show",
        help="one HTML page about a set: random rows with pictures, lengths, counts",
        description="Writes one page that needs nothing beside it: random rows with their pictures, texts and token "
        "counts as the stage's template and tokenizer make them, histograms of lengths and picture sizes, and what the "
        "manifest counted. Without the tokenizer the page has no token counts and says so.",
    )
    show.add_argument("set", metavar="SET", help="a name in dataset_info.json, or a folder or file of parquet")
    show.add_argument("--dataset-dir", type=Path, help="where dataset_info.json is (default: the recipe's, else data)")
    show.add_argument(
        "--recipe",
        type=Path,
        metavar="STAGE.yaml",
        help=f"whose template and tokenizer count (default: the first in {RECIPES} that names the set)",
    )
    show.add_argument("--model", help="folder or hub id with the tokenizer and processor (default: the recipe's)")
    show.add_argument("--rows", type=at_least(0), default=24, help="rows shown (default: %(default)s)")
    show.add_argument(
        "--measure",
        type=at_least(0),
        default=2000,
        help="rows measured for the histograms, 0 for all (default: %(default)s)",
    )
    show.add_argument("--seed", type=int, default=0, help="of the choice of both (default: %(default)s)")
    show.add_argument("--output", type=Path, help="the page (default: SET.html here)")
    show.set_defaults(run=_run_show)


def _run_check(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.check import run

    return run(arguments)


def _run_show(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.show import run

    return run(arguments)
