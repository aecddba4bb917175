"""Grafts with parts of a Qwen3-VL: its tower with and without DeepStack, its patch mergers, its LLM.

The tower needs transformers 4.57 (the second stack); the LLM is a Qwen3 and runs on both.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import grafts
from checkpoints import make_llm
from grafts import PROMPT, pictures
from qwen_merge import cli
from qwen_merge.architecture import register

register()

TOWER = pytest.mark.skipif(not grafts.HAS_QWEN3_VL, reason="Qwen3-VL's tower needs transformers 4.57")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """qwen3_vl: as wide as qwen3; wide: an LLM of another width."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    grafts.make_qwen3_vl(folder / "qwen3_vl")
    grafts.make_tower(folder / "siglip", "siglip")
    grafts.make_language_model(folder / "qwen3", "qwen3")
    make_llm(folder / "wide", dtype="float32", hidden_size=96)
    return folder


@pytest.fixture(scope="module")
def graft(sources):
    def make(tower: str, projector: str, llm: str, **vision) -> Path:
        output = sources / "-".join((tower, projector, llm, *map(str, vision.values())))
        if not output.exists():
            parts = (sources / "graft.yaml", sources / tower, projector, sources / llm, output)
            assert cli.main(["graft", str(grafts.write_recipe(*parts, vision=vision))]) == 0
        return output

    return make


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def seen(folder: Path) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(folder)
    return processor(text=PROMPT + "And?" + PROMPT, images=pictures((96, 64), (64, 128)), return_tensors="pt")


