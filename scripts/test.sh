#!/usr/bin/env bash
# All checks: style, types, tests. Makes .venv first when it is missing.
#
#   ./scripts/test.sh                      everything that needs no GPU (about 40 minutes on 2 cores)
#   ./scripts/test.sh -m 'not slow'        without the tests that start real trainers
#   ./scripts/test.sh tests/unit -k merger any other arguments of pytest
#   ./scripts/test.sh --stack current …    what runs on the second stack, .venv-current (about 20 minutes; tests/stacks.py)
set -euo pipefail
unset CDPATH
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
stack=pinned name=.venv
if [ "${1:-}" = --stack ]; then
  case "${2:-}" in
    pinned) ;;
    current) stack=current name=.venv-current ;;
    *) echo "test.sh: --stack ${2:-}: expected pinned or current." >&2; exit 2 ;;
  esac
  shift 2
fi
./scripts/env.sh --stack "$stack"
export PATH="$PWD/$name/bin:$PATH" PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if [ "$stack" = pinned ]; then  # style and types are the same sources' on both
  ruff check .
  ruff format --check .
  mypy
  for script in scripts/*.sh; do bash -n "$script"; done
fi
[ -n "$(type -P chromium chromium-browser google-chrome)" ] || echo "apt-get install chromium runs the page tests too"
# Two files at a time: most of the time goes into processes that start on one core. More would share ports and memory.
[ $# -gt 0 ] || set -- -m "not gpu" --durations=15 --numprocesses=2 --dist=loadfile
exec python -m pytest "$@"
