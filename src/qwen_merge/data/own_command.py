"""`qwen-merge data import`: the options. Imports nothing heavy at its top."""

import argparse
from math import prod
from pathlib import Path

from qwen_merge.data.command import add_run_options
from qwen_merge.data.numbers import at_least

EPILOG = """\
FILE names the sets:

  my_dataset:
    annotation_path: annotations.json   # or JSONL; paths begin at the folder of FILE
    data_path: pictures                 # where relative paths of pictures and videos begin; default: the annotations'

A row has `image` and `video` (a path or a list of paths) and `conversations`, with a tag in a question for each:

  {"image": ["a.jpg", "b.jpg"], "conversations": [
    {"from": "human", "value": "<image><image>Which is older?"}, {"from": "gpt", "value": "The first."}]}

Recipes with `mask_history: true`, as those for grafts, have loss on a row's last answer alone. With --turns each every
answer is the last one of a row, so all are trained, each on what inference sends before it; a share is then one of the
answers, and a picture is written once for each answer that comes after it. (Where a recipe has loss on all answers,
keep rows whole: it would train a row's first answers several times.)

  qwen-merge data import my_dataset%50 other --sets my_sets.yaml --turns each
  llamafactory-cli train examples/custom_vision/one_stage.yaml dataset=my_dataset%50,other
"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "import",
        help="your own sets: JSON with image, video and conversations, or a share of it",
        description="Turns sets of your own into what the recipes read. Everything that is wrong with them is told at "
        "once,\nand then nothing is written. Pictures and videos are opened after that: those that cannot be are told\n"
        "together, too, and the rest is kept. --resume goes on from there, as it does after a kill.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sets", metavar="SET%SHARE", nargs="+", help="a set, or so many percent of its rows")
    parser.add_argument(
        "--sets", dest="registry", metavar="FILE", type=Path, required=True, help="names them (YAML, JSON)"
    )
    parser.add_argument("--output", type=Path, default=Path("data"), help="LLaMA-Factory's dataset_dir (default: data)")
    parser.add_argument("--seed", type=int, default=0, help="of the shares (default: %(default)s)")
    parser.add_argument(
        "--drop", action="store_true", help="leave out rows that cannot be used, and count them in the manifest"
    )
    parser.add_argument(
        "--shard-mb", type=at_least(1), default=512, metavar="N", help="MiB a shard at most (default: %(default)s)"
    )
    parser.add_argument(
        "--turns",
        choices=("whole", "each"),
        default="whole",
        help="each: every answer is a row of its own, with the turns before it (default: %(default)s; see the end)",
    )
    add_run_options(parser, "parts of a set")
    video = parser.add_argument_group("videos", "become pictures, taken evenly from first frame to last")
    video.add_argument(
        "--video-fps", metavar="N", type=rate, default=2.0, help="frames a second (default: %(default)s)"
    )
    video.add_argument(
        "--video-min-frames", metavar="N", type=at_least(1), default=4, help="of a video (default: %(default)s)"
    )
    video.add_argument(
        "--video-max-frames", metavar="N", type=at_least(1), default=8, help="of a video (default: %(default)s)"
    )
    video.add_argument(
        "--video-min-pixels", metavar="N", type=pixels, default="256*28*28", help="of a frame (default: %(default)s)"
    )
    video.add_argument(
        "--video-max-pixels", metavar="N", type=pixels, default="1024*28*28", help="of a frame (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def pixels(text: str) -> int:
    """`802816`, or factors of it as in 1024*28*28."""
    factors = text.split("*")
    if not all(factor.strip().isdecimal() and int(factor) for factor in factors):
        raise argparse.ArgumentTypeError(f"{text!r}; expected pixels, such as 1024*28*28")
    return prod(int(factor) for factor in factors)


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text}; expected more than 0 frames a second")
    return value


def _run(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.own_import import run

    return run(arguments)
