"""`qwen-merge <step>`: one command for each step of the picture, in its order.

Each step's options live beside its code, in a `command.py` that imports nothing heavy at its top, so that
`qwen-merge --help` answers in a fraction of a second. The libraries' own commands (`llamafactory-cli train`,
`vllm serve`, ...) stay what users type; this one adds what they lack.
"""

import argparse
import importlib
import os
import sys

from qwen_merge import __version__
from qwen_merge.errors import UserError

# In the order of use. Each module has `add_parsers(subparsers)`; each parser sets `run`, a function of the arguments.
# The merger's puts graft.command's behind `merge`.
COMMAND_MODULES = (
    "qwen_merge.merger.command",
    "qwen_merge.overlays.command",
    "qwen_merge.data.command",
    "qwen_merge.chat.command",
    "qwen_merge.demo.command",
    "qwen_merge.report.command",
    "qwen_merge.bench.command",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen-merge",
        description="Join a vision encoder, a projector and an LLM - Qwen2.5-VL's and Qwen3, or others - and train, "
        "check and ask the result.",
    )
    parser.add_argument("--version", action="version", version=f"qwen-merge {__version__}")
    subparsers = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    for name in COMMAND_MODULES:
        importlib.import_module(name).add_parsers(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one step and return its exit code: 0 done, 1 a check failed, 2 the user can mend it."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"qwen-merge {arguments.step}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; Python would complain again when it flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"qwen-merge {arguments.step}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
