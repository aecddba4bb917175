"""`tests/support_table.py`: what its cells say comes from runs, a stopped run goes on, and what is broken is seen."""

import json

import pytest
from safetensors.torch import load_file, save_file

from support_table import COLUMNS, Table

PAIR, IMPOSSIBLE, EXPERTS = ("clip", "mlp", "qwen3"), ("clip", "extended", "qwen3"), ("clip", "mlp", "qwen3_moe")
IN_PROCESS = ["loads", "trains", "packs"]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    made = Table(tmp_path_factory.mktemp("support"))
    made.run([PAIR, IMPOSSIBLE, EXPERTS], IN_PROCESS)
    return made


def test_each_cell_says_what_was_seen(table):
    assert table.cell(PAIR) == {name: {"works": True} for name in IN_PROCESS}
    assert "Qwen3-MoE takes no packed samples" in table.cell(EXPERTS)["packs"]["why"]
    refused = table.cell(IMPOSSIBLE)
    assert all("continues the patch merger" in refused[name]["why"] for name in COLUMNS)
    lines = table.markdown([PAIR, IMPOSSIBLE]).splitlines()
    assert "| mlp | CLIP | ✓ ✓ ✓ ? |" in lines
    assert "| extended | CLIP | –[1] |" in lines
    assert "this tower has none" in lines[-1]


def test_what_was_run_is_not_run_again(table):
    file = table.folder / "cells" / f"{'-'.join(PAIR)}.json"
    before = file.stat().st_mtime_ns
    table.run([PAIR], IN_PROCESS)
    assert file.stat().st_mtime_ns == before


def test_control_a_changed_weight_of_the_llm_is_seen(table, tmp_path):
    file = table.checkpoint(PAIR) / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.self_attn.v_proj.weight"
    save_file({**whole, name: whole[name] * 1.5}, file, {"format": "pt"})
    cell = table.folder / "cells" / f"{'-'.join(PAIR)}.json"
    cell.write_text(json.dumps({}))
    try:
        table.run([PAIR], ["loads"])
        assert "logits differ from the LLM's own" in table.cell(PAIR)["loads"]["why"]
    finally:
        save_file(whole, file, {"format": "pt"})
