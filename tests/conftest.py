"""Shared by all tests: puts tests/ on the path (pytest does so for a conftest's folder), and the checkpoints that are
made once a session. They are made by the real merger, so that what follows is tested on what users get.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell's background job ignores SIGINT, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Leave out what needs the other stack, and say why (tests/stacks.py)."""
    from stacks import reason_to_skip

    for item in items:
        if reason := reason_to_skip(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def gradients():
    """Some of VLMEvalKit's modules switch gradients off for the whole process as they are imported."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)


@pytest.fixture(autouse=True)
def environment_variables():
    """Libraries write to them in this process (LLaMA-Factory's parser: the precision of the next launch)."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


class Sources:
    """The folders of one tiny merge, in float32 so that parity can be exact."""

    def __init__(self, folder: Path, tied: bool):
        from checkpoints import make_llm, make_vlm
        from qwen_merge.merger.merge import MergeOptions, merge

        self.vlm = make_vlm(folder / "vlm", dtype="float32")
        self.llm = make_llm(folder / "llm", tied=tied, dtype="float32")
        self.merged = folder / "merged"
        merge(MergeOptions(vlm=str(self.vlm), llm=str(self.llm), output=self.merged))


@pytest.fixture(scope="session")
def tied(tmp_path_factory) -> Sources:
    """As Qwen3-4B: the head is the embedding."""
    return Sources(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Sources:
    """As Qwen3-8B: a head of its own."""
    return Sources(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def graft(tmp_path_factory):
    """Makes a graft once a session: (tower, projector, LLM, positions) -> its folder."""
    from grafts import Grafts

    return Grafts(tmp_path_factory.mktemp("grafts"))


@pytest.fixture(scope="session")
def sources(graft) -> Path:
    """A folder for each tower and LLM, by its name."""
    return graft.folder
