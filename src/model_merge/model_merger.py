"""The reproduction's own command line, kept word for word; `qwen-merge merge` is the same thing.

python3 src/model_merge/model_merger.py --vlm-path "Qwen/Qwen2.5-VL-72B-Instruct" --llm-path "Qwen/Qwen3-4B" \
    --materials-path "src/model_merge/materials" --output-path "Qwen-Merge-VL-4B-base"
"""

import sys
from pathlib import Path

try:
    from qwen_merge.cli import main
except ImportError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from qwen_merge.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
