#!/usr/bin/env bash
# Evaluates a checkpoint with VLMEvalKit on the 13 published tasks, or on those named.
#
#   scripts/eval.sh outputs/Qwen-Merge-VL-4B-stage3                 all 13
#   scripts/eval.sh outputs/Qwen-Merge-VL-4B-stage3 MMStar MMVet    two of them, by VLMEvalKit's names
#   BACKEND=transformers scripts/eval.sh DIR MMStar                 or vllm (with a GPU the default), or endpoint
#   MODEL_NAME=Qwen-Merge-VL-8B-matched scripts/eval.sh DIR         the entry: Qwen-Merge-VL-4B, -8B, -4B-matched or
#                                                                   -8B-matched (training's resolution); by default the
#                                                                   published resolution, 8B when hidden_size is 4096
#   BACKEND=endpoint QWEN_MERGE_ENDPOINT=http://localhost:8000/v1 NPROC=16 scripts/eval.sh DIR       a served model
#
#   OPENAI_API_KEY                    the judge's; without one answers are matched exactly, which gives lower numbers
#   OPENAI_API_BASE=http://HOST/v1    the judge's server, with or without /chat/completions (default: OpenAI's own). With
#                                     a key it is asked before anything else: no answer ends the task with a message
#   JUDGE=gpt-4o-mini                 another judge than chatgpt-0125; JUDGE=exact_matching asks none
#   TEMPERATURE=0 SEED=1 MAX_NEW_TOKENS=4096     other settings than the published ones (0.6, 0, 8192)
#   WORK_DIR=DIR                      results (default outputs/eval/<name of the checkpoint's folder>)
#   VLMEVALKIT=DIR                    a checkout of VLMEvalKit with the overlay, instead of the installed one
#   LMUData=DIR                       where VLMEvalKit keeps its data sets (default ~/LMUData)
#
# After a kill, launch the same command again: finished tasks are skipped, answered questions are not asked again. A
# task that fails does not stop the others. Exit code: 0 all done, 1 some failed (named at the end), 2 bad arguments.
set -euo pipefail
unset CDPATH
invoked_from=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

PUBLISHED=(WorldMedQA-V TextVQA_VAL OCRBench MMVet AI2D_TEST ChartQA_TEST MMStar MMMU_DEV_VAL LogicVista MathVista_MINI
  MathVision_MINI ScienceQA_VAL VisOnlyQA-VLMEvalKit)
NAMES="Qwen-Merge-VL-4B Qwen-Merge-VL-8B Qwen-Merge-VL-4B-matched Qwen-Merge-VL-8B-matched"

say() { printf 'eval: %s\n' "$*" >&2; }
die() { say "$@"; exit 2; }
absolute() { (cd "$invoked_from" && readlink -m -- "$1"); }   # paths are those of the caller's folder

case ${1:-} in -h | --help) sed -n '2,22s/^# \{0,1\}//p' "$0"; exit ;; esac
[ $# -ge 1 ] || die "usage: scripts/eval.sh MODEL_DIR [TASK ...]   (--help lists the knobs)"
model=$(absolute "$1")
shift
tasks=("$@")
[ $# -gt 0 ] || tasks=("${PUBLISHED[@]}")

# --- what can be wrong, before anything is loaded ---
[ -f "$model/config.json" ] || die "no model in $model: it has no config.json. Expected a checkpoint folder."
grep -qE '"model_type": *"(qwen2_5_vl_merge|qwen_merge_graft)"' "$model/config.json" ||
  die "$model is of $(grep -m 1 -o '"model_type": *"[^"]*"' "$model/config.json" || echo 'no model_type')," \
    'not of "model_type": "qwen2_5_vl_merge" or "qwen_merge_graft". Evaluate other models with VLMEvalKit itself.'

gpu=no
if nvidia-smi -L >/dev/null 2>&1; then gpu=yes; fi
if [ -z "${BACKEND:-}" ]; then BACKEND=transformers; [ $gpu = no ] || BACKEND=vllm; fi
case $BACKEND in
  vllm) backend=(--use-vllm) ;;
  transformers) backend=() ;;
  endpoint)
    [ -n "${QWEN_MERGE_ENDPOINT:-}" ] || die "BACKEND=endpoint also needs QWEN_MERGE_ENDPOINT=http://HOST:PORT/v1"
    backend=(--endpoint "$QWEN_MERGE_ENDPOINT") ;;
  *) die "BACKEND=$BACKEND is not vllm, transformers or endpoint." ;;
