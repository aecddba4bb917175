#!/usr/bin/env bash
# Trains one stage, or all four in order, with the recipes of examples/train_qwen_merge; or any other recipe.
#
#   scripts/train.sh 4B 1                          one stage: 1, 2.1, 2.2 or 3
#   scripts/train.sh 4B all                        every stage that is not finished, in order
#   scripts/train.sh 8B 3 learning_rate=2.0e-5     key=value changes a value of the recipe
#   scripts/train.sh examples/graft/graft_lora.yaml    one recipe
#   REPORT_TO=none scripts/train.sh 4B 1           wandb (the recipes' choice), tensorboard or none
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 scripts/train.sh 4B 1     and NODE_RANK=1 on the other
#
# NPROC_PER_NODE limits the GPUs of a node. After a kill, launch the same command again: a stage goes on from its
# newest checkpoint, and a finished stage is left alone. Nothing is ever deleted.
set -euo pipefail
unset CDPATH
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

. scripts/launching.sh   # say, die, has_model, has_adapter, set_aside_half_checkpoints, lock, run

usage="usage: scripts/train.sh <4B|8B> <1|2.1|2.2|3|all> [key=value ...], or scripts/train.sh <recipe.yaml> [key=value ...]"
case ${1:-} in -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit ;; esac
given=
if [[ ${1:-} == *.yaml ]]; then
  given=$1 stage=
  [ -f "$given" ] || die "there is no recipe '$given' in $PWD. $usage"
  shift
else
  [ $# -ge 2 ] || die "$usage"
  size=$1 stage=$2
  shift 2
  case $size in 4B | 8B) ;; *) die "the size is '$size', not 4B or 8B. $usage" ;; esac
  case $stage in 1 | 2.1 | 2.2 | 3 | all) ;; *) die "the stage is '$stage', not 1, 2.1, 2.2, 3 or all. $usage" ;; esac
fi

overrides=()
if [ -n "${REPORT_TO:-}" ]; then
  case $REPORT_TO in wandb | tensorboard | none) ;; *) die "REPORT_TO=$REPORT_TO is not wandb, tensorboard or none." ;; esac
  overrides+=("report_to=$REPORT_TO")
fi
for argument; do
  [[ $argument =~ ^[A-Za-z_][A-Za-z0-9_.]*= ]] || die "'$argument' is not key=value. $usage"
  # LLaMA-Factory builds torchrun's command line by splitting at blanks.
  [[ $argument =~ [[:space:]] ]] && die "'$argument' has a blank in it, which LLaMA-Factory would split at."
  if [ "$stage" = all ]; then
    case ${argument%%=*} in
      model_name_or_path | output_dir | run_name | dataset | template | tokenized_path)
        die "'${argument%%=*}' differs from stage to stage; give it to one stage instead of 'all'." ;;
    esac
  fi
  overrides+=("$argument")
done

if [ "${NNODES:-1}" != 1 ]; then
  missing=()
  for name in NODE_RANK MASTER_ADDR MASTER_PORT; do [ -n "${!name:-}" ] || missing+=("$name"); done
  # Without a port each node would choose one of its own and wait there for the others.
  [ ${#missing[@]} = 0 ] || die "NNODES=$NNODES also needs ${missing[*]}, the same address and port on every node."
fi

[[ $PWD =~ [[:space:]] ]] && die "the path '$PWD' has a blank in it, which LLaMA-Factory would split at. Move the checkout."
[ -x .venv/bin/llamafactory-cli ] || die "there is no LLaMA-Factory in .venv; run scripts/env.sh first."
export PATH="$PWD/.venv/bin:$PATH"                       # llamafactory-cli starts torchrun by name
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export FORCE_TORCHRUN=1                                  # DeepSpeed needs torchrun with a single GPU, too
on_cpu=
if [ -z "${NPROC_PER_NODE:-}" ] && ! nvidia-smi -L >/dev/null 2>&1; then on_cpu=1 NPROC_PER_NODE=1; export NPROC_PER_NODE; fi

# value KEY RECIPE: what the run will use; the last key=value wins over the recipe.
value() {
  local found argument
  found=$(sed -n "s/^$1: *//p" "$2")
  for argument in "${overrides[@]+"${overrides[@]}"}"; do [[ $argument == "$1="* ]] && found=${argument#*=}; done
  printf '%s\n' "$found"
}

made_by() {
  case $1 in
    1) echo "python3 src/model_merge/model_merger.py --vlm-path Qwen/Qwen2.5-VL-72B-Instruct --llm-path Qwen/Qwen3-$size" \
      "--output-path $2" ;;
    2.1) echo "scripts/train.sh $size 1" ;;
    2.2) echo "scripts/train.sh $size 2.1" ;;
    3) echo "scripts/train.sh $size 2.2" ;;
  esac
}

# train RECIPE NAME [STAGE]
train() {
  local recipe=$1 name=$2 model output rows
  model=$(value model_name_or_path "$recipe")
  output=$(value output_dir "$recipe")
  rows=$(value dataset "$recipe")
  if [ -f "$output/train_results.json" ] || [ -n "$(newest_checkpoint "$output")" ]; then
    same_start "$output" "$model" "$rows"
  fi
  if [ -f "$output/train_results.json" ] && { has_model "$output" || has_adapter "$output"; }; then
    say "$name is finished: $output (to train it again: output_dir=<another folder>)"
    return
  fi
  if ! has_model "$model"; then
    [ -z "${3:-}" ] || die "$name starts from '$model', which holds no model. Make it with: $(made_by "$3" "$model")"
    # A name on the hub will do, too.
    if [[ $model != */* || $model == outputs/* || $model == [./]* || -e $model ]]; then
      die "$name starts from '$model', which holds no model. The recipe's first lines say what makes it."
    fi
  fi
  if [ -n "$on_cpu" ] && [ "$(value use_cpu "$recipe")" != true ]; then
    die "no NVIDIA GPU is seen. A CPU needs use_cpu=true bf16=false deepspeed=null; for other accelerators set" \
      "NPROC_PER_NODE."
  fi
  lock "$output"
  set_aside_half_checkpoints "$output"
  [ -n "$(newest_checkpoint "$output")" ] || note_start "$output" "$model" "$rows"
  say "$name: $model -> $output"
  run llamafactory-cli train "$recipe" "${overrides[@]+"${overrides[@]}"}"
}

if [ -n "$given" ]; then
  train "$given" "$(basename "$given" .yaml)"
  exit
fi
case $stage in all) stages="1 2.1 2.2 3" ;; *) stages=$stage ;; esac
for each in $stages; do
  train "examples/train_qwen_merge/train_qwen_merge_vl_${size}_stage$each.yaml" "stage $each" "$each"
done
