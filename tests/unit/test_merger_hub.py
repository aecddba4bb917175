"""Sources on a hub, against a local stand-in that speaks its file protocol and remembers what it was asked for."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from checkpoints import make_llm, make_vlm

COMMITS = {"Qwen/vlm": "a" * 40, "Qwen/llm": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves `{repo: directory}` as a hub does. `cut`: a file whose download breaks off after half."""

    def __init__(self, repos: dict[str, Path]):
        self.repos, self.requested, self.cut = repos, [], ""
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def downloads(self) -> dict[str, set[str]]:
        return {repo: {file for its, file in self.requested if its == repo} for repo in self.repos}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
        else:
            repo, revision = "/".join(parts[:2]), parts[3]
        if repo not in self.server.repos:
            return self.error(404, "RepoNotFound")
        commit = COMMITS[repo]
        if revision not in ("main", "v1.0", commit):
            return self.error(404, "RevisionNotFound")
        directory = self.server.repos[repo]
        if parts[0] == "api":
            siblings = [{"rfilename": path.name} for path in sorted(directory.iterdir())]
            return self.reply(json.dumps({"id": repo, "sha": commit, "siblings": siblings, "tags": []}).encode(), body)
        path = directory / parts[4]
        if not path.exists():
            return self.error(404, "EntryNotFound")
        if body:
            self.server.requested.append((repo, path.name))
        content = path.read_bytes()
        headers = {"ETag": f'"{path.name}-{len(content)}"', "X-Repo-Commit": commit}
        return self.reply(content, body, headers, cut=path.name == self.server.cut)

    def reply(self, content: bytes, body: bool, headers: "dict[str, str] | None" = None, cut: bool = False):
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def error(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return {
        "Qwen/vlm": make_vlm(folder / "vlm", shards=4),
        "Qwen/llm": make_llm(folder / "llm", shards=2),
    }


@pytest.fixture
def hub(repos):
    server = Hub(repos)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(hub, tmp_path):
    """`qwen-merge merge` with the stand-in as its hub; (exit code, standard error, output directory)."""

    def merge(*more: str, vlm: str = "Qwen/vlm", llm: str = "Qwen/llm", offline: bool = False, step: str = "merge"):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "*",
        }
        output = tmp_path / "place" / "out"
        arguments = ["--vlm-path", vlm, "--llm-path", llm, "--output-path", str(output)]
        if step == "verify":
            arguments = [str(output), "--no-forward"]
        command = [sys.executable, "-m", "qwen_merge.cli", step, *arguments, *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False), output

    return merge


def test_only_what_is_needed_is_downloaded(hub, run, repos):
    done, output = run("--revision", "v1.0")
    assert done.returncode == 0, done.stderr
    index = json.loads((repos["Qwen/vlm"] / "model.safetensors.index.json").read_text())["weight_map"]
    vision_files = {file for name, file in index.items() if name.startswith("visual.")}
    assert len(vision_files) < len(set(index.values()))  # or the test would prove nothing
    assert hub.downloads["Qwen/vlm"] == {
        "config.json", "preprocessor_config.json", "model.safetensors.index.json", *vision_files
    }  # fmt: skip
    assert hub.downloads["Qwen/llm"] == {path.name for path in repos["Qwen/llm"].iterdir()}
    sources = json.loads((output / "merge_manifest.json").read_text())["sources"]
    assert sources["vlm"]["repo"] == "Qwen/vlm"
    assert sources["vlm"]["revision"] == "a" * 40
    assert sources["llm"]["revision"] == "b" * 40
    assert sources["llm"]["requested_revision"] == "v1.0"

    # verify finds the sources in the cache, without a network.
    asked = len(hub.requested)
    verified, _ = run(step="verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "PASS         copied from VLM" in verified.stdout
    assert "PASS         copied from LLM" in verified.stdout
    assert len(hub.requested) == asked

    # So does another merge that may not use one.
    again, _ = run("--revision", "v1.0", "--output-path", str(output.parent / "again"), offline=True)
    assert again.returncode == 0, again.stderr
    assert (output.parent / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def check_refused(done, output: Path, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr
    assert not output.parent.exists()


def test_a_repository_that_does_not_exist(run):
    done, output = run(vlm="Qwen/nothing")
    check_refused(done, output, "the VLM Qwen/nothing is neither a local directory nor a repository on http://")


def test_a_revision_that_does_not_exist(run):
    done, output = run("--llm-revision", "v9")
    check_refused(done, output, "the LLM Qwen/llm has no revision 'v9'")


def test_an_interrupted_download(hub, run):
    hub.cut = "model-00002-of-00002.safetensors"
    done, output = run()
    check_refused(done, output, "the LLM Qwen/llm", "Run again to resume")
    hub.cut = ""
    done, output = run()
    assert done.returncode == 0, done.stderr
    assert (output / "config.json").exists()


def test_a_repository_that_is_not_in_the_cache(run):
    done, output = run(offline=True)
    check_refused(done, output, "the VLM Qwen/vlm is not in the local cache", "Name a directory instead")


def test_a_hub_that_does_not_answer(hub, run):
    hub.shutdown()
    hub.server_close()
    done, output = run()
    check_refused(
        done,
        output,
        "the VLM Qwen/vlm is no local directory, and cannot be downloaded",
        "offline",
        "name a directory",
    )
    assert not any(raw in done.stderr for raw in ("MaxRetryError", "object at 0x", "Errno"))
