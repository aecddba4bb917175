#!/usr/bin/env bash
# Serves a checkpoint over the OpenAI API with vLLM, on GPUs or on a CPU.
#
#   ./scripts/serve.sh outputs/Qwen-Merge-VL-4B-stage3
#   ./scripts/serve.sh outputs/Qwen-Merge-VL-8B-stage3 --tensor-parallel-size 2 --port 8001   any option of vllm serve
#
# Then, with MODEL the folder's name:
#   curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "MODEL",
#     "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}},
#                                               {"type": "text", "text": "What is in the picture?"}]}],
#     "chat_template_kwargs": {"enable_thinking": true, "thinking_budget": 512}}'
#
# What this adds to plain `vllm serve DIR`, which works as well: the folder's name as the model's, thoughts apart from the
# answer (reasoning_content), several pictures and a video in a request, a loopback address unless --host says otherwise.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

die() { printf 'serve.sh: %s\n' "$*" >&2; exit 2; }

case "${1:-}" in
  "" | -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; [ $# -gt 0 ]; exit ;;
  -*) die "the first argument is $1; expected a checkpoint's folder (options of vllm serve come after it)." ;;
esac
model=${1%/}
shift
[ -d "$model" ] || die "$model is not a folder. Give a checkpoint: the output_dir of a stage, or a merged base."
[ -f "$model/config.json" ] || die "$model has no config.json, so it is no checkpoint. While a stage is being trained," \
  "serve one of its checkpoint-N folders."
grep -qE '"(qwen2_5_vl_merge|qwen_merge_graft)"' "$model/config.json" ||
  die "the model_type in $model/config.json is not qwen2_5_vl_merge or qwen_merge_graft." \
  "For other models use vllm serve itself."

# .venv is taken unasked; .venv-current where it was activated.
if [ -d "$root/.venv" ] && [[ ":$PATH:" != *":$root/.venv-current/bin:"* ]]; then export PATH="$root/.venv/bin:$PATH"; fi
command -v vllm >/dev/null || die "vllm is not installed here; run ./scripts/env.sh first."
name=$(basename "$(readlink -f "$model")")
exec vllm serve "$model" --served-model-name "$name" --reasoning-parser qwen_merge --host 127.0.0.1 \
  --limit-mm-per-prompt '{"image": 8, "video": 1}' "$@"
