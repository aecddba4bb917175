"""The compatibility graft: it is stock Qwen2.5-VL, what it leaves out is measured, and what does not fit is told."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3ForCausalLM,
)

import grafts
from qwen_merge import cli
from qwen_merge.architecture import register
from qwen_merge.errors import UserError
from qwen_merge.graft import measure
from qwen_merge.graft.recipe import read
from qwen_merge.merger.sources import open_source
from training import REPOSITORY

PROMPT = "<|vision_start|><|image_pad|><|vision_end|>What is it?"
HIDDEN = 128  # four heads of 32 fill it, as in Qwen3-8B


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    grafts.make_tower(folder / "vlm", "qwen2_5_vl")
    grafts.make_llm(folder / "qwen3", tied=False, dtype="float32", hidden_size=HIDDEN)
    grafts.make_llm(folder / "narrow", tied=True, dtype="float32")
    grafts.make_language_model(folder / "qwen2", "qwen2")
    return folder


@pytest.fixture(scope="module")
def graft(sources):
    """(LLM, further keys of the file) -> the result's folder."""

    def make(llm: str, *options: str, **values):
        output = sources / "-".join(("graft", llm, *(str(value) for value in values.values())))
        if not output.exists():
            file = grafts.write_recipe(
                sources / "graft.yaml", sources / "vlm", "patch_merger", sources / llm, output, **values
            )
            assert cli.main(["graft", str(file), *(options or ["--no-measure"])]) == 0
        return output

    return make


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_it_is_stock_and_only_the_norms_are_left_out(graft, sources):
    folder = graft("qwen3", architecture="qwen2_5_vl")
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    made, llm = load_file(folder / "model.safetensors"), load_file(sources / "qwen3/model.safetensors")
    vlm = load_file(sources / "vlm/model.safetensors")
    norms = {name for name in llm if name.endswith(("q_norm.weight", "k_norm.weight"))}
    biases = {name for name in made if name.startswith("model.") and name.endswith("bias")}
    assert len(norms) == 4
    assert len(biases) == 6
    assert not any(made[name].any() for name in biases)
    assert {name for name in made if not name.startswith("visual.")} == set(llm) - norms | biases
    assert all(torch.equal(made[name], llm[name]) for name in set(llm) - norms)
    tower = {name for name in made if name.startswith("visual.") and ".merger." not in name}
    stored = {name.replace("model.visual.", "visual."): value for name, value in vlm.items()}
    assert tower
    assert all(torch.equal(made[name], stored[name]) for name in tower)
    assert made["visual.merger.mlp.2.weight"].shape[0] == HIDDEN
    assert made["visual.merger.mlp.2.weight"].std() > 0.01
    assert torch.equal(made["visual.merger.ln_q.weight"], torch.ones(32))
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    manifest = json.loads((folder / "merge_manifest.json").read_text())
    assert set(manifest["tensors"]["dropped"]["llm"].values()) == {4}
    # The LLM without its norms is what the text model is.
    ids = torch.arange(20)[None]
    plain = Qwen3ForCausalLM.from_pretrained(sources / "qwen3")
    assert not torch.allclose(logits(model, ids), logits(plain, ids), atol=1e-2)  # the control
    for layer in plain.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
    assert torch.allclose(logits(model, ids), logits(plain, ids), atol=1e-5)


def test_pictures_go_through_the_stock_processor(graft):
    folder = graft("qwen3", architecture="qwen2_5_vl")
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8))
    inputs = processor(text=[PROMPT], images=[picture], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 6
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_with_a_qwen25_nothing_is_lost_and_pictures_are_seen_as_by_the_kits_own(graft, sources, capsys):
    stock = graft("qwen2", "--measure", architecture="qwen2_5_vl")
    printed = capsys.readouterr().out
    assert "KL divergence from the LLM 0.0000" in printed
    assert "architecture qwen2_5_vl is for" not in printed
    register()
    own, model = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (graft("qwen2"), stock))
    own.model.projector.load_state_dict(model.model.visual.merger.state_dict())
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 112, 3), np.uint8))
    found = []
    for folder, which in ((graft("qwen2"), own), (stock, model)):
        inputs = AutoProcessor.from_pretrained(folder)(text=[PROMPT], images=[picture], return_tensors="pt")
        found.append(which.eval()(**inputs).logits)
    assert torch.allclose(*found, atol=1e-4)
    model.model.visual.merger.mlp[2].bias += 1  # the control
    assert not torch.allclose(found[0], model(**inputs).logits, atol=1e-2)


