#!/usr/bin/env bash
# The steps of docker/Dockerfile, which can also be run without Docker. Each is a layer of the image.
#
#   docker/install.sh environment    a virtual environment with what the lock holds
#   docker/install.sh vlmevalkit     VLMEvalKit at its commit, seen by the environment
#   docker/install.sh package        this package, the overlays, and the proof that they answer
#   docker/install.sh all            the three in this order
#
#   VENV=<checkout>/.venv            the environment; `environment` refuses one that exists
#   PYTHON=python3                   the base interpreter, 3.10 to 3.12
#   LOCK=gpu                         requirements/<LOCK>.lock. cpu is for trying the steps; the way to an environment
#                                    for a CPU is scripts/env.sh, which also gives vLLM its CPU kernels
#   BASE=none                        'image': the base interpreter's packages stay visible, and what they have at the
#                                    locked version is not installed again (docker/layer.py)
#   COMPILE=0                        1 writes bytecode, for an environment that its user cannot write to
#   VLMEVALKIT=<checkout>/../VLMEvalKit        scripts/eval.sh knows it by the same name. VLMEVALKIT_URL and
#                                    VLMEVALKIT_COMMIT say what is fetched
#   OVERLAYS="transformers llamafactory vlmevalkit"        VERIFY="$OVERLAYS vllm"
set -euo pipefail
shopt -s inherit_errexit
unset CDPATH PYTHONPATH
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

VENV=${VENV:-$root/.venv}
PYTHON=${PYTHON:-python3}
LOCK=${LOCK:-gpu}
BASE=${BASE:-none}
COMPILE=${COMPILE:-0}
VLMEVALKIT=${VLMEVALKIT:-$(dirname "$root")/VLMEvalKit}
VLMEVALKIT_URL=${VLMEVALKIT_URL:-https://github.com/open-compass/VLMEvalKit}
VLMEVALKIT_COMMIT=${VLMEVALKIT_COMMIT:-21b00fa509c9028c33db5b6a3f1feda8f9e97645}
OVERLAYS=${OVERLAYS:-transformers llamafactory vlmevalkit}
VERIFY=${VERIFY:-$OVERLAYS vllm}
export PYTHONNOUSERSITE=1 UV_LINK_MODE=${UV_LINK_MODE:-copy}

# A home of its own, so that no cache of a build or a check is left in the image.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$@"; exit 2; }
layer() { "$VENV/bin/python" "$root/docker/layer.py" "$@"; }

find_uv() {
  if command -v uv; then return; fi
  [ -x "$VENV/bin/uv" ] || "$VENV/bin/python" -m pip install -q --no-cache-dir --disable-pip-version-check uv
  echo "$VENV/bin/uv"
}

environment() {
  local lock=$root/requirements/$LOCK.lock uv options=() kept=()
  [ -f "$lock" ] || die "LOCK=$LOCK: there is no $lock; choose cpu or gpu."
  [ ! -e "$VENV" ] || die "$VENV exists; remove it, or name another VENV."
  "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
    die "PYTHON=$PYTHON is not a Python 3.10, 3.11 or 3.12."
  case $BASE in
    none) ;;
    # Without these two the image would hold them twice, 6 GB more, and nobody would notice.
    image) options=(--system-site-packages) kept=(--keep torch --keep vllm) ;;
    *) die "BASE=$BASE is not none or image." ;;
  esac
  say "making $VENV with $("$PYTHON" --version)"
  "$PYTHON" -m venv "${options[@]+"${options[@]}"}" "$VENV"
  uv=$(find_uv)
  # ms-vlmeval installs another state of the package `vlmeval` than VLMEVALKIT_COMMIT. The overlays write into
  # transformers and llamafactory, which must then not be the base's.
  local choice=(--without ms-vlmeval --own transformers --own llamafactory)
  layer missing "$lock" "${choice[@]}" "${kept[@]+"${kept[@]}"}" > "$scratch/rest.lock"
  [ "$COMPILE" = 0 ] || options=(--compile-bytecode)
  [ "$COMPILE" != 0 ] || options=()
  # --no-deps: the lock is the whole resolution; some of its pins override what a package declares.
  "$uv" pip install -q --python "$VENV/bin/python" --no-deps --require-hashes "${options[@]+"${options[@]}"}" \
    -r "$scratch/rest.lock"
  layer missing "$lock" "${choice[@]}" > "$scratch/rest.lock"
  [ ! -s "$scratch/rest.lock" ] || die "not installed after all: $(grep -o '^[^ ]*' "$scratch/rest.lock" | xargs)"
  layer launchers "$VENV/bin"
}

vlmevalkit() {
  local site
  [ ! -e "$VLMEVALKIT" ] || die "$VLMEVALKIT exists; remove it, or name another VLMEVALKIT."
  say "VLMEvalKit $VLMEVALKIT_COMMIT from $VLMEVALKIT_URL"
  git init -q "$VLMEVALKIT"
  git -C "$VLMEVALKIT" fetch -q --depth 1 "$VLMEVALKIT_URL" "$VLMEVALKIT_COMMIT"
  git -C "$VLMEVALKIT" -c advice.detachedHead=false checkout -q "$VLMEVALKIT_COMMIT"
  # Its requirements name almost no versions. They are not resolved, only compared with what the lock has given.
  layer satisfied "$VLMEVALKIT/requirements.txt"
  site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  ln -s "$VLMEVALKIT/vlmeval" "$site/vlmeval"
}

# overlay ACTION UPSTREAM …: VLMEvalKit is a checkout, the others are installed.
overlay() {
  local action=$1 upstream installed=()
  shift
  for upstream; do
    case $upstream in
      vlmevalkit) HOME=$scratch "$VENV/bin/qwen-merge" overlay "$action" vlmevalkit --root "$VLMEVALKIT" ;;
      *) installed+=("$upstream") ;;
    esac
  done
  [ ${#installed[@]} = 0 ] || HOME=$scratch "$VENV/bin/qwen-merge" overlay "$action" "${installed[@]}"
}

package() {
  local uv
  uv=$(find_uv)
  UV_CACHE_DIR=$scratch/uv "$uv" pip install -q --python "$VENV/bin/python" --no-deps --no-build-isolation -e "$root"
  # shellcheck disable=SC2086  # lists of names
  overlay apply $OVERLAYS
  # shellcheck disable=SC2086
  overlay verify $VERIFY
}

case ${1:-} in
  environment | vlmevalkit | package) "$1" ;;
  all)
    environment
    vlmevalkit
    package
    ;;
  *) die "usage: docker/install.sh environment|vlmevalkit|package|all" ;;
esac
