"""`qwen-merge data …`: the options of the data step. Imports nothing heavy at its top."""

import argparse
import importlib
from pathlib import Path

from qwen_merge.data.numbers import at_least

CONVERT_EPILOG = """\
SET is a name that `qwen-merge data sets` prints, its configuration on the hub, or a group: recap, synthdog, onevision.
A set appears complete or not at all, as a folder of parquet shards with a manifest beside it that says where every row
went. A run can be killed at any time: --resume goes on with it. A set that is finished is not done again.

  qwen-merge data convert LLaVA_ReCap_558K --workers 8
  qwen-merge data convert onevision --input copies/LLaVA-OneVision-Data --workers 8 --resume
"""
# More commands of this step, each with `add_parsers(subparsers)`.
COMMAND_MODULES: tuple[str, ...] = (
    "qwen_merge.data.own_command",
    "qwen_merge.data.distil_command",
    "qwen_merge.data.look_command",
)


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    data = subparsers.add_parser("data", help="prepare the training sets: convert, distil, check and look at them")
    steps = data.add_subparsers(dest="data_step", metavar="COMMAND", required=True)

    convert = steps.add_parser(
        "convert",
        help="ReCap, SynthDoG and LLaVA-OneVision to the record format",
        epilog=CONVERT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("sets", metavar="SET", nargs="+", help="what to convert")
    add_convert_options(convert)
    convert.set_defaults(run=_convert)

    sets = steps.add_parser("sets", help="the sets, where they come from, and what is there of them")
    sets.add_argument("--output", type=Path, default=Path("data"), help="say what is there (default: %(default)s)")
    sets.set_defaults(run=_sets)

    for name in COMMAND_MODULES:
        importlib.import_module(name).add_parsers(steps)


def run_script(group: str, description: str, argv: list[str]) -> int:
    """The reproduction's own scripts: `convert` for one group of sets.

    Args:
        group: "recap", "synthdog" or "onevision"; a SET outside it is an error.
    """
    from qwen_merge import cli
    from qwen_merge.data.sets import find_sets
    from qwen_merge.errors import UserError

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("sets", metavar="SET", nargs="*", help="some of the sets (default: all of them)")
    add_convert_options(parser)
    sets = parser.parse_args(argv).sets
    try:
        others = [entry.name for entry in find_sets(sets) if entry.group != group]
        if others:
            raise UserError(f"not {group}: {', '.join(others)}. `qwen-merge data convert` converts any set.")
    except UserError as error:
        parser.error(str(error))
    return cli.main(["data", "convert", *([] if sets else [group]), *argv])


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """The options of a conversion; the reproduction's own scripts take the same."""
    parser.add_argument(
        "--input", type=Path, help="a local copy: a file, folder or glob of parquet, arrow or tar files"
    )
    parser.add_argument("--output", type=Path, default=Path("data"), help="LLaMA-Factory's dataset_dir (default: data)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: main, its commit is recorded)")
    parser.add_argument(
        "--max-rows",
        type=at_least(0),
        metavar="N",
        help="a uniform sample of at most N rows a set; 0: all (default: 2000000 for ReCap, else all)",
    )
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="only the first N source rows, no sample of them: for trials"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument(
        "--shard-mb", type=at_least(1), default=512, metavar="N", help="MiB a shard at most (default: %(default)s)"
    )
    parser.add_argument(
        "--decontaminate",
        type=Path,
        nargs="+",
        default=[],
        metavar="TSV",
        help="evaluation sets (VLMEvalKit's files) whose pictures and questions are dropped",
    )
    add_run_options(parser, "files")


def add_run_options(parser: argparse.ArgumentParser, units: str) -> None:
    """How the units of a set are done, and what becomes of one that is there."""
    parser.add_argument("--workers", type=at_least(1), default=1, metavar="N", help=f"{units} at a time (default: 1)")
    parser.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="who runs the workers (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with sets that were begun and not finished")
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew, and replace a set when the new one is complete"
    )


def _convert(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.convert import run

    return run(arguments)


def _sets(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.sets import describe

    print(describe(arguments.output))
    return 0
