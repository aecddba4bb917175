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
    """On another stack than the first: leave out what needs the first, and say why (tests/stacks.py)."""
    from stacks import reason_to_skip

    for item in items:
        if reason := reason_to_skip(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=f"first stack only: {reason}"))


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
def sources(tmp_path_factory) -> Path:
    """A folder for each tower and LLM, by its name."""
    import grafts

    folder = tmp_path_factory.mktemp("grafts")
    for kind in grafts.TOWERS:
        grafts.make_tower(folder / kind, kind)
    for number, kind in enumerate(grafts.LLMS):
        grafts.make_language_model(folder / kind, kind, tied=number == 0)
    return folder


@pytest.fixture(scope="session")
def graft(sources):
    """Makes a graft once a session: (tower, projector, LLM, positions) -> its folder."""
    import grafts
    from qwen_merge import cli

    def make(tower: str, projector: str, llm: str, positions: str) -> Path:
        output = sources / "-".join((tower, projector, llm, positions))
        if not output.exists():
            file = grafts.write_recipe(
                sources / "graft.yaml", sources / tower, projector, sources / llm, output, positions=positions
            )
            assert cli.main(["graft", str(file)]) == 0
        return output

    return make