esac
# Set for another run, it would silently send the questions away from a model that is to be loaded here.
[ "$BACKEND" = endpoint ] || unset QWEN_MERGE_ENDPOINT

if [ -z "${MODEL_NAME:-}" ]; then
  MODEL_NAME=Qwen-Merge-VL-4B
  if grep -qE '"hidden_size": *4096\b' "$model/config.json"; then MODEL_NAME=Qwen-Merge-VL-8B; fi
fi
[[ " $NAMES " == *" $MODEL_NAME "* ]] || die "MODEL_NAME=$MODEL_NAME is none of: $NAMES"

numbers=()
for pair in SEED=--seed TEMPERATURE=--temperature MAX_NEW_TOKENS=--max-new-tokens; do
  name=${pair%%=*}
  [ -n "${!name:-}" ] || continue
  [[ ${!name} =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "$name=${!name} is not a number."
  numbers+=("${pair#*=}" "${!name}")
done
[[ ${NPROC:-4} =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC is not a number of requests."

python=$PWD/.venv/bin/python
[ -x "$python" ] || die "there is no .venv here; run scripts/env.sh first."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${VLMEVALKIT:-}" ]; then
  kit=$(absolute "$VLMEVALKIT")
  [ -f "$kit/run.py" ] || die "VLMEVALKIT=$kit has no run.py; expected a checkout of VLMEvalKit."
  runner=$kit/run.py package=$kit/vlmeval
  launch=("$python" "$runner")
  export PYTHONPATH="$kit:$PYTHONPATH"
else
  find_it='import importlib.util as u; s = u.find_spec("vlmeval"); print(*(s.submodule_search_locations if s else ()))'
  package=$("$python" -c "$find_it")
  [ -n "$package" ] ||
    die "VLMEvalKit is not installed in .venv; run scripts/env.sh, or name a checkout with VLMEVALKIT=DIR."
  runner=$package/run.py
  launch=("$python" -m vlmeval.run)
fi
grep -q qwen_merge "$runner" ||
  die "$runner does not know the Qwen-Merge entries. Run: .venv/bin/qwen-merge overlay apply vlmevalkit" \
    "${kit:+--root $kit}"
nproc_option=--nproc
if grep -q -e --api-nproc "$runner"; then nproc_option=--api-nproc; fi

data=${LMUData:-$HOME/LMUData}
unknown=()
for task in "${tasks[@]}"; do
  [[ " ${PUBLISHED[*]} " == *" $task "* || -f $data/$task.tsv ]] && continue
  [[ $task =~ ^[A-Za-z0-9._+-]+$ ]] &&
    grep -rqF --include='*.py' -e "'$task'" -e "\"$task\"" "$package/dataset" && continue
  unknown+=("$task")
done
[ ${#unknown[@]} = 0 ] || die "no such task: ${unknown[*]}. The published ones: ${PUBLISHED[*]}." \
  "A table of your own goes to $data/NAME.tsv."

if [ -z "${OPENAI_API_KEY:-}" ] && [ "${JUDGE:-exact_matching}" != exact_matching ] &&
  [ ! -f "$(dirname "$package")/.env" ]; then   # where VLMEvalKit may have a key from
  say "JUDGE=$JUDGE needs OPENAI_API_KEY, which is not set."
  JUDGE=
fi
if [ -z "${JUDGE:-}" ]; then
  JUDGE=exact_matching
  if [ -n "${OPENAI_API_KEY:-}" ]; then
    JUDGE=chatgpt-0125
  else
    say "OPENAI_API_KEY is not set: answers are matched exactly instead of judged by chatgpt-0125. An answer that is" \
      "right but worded freely counts as wrong, so these numbers are not those of a judged table. MMVet and" \
      "LogicVista get answers only, no score."
  fi
fi

work=$(absolute "${WORK_DIR:-$PWD/outputs/eval/$(basename "$model")}")
results=$work/$MODEL_NAME
mkdir -p "$results" "$work/logs" "$work/finished"

# The weights' sizes and times stand for the weights: a task is finished for this checkpoint under these settings only.
weights=$(find -L "$model" -maxdepth 1 -name '*.safetensors' -printf '%f %s %T@\n' | sort | sha256sum | cut -c 1-16)

child=
stop() { [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true; exit "$1"; }
trap 'stop 143' TERM HUP
trap 'stop 130' INT   # SIGTERM all the same: a shell's background processes ignore SIGINT

judge_of() {   # LogicVista accepts only a few judges, and chatgpt-0125 is not one of them
  if [ "$1" = LogicVista ] && [ "$JUDGE" = chatgpt-0125 ]; then echo gpt-4o-mini; else echo "$JUDGE"; fi
}

# written TASK MODE [-newer FILE]: the score file of a task, or in mode infer its answers, that VLMEvalKit wrote (after
# FILE); it names score files differently task by task.
written() {
  local task=$1 mode=$2
  shift 2
  if [ "$mode" = infer ]; then
    find "$results" -maxdepth 2 "$@" -name "${MODEL_NAME}_$task.xlsx" -print -quit
  else
    find "$results" -maxdepth 2 "$@" \( -name "${MODEL_NAME}_${task}_acc*.csv" \
      -o -name "${MODEL_NAME}_${task}_*score*.csv" -o -name "${MODEL_NAME}_${task}_score*.json" \) -print -quit
  fi
}

# evaluate TASK: VLMEvalKit goes on after any error and leaves with 0, so success is a result that was not there before.
evaluate() {
  local task=$1 judge mode=all since=$work/logs/.$1.since log=$work/logs/$1.log status=0
  judge=$(judge_of "$task")
  if [ "$judge" = exact_matching ]; then case $task in MMVet | LogicVista) mode=infer ;; esac; fi
  local state="$model $weights $BACKEND ${QWEN_MERGE_ENDPOINT:-} $judge $mode ${numbers[*]+"${numbers[*]}"}"
  local finished=$work/finished/${MODEL_NAME}_$task
  # The mark alone is not enough: results may have been deleted or moved since.
  if [ -f "$finished" ] && [ "$(cat "$finished")" = "$state" ] && [ -n "$(written "$task" $mode)" ]; then
    say "task $number of ${#tasks[@]}, $task: finished before"
    return
  fi
  say "task $number of ${#tasks[@]}, $task: $BACKEND, judge $judge, log $log"
  touch "$since"
  "${launch[@]}" --data "$task" --model "$MODEL_NAME" --model-path "$model" --work-dir "$work" --mode $mode --reuse \
    --judge "$judge" $nproc_option "${NPROC:-4}" --verbose "${backend[@]+"${backend[@]}"}" \
    "${numbers[@]+"${numbers[@]}"}" </dev/null > >(tee "$log") 2>&1 &
  child=$!
  wait "$child" || status=$?
  child=
  if [ $status != 0 ]; then
    say "$task: VLMEvalKit left with exit code $status; see $log"
    return 1
  fi
  if [ $mode = infer ]; then
    [ -n "$(written "$task" infer -newer "$since")" ] || { say "$task: no answers were written; see $log"; return 1; }
    say "$task: answered, not scored (it needs a judge)"
  else
    [ -n "$(written "$task" all -newer "$since")" ] || { say "$task: no score was written; see $log"; return 1; }
  fi
  printf '%s\n' "$state" >"$finished"
}

failed=() number=0
for task in "${tasks[@]}"; do
  number=$((number + 1))
  evaluate "$task" || failed+=("$task")
done
if [ ${#failed[@]} -gt 0 ]; then
  say "failed: ${failed[*]} (${#failed[@]} of ${#tasks[@]}). Logs: $work/logs. The same command tries again."
  exit 1
fi
say "all ${#tasks[@]} tasks are done; results in $results"
