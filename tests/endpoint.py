"""An OpenAI-compatible server that misbehaves on command, for what a real one does only on bad days.

    with Endpoint() as server:
        server.plan += ["500", "429"]       # what becomes of the next requests; then all is well
        … server.url …

It runs in a thread of the test. An answer is a function of the request alone, so that two runs can be compared.
"""

import contextlib
import hashlib
import http.server
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

MODEL = "teacher"


def echo(body: dict) -> dict:
    """An answer that says which request it is for: a thought and the last user text's hash."""
    text = text_of(body)
    return {"content": f"<think>\nabout {digest(text)}\n</think>\n\nanswer {digest(text)}"}


def text_of(body: dict) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Endpoint:
    """One server. `plan`: faults for the next requests, one each, None for none; `always`: a fault for all the others.

    Faults: "500", "429" (with Retry-After), "503", "400", "401", "hang", "half" (the connection ends in the middle of
    the answer), "torn" (half the JSON, properly sent), "json" (JSON that is no completion), "text", "abort" (a
    finish_reason of none), "length" (cut off), "too long" (vLLM's refusal of question and answer together).
    """

    def __init__(
        self, answer: Callable[[dict], dict] = echo, model: str = MODEL, delay: float = 0.0, limit: int = 9000
    ):
        self.answer, self.model, self.delay, self.limit = answer, model, delay, limit
        self.plan: list[str | None] = []
        self.always: str | None = None
        self.retry_after = "0.3"
        self.models_fault: str | None = None  # "hang", "500" or "text": what /v1/models does
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.asked: Counter[str] = Counter()  # by text
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self.server: http.server.ThreadingHTTPServer | None = None
        self.released = threading.Event()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> "Endpoint":
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                endpoint.connections.add(self.connection)

            def do_GET(self):
                endpoint.models(self)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.complete(self, body)

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):  # a client that gave up
                pass

        self.released.clear()
        self.server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Dead: connections are refused from here on, and those that are open get no answer."""
        if self.server:
            self.released.set()
            self.server.shutdown()
            self.server.server_close()
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections.clear()
            self.server = None

    def __enter__(self) -> "Endpoint":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def models(self, handler) -> None:
        if self.models_fault == "hang":
            self.released.wait(60)
        if self.models_fault == "500":
            return send(handler, 500, {"error": {"message": "starting"}})
        if self.models_fault == "text":
            return send(handler, 200, b"<html>a proxy</html>")
        send(handler, 200, {"object": "list", "data": [{"id": self.model, "max_model_len": self.limit}]})

    def complete(self, handler, body: dict) -> None:
        with self.lock:
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.asked[text_of(body)] += 1
            self.running += 1
            self.most = max(self.most, self.running)
            fault = self.plan.pop(0) if self.plan else self.always
        try:
            time.sleep(self.delay)
            self.respond(handler, body, fault)
        finally:
            with self.lock:
                self.running -= 1

    def respond(self, handler, body: dict, fault: str | None) -> None:  # noqa: PLR0911
        if fault in ("500", "503", "400", "401"):
            return send(handler, int(fault), {"error": {"message": f"fault {fault}"}})
        if fault == "429":
            return send(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": self.retry_after})
        if fault == "too long":
            room = self.limit - 500
            if body["max_tokens"] > room:
                message = (
                    f"This model's maximum context length is {self.limit} tokens. However, you requested "
                    f"{500 + body['max_tokens']} tokens (500 in the messages, {body['max_tokens']} in the completion)."
                )
                return send(handler, 400, {"object": "error", "message": message, "code": 400})
        if fault == "hang":
            self.released.wait(60)
            handler.close_connection = True
            return None
        if fault == "json":
            return send(handler, 200, {"choices": [], "detail": "no choices"})
        if fault == "text":
            return send(handler, 200, b"<html>a proxy's page</html>")
        message = {"role": "assistant", "content": None, **self.answer(body)}
        finish = {"abort": None, "length": "length"}.get(fault or "", message.pop("finish_reason", "stop"))
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
        }
        data = json.dumps(reply).encode()
        if fault == "torn":
            return send(handler, 200, data[: len(data) // 2])
        if fault == "half":
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2])
            handler.wfile.flush()
            handler.close_connection = True
            return None
        return send(handler, 200, data)


def send(handler, status: int, body, headers: dict | None = None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)
