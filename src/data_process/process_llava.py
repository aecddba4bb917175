"""The reproduction's own command line for ReCap 558K, CC3M and CC12M; `qwen-merge data convert` is the same thing.

python3 src/data_process/process_llava.py
python3 src/data_process/process_llava.py LLaVA_ReCap_558K --input copies/LLaVA_ReCap_558K --limit 1000 --resume
"""

import sys
from pathlib import Path

try:
    from qwen_merge.data.command import run_script
except ImportError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from qwen_merge.data.command import run_script

if __name__ == "__main__":
    sys.exit(run_script("recap", "Convert ReCap 558K, CC3M and CC12M to the record format.", sys.argv[1:]))
