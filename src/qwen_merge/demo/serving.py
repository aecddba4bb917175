"""Serves a checkpoint with scripts/serve.sh, asks it one question with curl, and ends the server.

    python -m qwen_merge.demo.serving CHECKPOINT DIR [SEED]

DIR gets question.png, request.json, answer.json and server.log.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from qwen_merge.demo.stages import root
from qwen_merge.demo.world import Scene, Stream, png
from qwen_merge.errors import UserError

SECONDS_TO_START = 400
QUESTION = "What shape is it?"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(checkpoint: Path, folder: Path, port: int) -> subprocess.Popen:
    """Launch the server in a process group of its own; returns once it is healthy.

    Raises:
        UserError: it ended, or was not ready in time; its log's last lines are shown.
    """
    log = folder / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["bash", "scripts/serve.sh", checkpoint, "--port", str(port), "--max-model-len", "1024"],
            cwd=root(),
            env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + SECONDS_TO_START
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return process
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    stop(process)
    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise UserError(f"the server did not become ready in {SECONDS_TO_START} s. Its last lines (all: {log}):\n{last}")


def stop(process: subprocess.Popen) -> None:
    """End the server with all its workers."""
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            try:
                process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                continue
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the engine's process may outlive its parent


def ask(port: int, request: Path) -> dict:
    """What `curl` gets for the request, as JSON.

    Raises:
        UserError: the server refused, or answered with something else.
    """
    command = [
        *("curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "120", "--noproxy", "*"),
        f"http://127.0.0.1:{port}/v1/chat/completions",
        *("-H", "Content-Type: application/json", "-d", f"@{request}"),
    ]
    print("$", " ".join(command), flush=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"curl ended with exit code {result.returncode}: {result.stderr}{result.stdout[:500]}")
    return json.loads(result.stdout)


def run(checkpoint: Path, folder: Path, seed: int = 0) -> dict:
    """Ask for the shape in one held-out picture. Returns {question, truth, thought, answer}."""
    if not shutil.which("curl"):
        raise UserError("curl is not installed; install it (Debian: apt-get install curl) and resume with --resume.")
    stream = Stream("held-out question to the server", seed)
    scene: Scene = stream.scene("shape")
    folder.mkdir(parents=True, exist_ok=True)
    picture = png(stream.drawing(scene))
    (folder / "question.png").write_bytes(picture)
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": checkpoint.name, "messages": [{"role": "user", "content": content}]}
    request = folder / "request.json"
    request.write_text(json.dumps({**body, "temperature": 0, "max_tokens": 64}) + "\n")
    port = free_port()
    server = start(checkpoint, folder, port)
    try:
        reply = ask(port, request)
    finally:
        stop(server)
    message = reply["choices"][0]["message"]
    answer = {
        "question": QUESTION,
        "truth": scene.shape,
        "thought": (message.get("reasoning_content") or "").strip(),
        "answer": (message.get("content") or "").strip(),
    }
    (folder / "answer.json").write_text(json.dumps(answer, indent=1, ensure_ascii=False) + "\n")
    return answer


def main(argv: list[str]) -> int:
    if len(argv) not in (2, 3):
        raise UserError("usage: python -m qwen_merge.demo.serving CHECKPOINT DIR [SEED]")
    answer = run(Path(argv[0]), Path(argv[1]), int(argv[2]) if len(argv) == 3 else 0)
    print(json.dumps(answer, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
