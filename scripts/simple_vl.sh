#!/usr/bin/env bash
# Simple-VL with ms-swift, on the second stack (scripts/env.sh --stack current): one step a call, in this order.
#
#   scripts/simple_vl.sh graft                          makes the base (examples/simple_vl/graft.yaml)
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
#   GRAFT=FILE          another graft (examples/simple_vl/graft_stock.yaml: the stock architecture)
#   MODEL=DIR           what the step starts from (default: the graft, or the last checkpoint that is there)
#   OUTPUT=DIR          where stage1/, stage2/ and evaluation/ go (default outputs/simple_vl; with another GRAFT a folder
#                       of its name, outputs/simple_vl_stock for graft_stock.yaml: name the graft in each of its steps)
#   NPROC_PER_NODE      processes a node (default: one for each GPU); NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
#   MAX_PIXELS          of a picture (default 1003520)
#   INFER_BACKEND=pt    or vllm: what answers in infer (default pt) and deploy (default vllm; without a GPU pt)
#
# Without a GPU deepspeed is left out, and without flash-attn it is sdpa. A checkpoint of the stock architecture is
# trained with the kit's template, too, which takes the picture tokens from the checkpoint and counts them.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

die() { printf 'simple_vl: %s\n' "$*" >&2; exit 2; }

case ${1:-} in -h | --help | "") sed -n '2,29s/^# \{0,1\}//p' "$0"; [ $# -gt 0 ]; exit ;; esac
step=$1
shift
case $step in
  graft | stage1 | stage2 | infer | deploy | evaluate) ;;
  *) die "unknown step $step; expected graft, stage1, stage2, infer, deploy or evaluate." ;;
esac

if [ -d "$root/.venv-current" ]; then export PATH="$root/.venv-current/bin:$PATH"; fi
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
command -v swift >/dev/null || die "swift (ms-swift) is not installed here; run scripts/env.sh --stack current first."

graft=${GRAFT:-$root/examples/simple_vl/graft.yaml}
# One graft's stage 2 may not begin with another's stage 1.
name=$(basename "$graft")
name=${name%.*}
case $name in graft) name= ;; graft_*) name=_${name#graft_} ;; *) name=_$name ;; esac
output=${OUTPUT:-outputs/simple_vl$name}
[ -f "$graft" ] || die "GRAFT=$graft is not a file."

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); fi

# last DIR: its checkpoint with the highest number.
last() { find "$1" -maxdepth 1 -name 'checkpoint-*' -type d 2>/dev/null | sort -V | tail -n 1; }

# base: where the graft is made. A file that says none ends the script where base is on a line of its own.
base() { qwen-merge graft --where "$graft"; }

# model CANDIDATE ...: MODEL, or the first candidate that is there.
model() {
  if [ -n "${MODEL:-}" ]; then set -- "$MODEL"; fi
  local candidate
  for candidate in "$@"; do
    if [ -f "$candidate/config.json" ]; then echo "$candidate"; return; fi
  done
  die "there is no checkpoint in ${*:-$output}. Run the step before, or name one with MODEL=DIR."
}

# options_of MODEL: what every swift command needs to know of it.
options_of() {
  common=(--model "$1" --custom_register_path "$root/examples/simple_vl/register.py")
  # Not by "model_type", which a graft's config.json has several of.
  if grep -q '"Qwen2_5_VLForConditionalGeneration"' "$1/config.json"; then
    common+=(--model_type qwen2_5_vl --template qwen_merge)
  fi
}

train() {   # train STAGE MODEL FREEZE_VIT FREEZE_LLM [OPTION ...]
  local stage=$1 from=$2 vit=$3 llm=$4 sets
  shift 4
  [ -n "${DATASET:-}" ] || die "DATASET is not set: a JSONL file of rows with messages and images, or ms-swift's names."
  read -ra sets <<<"$DATASET"
  options_of "$from"
  local options=(--train_type full --torch_dtype bfloat16 --attn_impl sdpa
    --freeze_vit "$vit" --freeze_llm "$llm" --freeze_aligner false
    --num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 5e-6
    --warmup_ratio 0.05 --max_length 8192 --save_steps 1000 --save_total_limit 10 --logging_steps 5
    --dataloader_num_workers 4 --dataset_num_proc 8
    # A row that cannot be read ends the run: left to itself, ms-swift takes another row in its place.
    --strict true --add_version false --output_dir "$output/$stage")
  if python -c 'import flash_attn' 2>/dev/null; then options+=(--attn_impl flash_attn); fi
  if [ "$gpus" -gt 0 ]; then
    export NPROC_PER_NODE=${NPROC_PER_NODE:-$gpus}
    options+=(--deepspeed zero2)
  fi
  exec swift sft "${common[@]}" --dataset "${sets[@]}" "${options[@]}" "$@"
}

result=$step-$(date +%Y%m%d-%H%M%S).jsonl   # what was asked and answered
export MAX_PIXELS=${MAX_PIXELS:-1003520}
case $step in
  graft) exec qwen-merge graft "$graft" "$@" ;;
  stage1)
    start=$(base)
    from=$(model "$start")
    train stage1 "$from" true true "$@"
    ;;
  stage2) from=$(model "$(last "$output/stage1")"); train stage2 "$from" false false "$@" ;;
  infer)
    from=$(model "$(last "$output/stage2")" "$(last "$output/stage1")")
    options_of "$from"
    exec swift infer "${common[@]}" --infer_backend "${INFER_BACKEND:-pt}" --result_path "$output/$result" "$@"
    ;;
  deploy)
    from=$(model "$(last "$output/stage2")" "$(last "$output/stage1")")
    options_of "$from"
    backend=${INFER_BACKEND:-pt}
    if [ -z "${INFER_BACKEND:-}" ] && [ "$gpus" -gt 0 ]; then backend=vllm; fi
    export VIDEO_MAX_PIXELS=${VIDEO_MAX_PIXELS:-50176} FPS_MAX_FRAMES=${FPS_MAX_FRAMES:-12}
    options=(--infer_backend "$backend" --max_new_tokens 2048 --served_model_name Simple-VL --host 127.0.0.1 --port 8000
      --result_path "$output/$result")
    if [ "$backend" = vllm ]; then
      options+=(--vllm_gpu_memory_utilization 0.9 --vllm_max_model_len 8192
        --vllm_limit_mm_per_prompt '{"image": 5, "video": 2}')
    fi
    exec swift deploy "${common[@]}" "${options[@]}" "$@"
    ;;
  evaluate) exec python "$root/examples/simple_vl/evaluate.py" --work-dir "$output/evaluation" "$@" ;;
esac
