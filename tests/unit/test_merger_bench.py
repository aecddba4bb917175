"""The command line answers at once, and the benchmark measures what it says."""

import sys

from qwen_merge.bench.import_time import GOAL, heavy_imports, help_seconds
from qwen_merge.bench.merge import Measurement, _report, measure
from qwen_merge.bench.synthetic import make_llm, make_vlm
from qwen_merge.merger.merge import MergeOptions, merge


def test_the_command_line_imports_nothing_heavy():
    assert heavy_imports() == []


def test_the_command_line_answers_at_once():
    assert min(help_seconds() for _ in range(3)) < GOAL


def test_a_measurement(tmp_path):
    code = (
        "import time; data = bytearray(100_000_000); time.sleep(0.2); open('/dev/null', 'wb').write(data[:5_000_000])"
    )
    figure = measure([sys.executable, "-c", code], tmp_path / "log")
    assert figure.seconds > 0.2
    assert 100e6 < figure.peak_bytes < 150e6
    assert 5e6 <= figure.written_bytes < 6e6


def test_the_report_fails_when_a_goal_is_missed(capsys):
    copy = Measurement(1.0, 3_000_000, 1, 1)
    figures = {"cp": [copy], "cp, then sync": [copy], "load both, save": [Measurement(9.0, 4_000_000_000, 1, 1)]}
    good = {"qwen-merge merge": [Measurement(1.2, 60_000_000, 1, 1)], **figures}
    assert _report(good, 1, None) == 0
    assert "peak memory 1/66.7 of loading both" in capsys.readouterr().out
    slow = {"qwen-merge merge": [Measurement(1.4, 600_000_000, 1, 1)], **figures}
    assert _report(slow, 1, None) == 1
    assert capsys.readouterr().out.count("NOT MET") == 3


def test_the_synthetic_checkpoints_can_be_merged(tmp_path, monkeypatch):
    """As the real-size run has them: of the VLM only the index and the files with the vision tower."""
    from qwen_merge.bench import real_sizes, synthetic

    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 64}
    llm = {**real_sizes.QWEN3["0.6B"], **small, "num_hidden_layers": 2}
    vlm = {**real_sizes.QWEN2_5_VL["3B"], **small, "num_hidden_layers": 4}
    vlm["vision_config"] = {**vlm["vision_config"], **vision}
    monkeypatch.setitem(real_sizes.QWEN3, "0.6B", llm)
    monkeypatch.setitem(real_sizes.QWEN2_5_VL, "3B", vlm)
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 500_000)
    make_vlm(tmp_path / "vlm", only_vision_files=True)
    make_llm(tmp_path / "llm", gb=0.02)
    assert not (tmp_path / "vlm" / "model-00003-of-00003.safetensors").exists()
    report = merge(MergeOptions(vlm=str(tmp_path / "vlm"), llm=str(tmp_path / "llm"), output=tmp_path / "out"))
    assert report.plan.config["num_hidden_layers"] > 2
    assert sum(path.stat().st_size for path in (tmp_path / "llm").glob("*.safetensors")) >= 20e6