def test_what_is_measured_is_the_loss_on_the_text(graft, sources, tmp_path):
    text = "What colour is the shape in the picture? It is a red circle. " * 50
    llm = open_source(str(sources / "qwen3"), "llm")
    found = measure.measure(graft("qwen3", architecture="qwen2_5_vl"), llm, text)
    ids = AutoTokenizer.from_pretrained(sources / "qwen3")(text, return_tensors="pt")["input_ids"]
    assert found.tokens == min(ids.shape[1] - 1, measure.MOST) == 1024
    expected, grafted = [], []
    models = (
        (expected, Qwen3ForCausalLM.from_pretrained(sources / "qwen3")),
        (grafted, Qwen2_5_VLForConditionalGeneration.from_pretrained(graft("qwen3", architecture="qwen2_5_vl"))),
    )
    for start in (0, 512):
        window = ids[:, start : start + 513]
        for losses, model in models:
            losses.append(nn.functional.cross_entropy(logits(model, window[:, :-1])[0], window[0, 1:]).item())
    assert found.llm == pytest.approx(np.mean(expected), abs=1e-5)
    assert found.graft == pytest.approx(np.mean(grafted), abs=1e-5)
    assert found.divergence > 0.01
    with pytest.raises(UserError, match="the text has 1 tokens"):
        measure.measure(graft("qwen3", architecture="qwen2_5_vl"), llm, "W")


def test_the_kits_own_graft_loses_nothing(graft, sources):
    found = measure.measure(graft("qwen3"), open_source(str(sources / "qwen3"), "llm"))
    assert found.graft == found.llm
    assert found.divergence == 0


def test_the_command_says_what_it_costs_and_what_it_is_for(sources, tmp_path, capsys):
    file = grafts.write_recipe(
        tmp_path / "graft.yaml",
        sources / "vlm",
        "patch_merger",
        sources / "qwen3",
        tmp_path / "a",
        architecture="qwen2_5_vl",
    )
    assert cli.main(["graft", str(file), "--plan"]) == 0
    assert "4 tensors of the LLM are left out" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    (tmp_path / "text.txt").write_text("Read the number in the picture. " * 9)
    assert cli.main(["graft", str(file), "--measure", str(tmp_path / "text.txt")]) == 0
    printed = capsys.readouterr().out
    assert "is for tools that load no other" in printed
    assert "measured: text of" in printed
    assert cli.main(["graft", str(file), "--measure", str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err


def test_what_it_cannot_hold_is_refused_at_once(sources, tmp_path, capsys):
    file = grafts.write_recipe(
        tmp_path / "graft.yaml", sources / "vlm", "mlp", sources / "narrow", tmp_path / "out",
        architecture="qwen2_5_vl", positions="1d", vision={"frozen": False},
    )  # fmt: skip
    assert cli.main(["graft", str(file)]) == 2
    told = capsys.readouterr().err
    for part in (
        "its heads are 32 wide",
        "64 / 4 = 16 wide",
        "projector.kind is mlp",
        "positions is 1d",
        "vision.frozen",
    ):
        assert part in told
    assert not (tmp_path / "out").exists()
    file.write_text(file.read_text().replace("qwen2_5_vl\n", "llava\n"))
    assert cli.main(["graft", str(file)]) == 2
    assert "architecture is 'llava'; expected one of qwen_merge_graft, qwen2_5_vl" in capsys.readouterr().err


def test_simple_vls_own_files_can_be_read():
    """Both are the same graft; one is under the stock architecture."""
    own, stock = (read(REPOSITORY / f"examples/simple_vl/{name}.yaml") for name in ("graft", "graft_stock"))
    assert (own.vision.source, own.llm.source) == ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-8B")
    assert own.projector == {"kind": "patch_merger"}
    assert own.vision.max_pixels == 1003520
    assert dataclasses.replace(own, architecture="qwen2_5_vl", output=stock.output) == stock
