#!/usr/bin/env bash
# From nothing to a table: makes .venv when it is missing, then watches a tiny text model learn to see, on a CPU.
#
#   scripts/demo.sh                       into ./demo-output; the page to look at is demo-output/report.html
#   scripts/demo.sh --resume              go on after an interruption
#   scripts/demo.sh --output DIR --seed 1
set -euo pipefail
unset CDPATH
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

[ -x .venv/bin/qwen-merge ] || ./scripts/env.sh
export PATH="$PWD/.venv/bin:$PATH"   # llamafactory-cli is started by name, and starts torchrun by name
exec .venv/bin/qwen-merge demo "$@"
