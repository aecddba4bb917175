#!/usr/bin/env bash
# Qwen3-VL with another vision encoder on your own data: one step a call, in this order.
#
#   DATASET=my_dataset%50 SETS=my_sets.yaml scripts/custom_vision.sh data     your JSON to what training reads
#   scripts/custom_vision.sh baseline          Qwen3-VL-4B unchanged: are data and training sound? (second stack)
#   scripts/custom_vision.sh graft             its LLM with RAD-DINO and a new projector: rad-dino-4b-base
#   scripts/custom_vision.sh one_stage         trains projector and LoRA, the encoder frozen
#   scripts/custom_vision.sh stage1, stage2    the same in two stages, where one is not stable
#   scripts/custom_vision.sh export one_stage  (stage2, encoder) merges what was trained into a checkpoint
#   scripts/custom_vision.sh encoder           then trains the encoder, too, at a small rate
#   scripts/custom_vision.sh one_stage 8b      graft, and any step behind it, with the 8B in place of the 4B
#
# What stands behind a training step is key=value and changes a value of its recipe, examples/custom_vision/STEP.yaml;
# behind the other steps it goes to their commands:
#   DATASET=my_dataset%50 scripts/custom_vision.sh one_stage 8b learning_rate=5.0e-6 per_device_train_batch_size=2
#   scripts/custom_vision.sh export one_stage --infer_dtype float32
# `data` makes every answer a row of its own, because a row's last answer is trained: --turns whole leaves rows as they
# are, whose other answers are then only read.
#
#   DATASET             sets with or without a share, commas between them (default: what the recipe says)
#   SETS                the file that names them (default examples/custom_vision/sets.yaml, to be filled in)
#   GRAFT=FILE          another graft, for `graft` and each step behind it. Its output, without -base, names all that
#                       is made of it: siglip-base is trained to outputs/siglip-one-stage and merged to …-merged.
#                       SETS and GRAFT are files as seen from where you are. All else is as seen from the repository,
#                       below which all is written: a `source` or `output` in GRAFT, key=value, the options of export.
#   REPORT_TO, NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: as in scripts/train.sh
set -euo pipefail
unset CDPATH
here=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

. scripts/launching.sh   # say, die, lock, set_aside_half_checkpoints, run

case ${1:-} in -h | --help | "") sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; [ $# -gt 0 ]; exit ;; esac
step=$1 trained= made= name=
shift
case $step in
  data | baseline | graft | one_stage | stage1 | stage2 | encoder) ;;
  export)
    trained=${1:-}
    case $trained in
      one_stage | stage2 | encoder) shift ;;
      *) die "export of '$trained': expected one_stage, stage2 or encoder." ;;
    esac ;;
  *) die "unknown step '$step'; expected data, baseline, graft, one_stage, stage1, stage2, export or encoder." ;;
esac
size=4b
case ${1:-} in 4b | 8b | 4B | 8B) size=${1,,}; shift ;; esac

[ -x .venv/bin/qwen-merge ] || die "there is no .venv; run scripts/env.sh first."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

# given FILE DEFAULT: a file that was named is where the caller stands, the default one in the repository.
given() { case $1 in "") printf '%s\n' "$2" ;; /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$here/$1" ;; esac; }

graft=$(given "${GRAFT:-}" "examples/custom_vision/graft_$size.yaml")
[ -f "$graft" ] || die "GRAFT=$graft is not a file."

# base: where the graft is made. A file that says none ends the script where base is on a line of its own.
base() { qwen-merge graft --where "$graft"; }

# named: sets `made`, the graft's output, and `name`, by which the recipes' rad-dino-4b is replaced: a graft's
# training would take another one's output for its own, unfinished.
named() {
  made=$(base)
  name=$(basename "$made")
  name=${name%-base}
}

# value KEY STEP: of a recipe, for this graft.
value() {
  local found
  found=$(sed -n "s/^$1: *//p" "examples/custom_vision/$2.yaml")
  printf '%s\n' "${found/rad-dino-4b/"$name"}"
}

# recipe_values: sets `values`, what the recipe says otherwise for this size, this graft and these sets.
recipe_values() {
  local key
  values=()
  for key in model_name_or_path output_dir run_name; do values+=("$key=$(value "$key" "$step")"); done
  case $step in
    one_stage | stage1) values[0]=model_name_or_path=$made ;;
    baseline) values=("${values[@]/4b/"$size"}"); values=("${values[@]/4B/"${size^^}"}") ;;
  esac
  [ -z "${DATASET:-}" ] || values+=("dataset=$DATASET")
}

# trained_from ADAPTER: what its own adapter_config.json says.
trained_from() {
  python3 -c 'import json, sys; print(json.load(open(sys.argv[1])).get("base_model_name_or_path") or "")' \
    "$1/adapter_config.json"
}

