"""`qwen-merge demo`: its options. Imports nothing heavy at its top."""

import argparse
from pathlib import Path

from qwen_merge.demo.variants import ABLATIONS

EPILOG = """\
Makes tiny checkpoints of the real architectures and a tiny world of pictures, joins the checkpoints, trains the four
stages with the kit's recipes through llamafactory-cli, asks held-out questions after each, and prints a table. No GPU
and no download; about a quarter of an hour on two cores. OUTPUT/report.html shows pictures, questions and answers.
Leaves with 1 when what was learned misses the goals, and says which.

--ablate NAME makes several grafts of the same two checkpoints instead, trains each with the same data and steps, and
compares them in OUTPUT/ablations/NAME: table.md, plot.png, results.json. With --resume, what an output already has is
used again, checkpoints and results:

{ablations}
"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="watch a tiny text model learn to see, on a CPU",
        epilog=EPILOG.format(
            ablations="\n".join(f"  {name:11} {question}" for name, (question, _) in ABLATIONS.items())
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="a new folder (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on in DIR; what is finished stays")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the checkpoints and the training runs")
    parser.add_argument("--ablate", choices=list(ABLATIONS), metavar="NAME", help=f"one of {', '.join(ABLATIONS)}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.ablate:
        from qwen_merge.demo.ablation import ablate

        return ablate(arguments.output, arguments.ablate, arguments.seed, arguments.resume)
    from qwen_merge.demo.run import Demo

    return Demo(arguments.output, arguments.seed, arguments.resume).run()
