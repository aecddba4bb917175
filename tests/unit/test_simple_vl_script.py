"""scripts/simple_vl.sh and its evaluation: no other graft's outputs, and no success where nothing was evaluated.

    ./scripts/test.sh --stack current tests/unit/test_simple_vl_script.py

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
def table(tmp_path) -> Path:
    """One question about a pixel."""
    (tmp_path / "lmu").mkdir()
    lines = ["index\tquestion\tA\tB\tanswer\tcategory\timage", f"1\tWhich?\tx\ty\tA\tz\t{PIXEL}"]
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
def test_a_data_set_without_a_result_is_named_and_is_no_success(table, letter_a):
    threading.Timer(4, letter_a.start).start()  # as after `deploy &`
    common = ("--retry", "2", "--data", "Letters")
    try:
        sound = evaluate(table, letter_a, *common)
        assert sound.returncode == 0, sound.stderr[-3000:]
        assert "waiting up to 600 s" in sound.stderr
        letter_a.always = "400"
        before = len(letter_a.bodies)
        failed = evaluate(table, letter_a, *common, "NoSuchSet")
        assert len(letter_a.bodies) > before
        assert failed.returncode == 1
        problems = failed.stderr.rpartition("not everything was evaluated")[2]
        assert "Letters: 1 of 1 questions got no answer" in problems
        assert "NoSuchSet: nothing was answered" in problems
        # The newest run is gone on with: what had no answer is asked, and what has one is not. The control is the run
        # above, which asked what the first had answered.
        letter_a.always = None
        for asked in (1, 0):
            before = len(letter_a.bodies)
            again = evaluate(table, letter_a, *common, "--reuse")
            assert again.returncode == 0, again.stderr[-3000:]
            assert len(letter_a.bodies) == before + asked
        assert len(list((table / "out").iterdir())) == 2
    finally:
        letter_a.stop()
