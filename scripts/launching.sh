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

# The trainer writes trainer_state.json last, and the brace at its end.
is_whole() { [ -s "$1/trainer_state.json" ] && [ "$(tail -n 1 "$1/trainer_state.json")" = "}" ]; }

# A checkpoint that was cut short is one at which a trainer that takes the newest would stop on every launch.
set_aside_half_checkpoints() {
  local newest aside
  # One node does it, and before any process of the run has started: torchrun waits for the other nodes.
  [ -d "$1" ] && [ "${NODE_RANK:-0}" = 0 ] || return 0
  while newest=$(newest_checkpoint "$1")
    [ -n "$newest" ] && ! is_whole "$newest"; do
    aside=$1/incomplete-$(basename "$newest").$(date +%s)
    say "$newest was cut short while it was written; it is now $aside"
    mv "$newest" "$aside"
  done
}

# What a training began with is kept beside its output, not in it: LLaMA-Factory does not begin in a folder with files.
start_of() { printf '%s/.%s.started_from\n' "$(dirname "$1")" "$(basename "$1")"; }

# fingerprint MODEL: what tells it from another of its form, and from one that was made again in its place.
fingerprint() {
  [ -d "$1" ] || { printf '%s\n' "$1"; return; }   # a name on the hub
  { cat "$1/config.json" "$1"/*_manifest.json "$1/trainer_state.json" 2>/dev/null || true; } | sha256sum | cut -c -16
}

# same_start DIR MODEL [ROWS]: ends the script if what was trained in DIR began with another model; says so if its rows
# are others.
same_start() {
  local file was
  file=$(start_of "$1")
  [ -f "$file" ] || return 0
  mapfile -t was <"$file"
  if [ ! -e "$2" ] && [ "$(realpath -m -- "$2")" = "${was[0]}" ]; then return; fi   # removed since
  [ "${was[1]}" = "$(fingerprint "$2")" ] || die "$1 was trained from ${was[0]}, and this is $2: another model, or one" \
    "that was made again. Give another output folder; if it is the same all the same, remove $file."
  [ $# -lt 3 ] || [ "${was[2]-}" = "$3" ] || say "$1 was trained on '${was[2]-}', and goes on with '$3'"
}

# note_start DIR MODEL ROWS: for same_start, where a training begins.
note_start() {
  local from=$2
  [ "${NODE_RANK:-0}" = 0 ] || return 0
  if [ -d "$from" ]; then from=$(realpath "$from"); fi
  printf '%s\n' "$from" "$(fingerprint "$2")" "$3" >"$(start_of "$1")"
}

# holders DIR: the processes that have its lock, which the script that took it may have left behind.
holders() {
  local each found=()
  for each in /proc/[0-9]*; do
    if [ "$each/fd/8" -ef "$1" ] && [ "${each##*/}" != "$BASHPID" ] && [ "${each##*/}" != "$$" ]; then
      found+=("${each##*/}")
    fi
  done
  printf '%s\n' "${found[*]:-unknown}"
}

# One training an output folder. The lock is the folder's own; what `run` starts inherits it, but torchrun and its
# workers do not, so `run` waits for those.
lock() {
  [ "${NODE_RANK:-0}" = 0 ] || return 0
  mkdir -p "$1"
  exec 8<"$1"
  flock -n 8 || die "another training writes to $1 (process $(holders "$1")). Wait for it, or stop it."
}

# Runs a command in a session of its own and hands on SIGTERM, SIGINT and SIGHUP to all of it: llamafactory-cli and
# swift themselves would leave torchrun and its workers behind.
run() {
  local status=0 child=
  trap 'kill -TERM -- "-$child" 2>/dev/null || true' TERM INT HUP
  setsid "$@" &
  child=$!
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break   # a signal ends `wait` before the child has ended
  done
  for _ in {1..300}; do   # a launcher that was killed leaves torchrun, which first ends its workers: a minute at most
    kill -0 -- "-$child" 2>/dev/null || break
    sleep 0.2
  done
  trap - TERM INT HUP
  return "$status"
}
