"""The step before another encoder: Qwen3-VL as it is, on the second stack's own LLaMA-Factory, with a user's own JSON.

.venv-current/bin/python -m pytest tests/integration/test_custom_vision_baseline.py
"""

import pytest
import yaml
from llamafactory.extras.constants import IGNORE_INDEX
from safetensors.torch import load_file

import grafts
from own_sets import make_pictures, row, turns, write_sets
from qwen_merge import cli
from qwen_merge.data import own_rows
from training import REPOSITORY, train_here

pytestmark = pytest.mark.slow

RECIPE = REPOSITORY / "examples/custom_vision/baseline.yaml"


def whole_tensors(saved: dict) -> dict:
    """What trained beside the adapters, under the checkpoint's names."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items() if ".lora_" not in name}


def test_the_baseline_trains_qwen3_vl_s_own_projector_and_adapters(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "ERROR")
    model = grafts.make_qwen3_vl(tmp_path / "model", tied=True)
    make_pictures(tmp_path / "pictures", ["0.png"])
    write_sets(tmp_path, {"mine": [row(number, "<image>\nWhich?", image="0.png") for number in range(8)]})
    registry, data = tmp_path / "sets.yaml", tmp_path / "data"
    assert cli.main(["data", "import", "mine%50", "--sets", str(registry), "--output", str(data)]) == 0
    values = {"dataset": "mine%50", "lr_scheduler_type": "constant"}
    train_here(RECIPE, model=model, output=tmp_path / "out", data=data, **values)
    old, saved = load_file(model / "model.safetensors"), load_file(tmp_path / "out/adapter_model.safetensors")
    whole = whole_tensors(saved)
    assert set(whole) == {name for name in old if name.startswith("model.visual.merger.")}
    step = max(float((tensor - old[name]).abs().max()) for name, tensor in whole.items())
    assert step == pytest.approx(1e-5, rel=0.05)
    low_rank = {name: tensor for name, tensor in saved.items() if ".lora_B." in name}
    assert all("model.language_model.layers." in name for name in low_rank)
    assert max(float(tensor.abs().max()) for tensor in low_rank.values()) == pytest.approx(1e-5, rel=0.05)
    # The control: LLaMA-Factory by itself, which leaves the projector frozen.
    train_here(RECIPE, model=model, output=tmp_path / "less", data=data, **values, additional_target=None)
    assert not whole_tensors(load_file(tmp_path / "less/adapter_model.safetensors"))


def test_a_row_s_last_answer_has_loss(tmp_path, monkeypatch):
    """As in the steps behind this one; `--turns each` makes every answer such a one."""
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import DataArguments
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(grafts.make_qwen3_vl(tmp_path / "model", tied=True))
    recipe = yaml.safe_load(RECIPE.read_text())
    row = own_rows.read({"conversations": turns("One?", "First.", "Two?", "Second.", "Three?", "Third.")}, tmp_path)

    def loss(messages: list[dict], mask_history: bool) -> str:
        settings = DataArguments(cutoff_len=8096, mask_history=mask_history)
        encoder = SupervisedDatasetProcessor(TEMPLATES[recipe["template"]], processor.tokenizer, processor, settings)
        _, labels = encoder._encode_data_example(messages[:-1], messages[-1:], None, None, [], [], [])
        return processor.tokenizer.decode([label for label in labels if label != IGNORE_INDEX]).replace(
            "<|im_end|>\n", "|"
        )

    assert [loss(part.messages, recipe["mask_history"]) for part in own_rows.by_answer(row)] == [
        "First.|",
        "Second.|",
        "Third.|",
    ]
    assert loss(row.messages, False) == "First.|Second.|Third.|"  # the control
