"""examples/simple_vl/evaluate.py does not call an evaluation done that was none. Second stack: EvalScope itself runs.

    ./scripts/test.sh --stack current tests/unit/test_simple_vl_evaluate.py

The server says "A" to everything, or fails on command (tests/endpoint.py).
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from endpoint import Endpoint

REPOSITORY = Path(__file__).resolve().parents[2]


def evaluate(folder: Path, server: Endpoint, *options: str) -> subprocess.CompletedProcess:
    script = REPOSITORY / "examples/simple_vl/evaluate.py"
    url = f"{server.url}/chat/completions"
    return subprocess.run(
        [sys.executable, script, "--url", url, "--model", server.model, "--work-dir", folder / "out", *options],
        env={**os.environ, "LMUData": str(folder / "lmu")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def letter_a() -> Endpoint:
    return Endpoint(answer=lambda body: {"content": "A"})


@pytest.fixture
def tables(tmp_path) -> Path:
    """Two questions about a pixel."""
    (tmp_path / "lmu").mkdir()
    rows = [f"{number}\tWhich?\tx\ty\tA\tz\t{PIXEL}" for number in (1, 2)]
    lines = ["index\tquestion\tA\tB\tanswer\tcategory\timage", *rows]
    (tmp_path / "lmu/Letters.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


def test_a_server_that_never_comes_and_one_without_the_model(tmp_path, letter_a):
    started = time.monotonic()
    gone = evaluate(tmp_path, letter_a, "--wait", "1")
    assert gone.returncode == 2
    assert f"no server answered at {letter_a.url}/models in 1 s" in gone.stderr
    assert time.monotonic() - started < 30
    with letter_a:
        other = evaluate(tmp_path, letter_a, "--model", "Simple-VL")
        assert other.returncode == 2
        assert "has no model 'Simple-VL', but teacher" in other.stderr
        letter_a.models_fault = "500"  # still loading
        assert "HTTP 500" in evaluate(tmp_path, letter_a, "--wait", "1").stderr


@pytest.mark.slow
def test_a_data_set_without_a_result_is_named_and_is_no_success(tables, letter_a):
    threading.Timer(4, letter_a.start).start()  # as after `deploy &`
    common = ("--data", "Letters", "--nproc", "2")
    try:
        sound = evaluate(tables, letter_a, *common)
        assert sound.returncode == 0, sound.stderr[-3000:]
        assert "waiting up to 600 s" in sound.stderr
        lost = evaluate(tables, letter_a, "--data", "Letters", "NoSuchSet", "--nproc", "2")
        assert lost.returncode == 1
        assert "NoSuchSet: nothing was answered" in lost.stderr
        assert "Letters: " not in lost.stderr.rpartition("not everything was evaluated")[2]
        letter_a.always = "400"
        failed = evaluate(tables, letter_a, *common)
        assert failed.returncode == 1
        assert "Letters: 2 of 2 questions got no answer" in failed.stderr
    finally:
        letter_a.stop()
