"""`qwen-merge overlay verify`: ask an upstream for what the overlay should give, in a process of its own.

A file's text proves nothing (a second copy of the package may shadow it), so the upstream is imported as its users
import it, and what answers is compared with what this kit put there.
"""

import os
import subprocess
import sys
from pathlib import Path

from qwen_merge.overlays import engine
from qwen_merge.overlays.manifest import Overlay


def verify(overlay: Overlay, package: Path) -> bool:
    """Print one line a check; True when all of them hold."""
    print(f"{overlay.upstream} {overlay.release_of(package).version} ({package})")
    files_hold = True
    for file in engine.plan(overlay, package):
        if file.state is not engine.State.APPLIED:
            print(f"  FAIL  {file.path} is {file.state.value}")
            files_hold = False
    # The package first, so that a checkout named by --root is what is imported; then this kit.
    paths = [str(package.parent), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(
        [sys.executable, "-m", "qwen_merge.overlays.effects", overlay.upstream, str(package)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout, end="")
    if result.returncode not in (0, 1):  # the upstream did not even import
        print(f"  FAIL  {overlay.upstream} cannot be asked:\n{result.stderr[-2000:]}")
    if not files_hold:
        print(f"  Run `qwen-merge overlay apply {overlay.upstream}`.")
    return files_hold and result.returncode == 0
