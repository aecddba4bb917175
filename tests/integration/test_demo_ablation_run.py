"""An ablation from parents of a few steps to its table, through LLaMA-Factory and the exam, in the smallest size."""

import json
import shutil
from functools import partial

import pytest
import torch

from qwen_merge.demo import checkpoints
from qwen_merge.demo.ablation import Ablation
from qwen_merge.demo.language import CHANCE
from qwen_merge.demo.run import Demo
from qwen_merge.demo.trial import moved, parameters
from qwen_merge.demo.variants import QWEN_MERGE, UNTRAINED, Budget, Graft, Variant, result_file

pytestmark = pytest.mark.slow

BUDGET = Budget(steps=(2, 2), seeds=1, rows=(64, 64), asked={"colour": 12, "number": 12})
VARIANTS = [
    Variant("projector", QWEN_MERGE, {"freeze_language_model": "true"}),
    Variant("mlp", Graft("mlp", {"kind": "mlp", "merge_size": 1}), {"freeze_vision_tower": "false"}),
]


def test_two_variants_from_their_parents_to_the_table(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        demo = Demo(tmp_path / "out")
        demo.step("llm", "llm", partial(checkpoints.make_llm, demo.checkpoint("llm"), 0, (2, 4)))
        demo.step("vlm", "vlm", partial(checkpoints.make_vlm, demo.checkpoint("vlm"), 0, (2, 4)))
    finally:
        torch.set_num_threads(threads)
    made = Ablation(demo, "freeze", BUDGET, VARIANTS)
    assert made.run() == 0
    content = json.loads((made.folder / "results.json").read_text())
    assert [variant["name"] for variant in content["variants"]] == ["projector", "mlp", UNTRAINED]
    runs = {variant["name"]: variant["runs"][0] for variant in content["variants"]}

    # What was to train did, and nothing else; of a picture's 36 patches the one merges four, the other none.
    folder = made.folder / "seed0"
    assert runs["projector"]["trained_parameters"] == runs["projector"]["projector_parameters"] > 0
    assert runs["mlp"]["trained_parameters"] == parameters(folder / "mlp/base")
    assert {name: run["tokens"] for name, run in runs.items()} == {"projector": 9, "mlp": 36, UNTRAINED: 9}
    assert moved(folder / "extended/base", folder / "extended/stage1") == runs["projector"]["projector_parameters"]
    log = (folder / "projector/stage2.2/trainer_log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["total_steps"] == BUDGET.steps[1]

    # The control: untrained is another model than trained, and can only guess.
    assert runs[UNTRAINED]["trained_parameters"] == 0
    assert runs[UNTRAINED]["answer_loss"] != runs["projector"]["answer_loss"]
    for topic, share in runs[UNTRAINED]["accuracy"].items():
        assert share <= CHANCE[topic] + 0.25  # 12 questions

    # A lost result comes again from the checkpoints that stayed, the same; what was there is not touched.
    lost, kept = (result_file(made.folder, variant, 0) for variant in VARIANTS)
    before, times = json.loads(lost.read_text()), (kept.stat().st_mtime_ns, (folder / "mlp/stage1").stat().st_mtime_ns)
    lost.unlink()
    shutil.rmtree(folder / "mlp/base")
    assert Ablation(Demo(demo.output, resume=True), "freeze", BUDGET, VARIANTS).run() == 0
    after = json.loads(lost.read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    assert (kept.stat().st_mtime_ns, (folder / "mlp/stage1").stat().st_mtime_ns) == times
