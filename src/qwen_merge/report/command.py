"""`qwen-merge report RUN...`: results, loss curves and answers on one page. Imports nothing heavy at its top."""

import argparse
from pathlib import Path


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "report",
        help="result folders and training logs to one HTML page and a Markdown table",
        description="Reads folders of VLMEvalKit (<work-dir>/<model>, or the work-dir itself) and output folders of "
        "LLaMA-Factory, in any mix, and writes one page that needs nothing beside it: the results beside the "
        "published ones, each with its settings, the loss curves, the lengths of the answers, and answers of "
        "different runs to the same question side by side. Numbers with different settings never share a column.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a folder to read")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the HTML page (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="also write the table of results as Markdown to this file")
    parser.add_argument(
        "--split-by-settings",
        action="store_true",
        help="one column for each group of equal settings where a run has several (default: an error that names them)",
    )
    parser.add_argument(
        "--samples", type=int, default=12, help="questions shown with every run's answer (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these questions (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qwen_merge.report.write import run

    return run(arguments)
