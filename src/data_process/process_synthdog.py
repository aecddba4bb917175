"""The reproduction's own command line for SynthDoG, English and Chinese; `qwen-merge data convert` is the same thing.

python3 src/data_process/process_synthdog.py
python3 src/data_process/process_synthdog.py synthdog_en --input copies/synthdog_en --limit 1000 --resume
"""

import sys
from pathlib import Path

try:
    from qwen_merge.data.command import run_script
except ImportError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from qwen_merge.data.command import run_script

if __name__ == "__main__":
    sys.exit(run_script("synthdog", "Convert SynthDoG, English and Chinese to the record format.", sys.argv[1:]))
