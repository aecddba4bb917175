"""A copy of the checkout for scripts to run in: their outputs and stand-ins stay out of the repository."""

import shutil
import sys
from pathlib import Path

from training import REPOSITORY


def copied_checkout(folder: Path) -> Path:
    """The repository's scripts and examples, with this environment as `.venv`."""
    for name in ("examples", "scripts"):
        shutil.copytree(REPOSITORY / name, folder / name)
    (folder / "src").symlink_to(REPOSITORY / "src")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder
