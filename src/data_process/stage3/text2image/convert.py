"""The reproduction's own command line, kept as entry point; `qwen-merge data text2image convert` is the same thing.

python3 src/data_process/stage3/text2image/convert.py --output data --workers 8
"""

import sys
from pathlib import Path

try:
    from qwen_merge.cli import main
except ImportError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from qwen_merge.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "text2image", "convert", *sys.argv[1:]]))
