"""A running server, what is sent to it, and `qwen-merge chat` beside it.

server = serve(checkpoint, tmp_path, "--dtype", "float32")
server.wait()
text, prompt_tokens = said(server.answer(data_url(png()), "What is it?"))
"""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests
from PIL import Image

from training import REPOSITORY


class Server:
    """A command that serves, with a free port added to it; its log is shown when it does not start."""

    def __init__(self, command: list, folder: Path, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=REPOSITORY,
                env={
                    **os.environ,
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: int = 400) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            except requests.ConnectionError:
                time.sleep(1)
        self.stop()
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-6000:]}")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def ask(self, *content: dict | str, **options) -> requests.Response:
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        body = {"model": "served", "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 24}
        stream = bool(options.get("stream"))  # else requests reads the whole answer before it returns
        return requests.post(f"{self.url}/v1/chat/completions", json={**body, **options}, timeout=120, stream=stream)

    def complete(self, prompt) -> requests.Response:
        body = {"model": "served", "prompt": prompt, "max_tokens": 4, "temperature": 0}
        return requests.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def running(self) -> float:
        """Requests the engine works on now."""
        lines = requests.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))

    def wait_for_running(self, wanted) -> None:
        end = time.monotonic() + 30
        while not wanted(self.running()):
            assert time.monotonic() < end, f"{self.running()} requests are running"
            time.sleep(0.05)

    def answer(self, *content: dict | str, **options) -> dict:
        response = self.ask(*content, **options)
        assert response.status_code == 200, response.text
        return response.json()

    def refusal(self, *content: dict | str, **options) -> str:
        """The message of an answer 400."""
        response = self.ask(*content, **options)
        assert response.status_code == 400, response.text[:500]
        reply = response.json()
        return reply.get("error", reply)["message"]  # vLLM 0.12 and 0.9.1


def serve(checkpoint: Path, folder: Path, *options: str) -> Server:
    """`scripts/serve.sh`."""
    return Server(["bash", "scripts/serve.sh", checkpoint, *options], folder)


def data_url(content: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}}


def png(size=(84, 84), colour=(200, 10, 40), mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def decoded(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def said(reply: dict) -> tuple[str, int]:
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]


def chat(*arguments) -> str:
    """What `qwen-merge chat` prints as the greedy answer to "What?"."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "qwen_merge.cli", "chat", *arguments),
            *("--question", "What?", "--temperature", "0", "--max-tokens", "12"),
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()