same() { [ "$(realpath -m -- "$1")" = "$(realpath -m -- "$2")" ]; }

# export_of_what_was_trained ARGUMENT...: merges an adapter into what it was trained from, and into nothing else: the
# tensors of another model of this size have the same names and shapes, so that no library would notice.
export_of_what_was_trained() {
  local from unfinished adapter="" target="" given_from="" rest=()
  while [ $# -gt 0 ]; do
    case $1 in
      --adapter_name_or_path=*) adapter=${1#*=} ;;
      --model_name_or_path=*) given_from=${1#*=} ;;
      --export_dir=*) target=${1#*=} ;;
      --adapter_name_or_path | --model_name_or_path | --export_dir)
        [ $# -gt 1 ] || die "$1 has no value."
        set -- "$1=$2" "${@:3}"
        continue ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  [ -n "$target" ] || target=$(value output_dir "$trained")-merged
  if [ -z "$adapter" ]; then
    adapter=$(value output_dir "$trained")
    [ -f "$adapter/adapter_config.json" ] || die "export of $trained merges what $trained trained, and there is no" \
      "adapter in $adapter. Run scripts/custom_vision.sh $trained $size first, to its end, or name a checkpoint:" \
      "--adapter_name_or_path $adapter/checkpoint-N"
  fi
  [ -f "$adapter/adapter_config.json" ] || die "--adapter_name_or_path '$adapter' holds no adapter_config.json."
  from=$(trained_from "$adapter") || die "$adapter/adapter_config.json cannot be read."
  if [ -n "$given_from" ]; then
    # A base that has moved is named; one that is still there is the one.
    if [ -n "$from" ] && [ -e "$from" ] && ! same "$given_from" "$from"; then
      die "$adapter was trained from '$from', which is there, and --model_name_or_path is '$given_from'. Merged into" \
        "another model it would be neither. Leave the option out."
    fi
    from=$given_from
  else
    [ -n "$from" ] || die "$adapter/adapter_config.json does not say what it was trained from; name it with" \
      "--model_name_or_path DIR"
    if [ "$trained" = one_stage ] && ! same "$from" "$made"; then
      die "$adapter was trained from '$from', and $graft makes '$made'. Is GRAFT the file that it was trained with?" \
        "If it is '$from' all the same, say so: --model_name_or_path $from"
    fi
    [ -f "$from/config.json" ] || die "export of $trained merges into '$from', which holds no model." \
      "It is what $adapter was trained from; name it with --model_name_or_path DIR if it has moved."
  fi
  [ ! -e "$target" ] || die "$target exists already. Move it away to export again, or name another folder:" \
    "--export_dir DIR"
  # Under its name a result is whole: it is written beside it, in a folder of this export's own.
  unfinished=$target.unfinished-$$
  llamafactory-cli export --finetuning_type lora --trust_remote_code true --template qwen_merge_vl \
    --infer_dtype bfloat16 "${rest[@]+"${rest[@]}"}" \
    --model_name_or_path "$from" --adapter_name_or_path "$adapter" --export_dir "$unfinished"
  mv -T -- "$unfinished" "$target"
  printf 'custom_vision: %s, merged into %s, is %s\n' "$adapter" "$from" "$target" >&2
}

recipe=examples/custom_vision/$step.yaml
case $step in
  data)
    sets=$(given "${SETS:-}" examples/custom_vision/sets.yaml)
    [ -n "${DATASET:-}" ] || die "DATASET is not set: names out of $sets, such as my_dataset%50."
    # The recipes have loss on a row's last answer alone. What stands behind the step can say otherwise.
    exec qwen-merge data import "$DATASET" --sets "$sets" --turns each "$@" ;;
  graft) exec qwen-merge graft "$graft" "$@" ;;
  export)
    named
    export_of_what_was_trained "$@" ;;
  baseline)
    [ -x .venv-current/bin/llamafactory-cli ] || die "there is no .venv-current: scripts/env.sh --stack current"
    export PATH="$PWD/.venv-current/bin:$PATH"
    recipe_values
    [ -z "${REPORT_TO:-}" ] || values+=("report_to=$REPORT_TO")
    for each in "${values[@]}" "$@"; do case $each in output_dir=*) output=${each#*=} ;; esac; done
    lock "$output"
    set_aside_half_checkpoints "$output"
    run llamafactory-cli train "$recipe" "${values[@]}" "$@" ;;
  *)
    named
    recipe_values
    if [[ $step == one_stage || $step == stage1 ]] && [[ " $* " != *" model_name_or_path="* ]] && ! has_model "$made"; then
      die "there is no model in $made, which $graft makes: scripts/custom_vision.sh graft${GRAFT:+ (GRAFT=$GRAFT)}." \
        "If you made another graft, name it: GRAFT=FILE."
    fi
    exec scripts/train.sh "$recipe" "${values[@]}" "$@" ;;
esac
