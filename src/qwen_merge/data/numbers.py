"""Numbers as `qwen-merge data` takes them from its command line. Imports nothing heavy."""

import argparse
from collections.abc import Callable


def at_least(minimum: int) -> Callable[[str], int]:
    """A type for argparse: a whole number of at least `minimum`."""

    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value}; expected at least {minimum}")
        return value

    return number
