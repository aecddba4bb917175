"""`qwen-merge overlay`: teach installed or checked-out upstreams the architecture, prove it, take it back."""

import argparse
from pathlib import Path


def add_parsers(subparsers) -> None:
    parser = subparsers.add_parser("overlay", help="apply, check or revert the changes to the upstream libraries")
    parser.add_argument("action", choices=("apply", "status", "verify", "revert"))
    known = "transformers, llamafactory, vllm, vlmevalkit (default: all)"
    parser.add_argument("upstreams", nargs="*", metavar="UPSTREAM", help=known)
    parser.add_argument("--root", type=Path, help="a checkout or site-packages folder instead of this environment")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """One line an upstream. Exit code 1 when `verify` finds something missing."""
    from qwen_merge.errors import UserError
    from qwen_merge.overlays import engine, manifest

    unknown = sorted(set(arguments.upstreams) - set(manifest.UPSTREAMS))
    if unknown:
        raise UserError(f"no overlay for {', '.join(unknown)}; there are: {', '.join(manifest.UPSTREAMS)}.")
    failed = False
    found = []
    for upstream in dict.fromkeys(arguments.upstreams or manifest.UPSTREAMS):
        overlay = manifest.load(upstream)
        found.append((upstream, overlay, manifest.find_package(upstream, arguments.root)))
        overlay.release_of(found[-1][-1])  # all of them are there and fit, before the first one is changed
    for upstream, overlay, package in found:
        if arguments.action == "verify":
            from qwen_merge.overlays import verify

            failed |= not verify.verify(overlay, package)
            continue
        if arguments.action == "status":
            before = engine.plan(overlay, package)
        else:
            before = (engine.apply if arguments.action == "apply" else engine.revert)(overlay, package)
        print(f"{upstream} {overlay.release_of(package).version}: {_summary(arguments.action, before)} ({package})")
    return int(failed)


def _summary(action: str, files: list) -> str:
    from qwen_merge.overlays.engine import State

    if not files:
        return "registered by its plug-in entry point; there is nothing to apply or revert"
    states = {file.state for file in files}
    if action == "apply":
        return "already applied" if states == {State.APPLIED} else f"applied to {len(files)} files"
    if action == "revert":
        return "was not applied" if states == {State.PRISTINE} else f"reverted in {len(files)} files"
    if len(states) == 1:
        return states.pop().value
    listed = "".join(f"\n  {file.state.value:9} {file.path}" for file in files)
    advice = {State.CHANGED: "changed by somebody else", State.OUTDATED: "from another version; run apply"}
    reason = next((text for state, text in advice.items() if state in states), "interrupted; run apply or revert")
    return f"partly applied: {reason}{listed}\n "