@TOWER
@torch.no_grad()
def test_a_qwen3_vl_put_together_again_is_itself(graft, sources):
    """Tower, patch mergers, DeepStack, interleaved positions, LLM: the logits of Qwen3-VL's own class."""
    from transformers import Qwen2VLImageProcessor

    own = load(sources / "qwen3_vl")
    folder = graft("qwen3_vl", "own", "qwen3_vl")
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-5)

    inputs = seen(folder)
    pixels = Qwen2VLImageProcessor.from_pretrained(sources / "qwen3_vl")(
        images=pictures((96, 64), (64, 128)), return_tensors="pt"
    )
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = own(**texts, **pixels).logits
    assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
    padded = {name: torch.cat((torch.zeros_like(value[:, :3]), value), dim=1) for name, value in texts.items()}
    assert torch.allclose(model(**{**inputs, **padded}).logits[:, 3:], expected, atol=1e-5)
    answers = [
        asked.generate(**texts, **values, max_new_tokens=5, do_sample=False, eos_token_id=None)
        for asked, values in ((own, pixels), (model, {k: v for k, v in inputs.items() if k not in texts}))
    ]
    assert torch.equal(*answers)

    # The controls: each of the parts makes a difference to pictures, and none to texts.
    off = load(graft("qwen3_vl", "own", "qwen3_vl", deepstack=False))
    assert torch.allclose(off(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-5)
    assert (off(**inputs).logits - expected).abs().max() > 1e-3
    model.model.language_model.rotary_emb.interleaved = False
    assert torch.allclose(model(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-5)
    assert (model(**inputs).logits - expected).abs().max() > 1e-4


@torch.no_grad()
def test_its_llm_takes_another_tower(graft, sources):
    folder = graft("siglip", "linear", "qwen3_vl")
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["model_type"] == "qwen3"
    assert config["text_config"]["rope_theta"] == 5000000
    assert (config["mrope_section"], config["mrope_interleaved"]) == ([6, 5, 5], True)
    model, ids = load(folder), torch.arange(40)[None]
    assert torch.allclose(
        model(input_ids=ids).logits, grafts.language_model(sources / "qwen3_vl")(ids).logits, atol=1e-5
    )
    inputs = seen(folder)
    logits = model(**inputs).logits
    model.model.language_model.rotary_emb.interleaved = False  # the control
    assert torch.allclose(
        model(input_ids=ids).logits, grafts.language_model(sources / "qwen3_vl")(ids).logits, atol=1e-5
    )
    assert (model(**inputs).logits - logits).abs().max() > 1e-5


def test_frequencies_take_turns():
    """By hand, for sections of 6, 5 and 5: T H W T H W ... T."""
    from qwen_merge.architecture.modeling_qwen2_5_vl_merge import Qwen2_5_VL_MergeRotaryEmbedding

    config = grafts.qwen3_config({"text_config": {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 2}})
    rotary = Qwen2_5_VL_MergeRotaryEmbedding(config, None, [6, 5, 5], True)
    positions = torch.tensor([7, 20, 31])[:, None, None]  # time, height, width of one token
    cos, _ = rotary(torch.zeros(1), positions)
    axes = [number % 3 for number in range(15)] + [0]
    expected = torch.tensor([positions[axis].item() for axis in axes]) * rotary.inv_freq
    assert torch.allclose(cos[0, 0], torch.cat((expected, expected)).cos(), atol=1e-6)
    assert not torch.allclose(cos[0, 0], torch.cat((expected, expected)).roll(1).cos(), atol=1e-2)


@TOWER
@pytest.mark.parametrize(
    ("projector", "llm", "deepstack", "note", "copied"),
    [
        ("own", "qwen3_vl", None, "DeepStack is on", True),
        ("own", "qwen3_vl", False, "DeepStack is off", False),
        ("extended", "wide", True, "its patch mergers are initialised", False),
        ("extended", "qwen3", True, "its patch mergers are copied", True),
        ("mlp", "wide", True, "its patch mergers are initialised", False),
        ("linear", "qwen3_vl", None, "DeepStack is off", False),
        ("linear", "qwen3_vl", True, "its patch mergers are initialised", False),
    ],
)
def test_where_deepstacks_mergers_come_from(graft, sources, tmp_path, capsys, projector, llm, deepstack, note, copied):
    vision = {} if deepstack is None else {"deepstack": deepstack}
    parts = (tmp_path / "graft.yaml", sources / "qwen3_vl", projector, sources / llm, tmp_path / "out")
    assert cli.main(["graft", "--plan", str(grafts.write_recipe(*parts, vision=vision))]) == 0
    assert note in capsys.readouterr().out
    folder = graft("qwen3_vl", projector, llm, **vision)
    own, made = load_file(sources / "qwen3_vl/model.safetensors"), load_file(folder / "model.safetensors")
    levels = {name: tensor for name, tensor in made.items() if name.startswith("projector.deepstack.")}
    assert bool(levels) == (note != "DeepStack is off")
    for name, tensor in levels.items():
        source = own[name.replace("projector.deepstack", "model.visual.deepstack_merger_list")]
        assert (tensor.shape == source.shape and torch.equal(tensor, source)) == (copied and bool(levels))
    if projector in ("own", "extended"):
        prefix = "projector.first." if levels else "projector."
        assert torch.equal(made[f"{prefix}merger.linear_fc1.weight"], own["model.visual.merger.linear_fc1.weight"])
    with torch.no_grad():
        assert load(folder)(**seen(folder)).logits.isfinite().all()


@TOWER
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_get_deepstacks_gradients(graft, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = load(graft("qwen3_vl", "own", "qwen3_vl")).train()
        inputs = seen(graft("qwen3_vl", "own", "qwen3_vl"))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    whole, again = gradients
    assert whole["model.projector.deepstack.1.linear_fc2.weight"].abs().max() > 0
    assert all(torch.allclose(again[name], whole[name], atol=1e-7) for name in whole)


@TOWER
def test_a_save_keeps_names_and_bits(graft, tmp_path):
    folder = graft("qwen3_vl", "own", "qwen3_vl")
    load(folder).save_pretrained(tmp_path / "saved")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(load(tmp_path / "saved")(**seen(folder)).logits, load(folder)(**seen(folder)).logits)


def test_sections_that_cannot_take_turns(sources, tmp_path, capsys):
    parts = (tmp_path / "graft.yaml", sources / "siglip", "linear", sources / "qwen3_vl", tmp_path / "out")
    for section, code in (([4, 6, 6], 2), ([8, 4, 4], 0)):
        assert cli.main(["graft", "--plan", str(grafts.write_recipe(*parts, mrope_section=section))]) == code
        assert ("height and width have at most a third each" in capsys.readouterr().err) == (code == 2)


@pytest.mark.parametrize(
    ("tower", "projector", "llm", "vision", "message"),
    [
        pytest.param("qwen3_vl", "own", "wide", {}, "gives 64 values a token, and the LLM's are 96 wide", marks=TOWER),
        pytest.param("qwen3_vl", "resampler", "qwen3", {"deepstack": True}, "take another projector", marks=TOWER),
        ("siglip", "linear", "qwen3", {"deepstack": True}, "siglip_vision_model has none; it is Qwen3-VL's"),
        ("siglip", "own", "qwen3", {}, "siglip_vision_model has none: take mlp"),
        pytest.param(
            "qwen3_vl", "linear", "qwen3", {}, "qwen3_vl needs transformers 4.57 or later",
            marks=pytest.mark.skipif(grafts.HAS_QWEN3_VL, reason="this transformers has it"),
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(sources, tmp_path, capsys, tower, projector, llm, vision, message):
    parts = (tmp_path / "graft.yaml", sources / tower, projector, sources / llm, tmp_path / "out")
    assert cli.main(["graft", str(grafts.write_recipe(*parts, vision=vision))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
