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
#
#   DATASET             sets with or without a share, commas between them (default: what the recipe says)
#   SETS                the file that names them (default examples/custom_vision/sets.yaml, to be filled in)
#   GRAFT=FILE          another graft; its output is what one_stage and stage1 start from
#                       Both as seen from where you are. All that is written goes below the repository.
#   REPORT_TO, NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: as in scripts/train.sh
set -euo pipefail
unset CDPATH
here=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

. scripts/launching.sh   # say, die, lock, set_aside_half_checkpoints, run

case ${1:-} in -h | --help | "") sed -n '2,24s/^# \{0,1\}//p' "$0"; [ $# -gt 0 ]; exit ;; esac
step=$1 trained=
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

# value KEY STEP: of a recipe, for this size.
value() { sed -n "s/^$1: *//p" "examples/custom_vision/$2.yaml" | sed "s/4b/$size/; s/4B/${size^^}/"; }

# base: where the graft is made. A file that says none ends the script where base is on a line of its own.
base() { qwen-merge graft --where "$graft"; }

model() { case $1 in one_stage | stage1) base ;; *) value model_name_or_path "$1" ;; esac; }

# recipe_values: sets `values`, what the recipe says otherwise for this size, this graft and these sets.
recipe_values() {
  local key from
  from=$(model "$step")
  values=("model_name_or_path=$from")
  for key in output_dir run_name; do values+=("$key=$(value "$key" "$step")"); done
  [ -z "${DATASET:-}" ] || values+=("dataset=$DATASET")
}

recipe=examples/custom_vision/$step.yaml
case $step in
  data)
    sets=$(given "${SETS:-}" examples/custom_vision/sets.yaml)
    [ -n "${DATASET:-}" ] || die "DATASET is not set: names out of $sets, such as my_dataset%50."
    exec qwen-merge data import "$DATASET" --sets "$sets" "$@" ;;
  graft) exec qwen-merge graft "$graft" "$@" ;;
  export)
    from=$(model "$trained")
    adapter=$(value output_dir "$trained")
    case " $* " in
      *" --adapter_name_or_path"[" ="]*) ;;
      *) [ -f "$adapter/adapter_config.json" ] || die "export of $trained merges what $trained trained, and there is no" \
           "adapter in $adapter. Run scripts/custom_vision.sh $trained $size first, to its end, or name a checkpoint:" \
           "--adapter_name_or_path $adapter/checkpoint-N" ;;
    esac
    case " $* " in
      *" --model_name_or_path"[" ="]*) ;;
      *) [ -f "$from/config.json" ] || die "export of $trained merges into '$from', which holds no model." \
           "It is what $trained was trained from; name it with --model_name_or_path DIR if it has moved." ;;
    esac
    exec llamafactory-cli export --finetuning_type lora --trust_remote_code true --template qwen_merge_vl \
      --model_name_or_path "$from" --adapter_name_or_path "$adapter" \
      --export_dir "$adapter-merged" --infer_dtype bfloat16 "$@" ;;
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
    recipe_values
    exec scripts/train.sh "$recipe" "${values[@]}" "$@" ;;
esac
