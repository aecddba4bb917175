"""`qwen-merge overlay verify`: ask an upstream for what the overlay should give, in a process of its own.

A file's text proves nothing (a second copy of the package may shadow it), so the upstream is imported as its users
import it, and what answers is compared with what this kit put there.
"""

import os
import subprocess
import sys
from pathlib import Path

from qwen_merge.errors import UserError
from qwen_merge.overlays import engine, manifest
from qwen_merge.overlays.manifest import Overlay


def _installed(upstream: str) -> Path | None:
    try:
        return manifest.find_package(upstream, None)
    except UserError:
        return None


def verify(overlay: Overlay, package: Path) -> bool:
    """Print one line a check; True when all of them hold."""
    print(f"{overlay.upstream} {overlay.release_of(package).version} ({package})")
    files_hold = True
    for file in engine.plan(overlay, package):
        if file.state is not engine.State.APPLIED:
            print(f"  FAIL  {file.path} is {file.state.value}")
            files_hold = False
    # A checkout named by --root comes first, so that it is what is imported. The environment's own package does not:
    # its folder may be a base environment's, whose other packages would then hide this one's newer ones.
    paths = [str(Path(__file__).parents[2])]
    if package != _installed(overlay.upstream):
        paths.insert(0, str(package.parent))
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
