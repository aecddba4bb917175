# shellcheck shell=bash
# What the scripts that start a trainer share: one training a folder, a kill that reaches all of it, and checkpoints
# that were cut short. Sourced by train.sh, simple_vl.sh and custom_vision.sh; runs nothing itself.

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }
die() { say "$@"; exit 2; }

# Weights are written after config.json, an index after its shards, so together they mean a whole model.
has_model() { [ -f "$1/config.json" ] && { [ -f "$1/model.safetensors" ] || [ -f "$1/model.safetensors.index.json" ]; }; }
has_adapter() { [ -f "$1/adapter_config.json" ] && [ -f "$1/adapter_model.safetensors" ]; }

# newest_checkpoint DIR: its checkpoint with the highest number, or nothing.
newest_checkpoint() {
  [ ! -d "$1" ] || find "$1" -maxdepth 1 -name 'checkpoint-*' -type d | sort -V | tail -n 1
}

# The trainer writes trainer_state.json last. A checkpoint without it was cut short, and a trainer that takes the newest
# would stop at it on every launch.
set_aside_half_checkpoints() {
  local newest aside
  # One node does it, and before any process of the run has started: torchrun waits for the other nodes.
  [ -d "$1" ] && [ "${NODE_RANK:-0}" = 0 ] || return 0
  while newest=$(newest_checkpoint "$1")
    [ -n "$newest" ] && [ ! -s "$newest/trainer_state.json" ]; do
    aside=$1/incomplete-$(basename "$newest").$(date +%s)
    say "$newest was cut short while it was written; it is now $aside"
    mv "$newest" "$aside"
  done
}

# One training an output folder: the lock is the folder's own, and the trainer inherits it, so that it holds as long as
# the trainer lives, even without this script.
lock() {
  [ "${NODE_RANK:-0}" = 0 ] || return 0
  mkdir -p "$1"
  exec 8<"$1"
  flock -n 8 || die "another training writes to $1. Wait for it, or stop it."
}

# Runs a command in a session of its own and hands on SIGTERM, SIGINT and SIGHUP to all of it: llamafactory-cli and
# swift themselves would leave torchrun and its workers behind.
run() {
  local status=0
  setsid "$@" &
  local child=$!
  trap 'kill -TERM -- "-$child" 2>/dev/null || true' TERM INT HUP
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break   # a signal ends `wait` before the child has ended
  done
  trap - TERM INT HUP
  return "$status"
}
