"""`qwen-merge bench`: the measurements. Imports nothing heavy at its top."""

import argparse
from pathlib import Path

# What can be taken out of the fast recipe, to see what it gives.
TRAIN_CHANGES = ("packing", "compile", "optimizer", "checkpointing", "tower", "loss")
TRAIN_RECIPES = ("stock", "plain", "fast", *(f"fast-{change}" for change in TRAIN_CHANGES))


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("bench", help="measure what the kit says about its speed and memory")
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)

    merge = benches.add_parser(
        "merge",
        help="the merger against loading both models, and against a plain copy",
        description="Makes synthetic checkpoints of the real architectures, merges them in processes of their own and "
        "compares wall time, peak memory and bytes with `from_pretrained` + `save_pretrained` and with `cp`.",
    )
    merge.add_argument("--vlm-gb", type=float, default=3.0, help="size of the VLM (default: %(default)s)")
    merge.add_argument("--llm-gb", type=float, default=1.0, help="size of the LLM (default: %(default)s)")
    merge.add_argument("--repeats", type=int, default=3, help="rounds; the median is reported (default: %(default)s)")
    merge.add_argument(
        "--real-size",
        action="store_true",
        help="a Qwen3-4B-shaped LLM and a 72B-shaped VLM of which only the index and the files with visual.* exist; "
        "needs 32 GB of disk; no baseline, which would need some 290 GB of memory",
    )
    merge.add_argument(
        "--work-dir", type=Path, help="where the files go, removed afterwards (default: a temporary one)"
    )
    merge.add_argument("--json", type=Path, help="also write the figures to this file")
    merge.set_defaults(run=_run_merge)

    serve = benches.add_parser(
        "serve",
        help="vLLM on a merged model against a stock Qwen2.5-VL of the same shape",
        description="Makes both, of random weights; two engines in one process answer the same requests in turns.",
    )
    serve.add_argument("--requests", type=int, default=16, help="in one batch (default: %(default)s)")
    serve.add_argument("--new-tokens", type=int, default=48, help="an answer's length (default: %(default)s)")
    serve.add_argument("--repeats", type=int, default=7, help="rounds after a first one (default: %(default)s)")
    serve.add_argument("--json", type=Path, help="also write the figures to this file")
    serve.set_defaults(run=_run_serve)

    data = benches.add_parser(
        "data",
        help="the converter against loading, mapping and writing a whole set; rendering",
        description="Makes ReCap-shaped rows, converts them in processes of their own (one process, two, Ray) and "
        "compares rows a second and peak memory with `load_dataset`, `map`, `filter`, `to_parquet` of the whole set "
        "with decoded pictures.",
    )
    data.add_argument("--rows", type=int, default=8000, help="source rows of some 60 KB (default: %(default)s)")
    data.add_argument("--files", type=int, default=8, help="source files (default: %(default)s)")
    data.add_argument("--repeats", type=int, default=3, help="rounds; the median is reported (default: %(default)s)")
    data.add_argument("--no-ray", action="store_true", help="leave Ray out")
    data.add_argument("--memory", action="store_true", help="also peak memory for 4,000 and for 40,000 small rows")
    data.add_argument("--pictures", type=int, default=300, help="questions rendered; 0: none (default: %(default)s)")
    data.add_argument("--work-dir", type=Path, help="where the files go, removed afterwards (default: a temporary one)")
    data.add_argument("--json", type=Path, help="also write the figures to this file")
    data.set_defaults(run=_run_data)

    train = benches.add_parser(
        "train",
        help="training speed: stock recipe against fast recipe",
        description="Builds the model at real size with random weights and trains it through LLaMA-Factory on samples "
        "made by program, once with each recipe; prints real tokens a second, utilisation and where the time goes. "
        "stock: the plain recipe with transformers' own vision blocks and logits for all positions, as the original "
        "trains; fast-NAME: the fast recipe without one of its changes.",
    )
    train.add_argument("--size", choices=["tiny", "4B", "8B"], default="4B", help="(default: %(default)s)")
    train.add_argument("--stage", choices=["1", "2", "3"], default="2", help="(default: %(default)s)")
    train.add_argument(
        "--recipe",
        nargs="+",
        choices=TRAIN_RECIPES,
        metavar="RECIPE",
        default=["stock", "fast"],
        help=f"of {', '.join(TRAIN_RECIPES)} (default: stock fast)",
    )
    train.add_argument("--steps", type=int, default=8, help="measured steps (default: %(default)s)")
    train.add_argument("--warm-up", type=int, default=3, help="steps before them (default: %(default)s)")
    train.add_argument("--samples", type=int, default=2000, help="in the set (default: %(default)s)")
    train.add_argument(
        "--cards",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="GPUs of this machine; all but a single 1 run under torchrun and the recipe's DeepSpeed file (default: 1)",
    )
    train.add_argument("--zero", choices=["1", "2", "3"], help="that DeepSpeed file, for a single card, too")
    train.add_argument("--profiled", type=int, default=2, help="traced steps of such runs (default: %(default)s)")
    train.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)")
    train.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="change the recipes, both of them")
    train.add_argument(
        "--work-dir", type=Path, help="where the files go, removed afterwards (default: a temporary one)"
    )
    train.add_argument("--json", type=Path, help="also write the figures to this file")
    train.add_argument("--png", type=Path, help="also draw where the time goes")
    train.set_defaults(run=_run_train)

    scaling = benches.add_parser(
        "scaling",
        help="runs of bench train on several numbers of cards, as one table and one picture",
        description="Reads what `bench train --cards 1 2 4 --json FILE` wrote: real tokens a second a card, its share "
        "of a single card's, utilisation, the share of communication, the balance of the ranks, memory.",
    )
    scaling.add_argument("files", type=Path, nargs="+", metavar="FILE", help="written by `bench train --json`")
    scaling.add_argument("--markdown", type=Path, help="also write the table to this file")
    scaling.add_argument("--png", type=Path, help="also draw tokens a second over the number of cards")
    scaling.set_defaults(run=_run_scaling)

    importing = benches.add_parser("import-time", help="wall time of `qwen-merge --help`, and what it imports")
    importing.add_argument("--repeats", type=int, default=7, help="runs; the median is reported (default: %(default)s)")
    importing.set_defaults(run=_run_import_time)


def _run_merge(arguments: argparse.Namespace) -> int:
    from qwen_merge.bench.merge import run

    return run(arguments)


def _run_serve(arguments: argparse.Namespace) -> int:
    from qwen_merge.bench.serve import run

    return run(arguments)


def _run_data(arguments: argparse.Namespace) -> int:
    from qwen_merge.bench.data import run

    return run(arguments)


def _run_import_time(arguments: argparse.Namespace) -> int:
    from qwen_merge.bench.import_time import run

    return run(arguments)


def _run_scaling(arguments: argparse.Namespace) -> int:
    from qwen_merge.bench.train_report import compare

    return compare(arguments)


def _run_train(arguments: argparse.Namespace) -> int:
    from qwen_merge.bench.train import run

    return run(arguments)
