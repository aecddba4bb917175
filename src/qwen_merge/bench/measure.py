"""Runs one command and writes down what it took: `python -m qwen_merge.bench.measure LOG COMMAND...`.

A process of its own, and a small one: what a forking process holds in memory counts towards its child's peak, and a
benchmark that has torch loaded would measure itself.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main(log: str, *command: str) -> dict:
    """Wall time in seconds, and bytes: peak resident memory, and what went through reads, writes and kernel copies."""
    with open(log, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and its books are still open
        seconds = time.perf_counter() - started
        books = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "exit_code": process.returncode,
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * 1024,
        "read_bytes": int(books["rchar"]),
        "written_bytes": int(books["wchar"]),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
