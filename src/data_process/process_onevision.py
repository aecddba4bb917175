"""The reproduction's own command line for the 89 sets of LLaVA-OneVision; `qwen-merge data convert` is the same thing.

python3 src/data_process/process_onevision.py
python3 src/data_process/process_onevision.py geo3k --input copies/geo3k --limit 1000 --resume
"""

import sys
from pathlib import Path

try:
    from qwen_merge.data.command import run_script
except ImportError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from qwen_merge.data.command import run_script

if __name__ == "__main__":
    sys.exit(
        run_script("onevision", "Convert the 89 configurations of LLaVA-OneVision to the record format.", sys.argv[1:])
    )
