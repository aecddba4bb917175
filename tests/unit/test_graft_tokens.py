"""Special tokens that an LLM's tokenizer lacks: into the tokenizer, and rows of embedding and head for them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import grafts
from checkpoints import BASE_VOCABULARY, SPECIAL_TOKENS, TOKEN_IDS, make_llm
from qwen_merge import cli
from qwen_merge.architecture import register

register()

FIRST = max(TOKEN_IDS.values()) + 1  # after the tokenizer's last
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
OTHERS = {"image": "<|picture|>", "vision_start": "<|see|>"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """spare: an LLM with rows to spare; full: one without; tied: one whose head is the embedding."""
    folder = tmp_path_factory.mktemp("tokens")
    grafts.make_tower(folder / "siglip", "siglip")
    make_llm(folder / "spare", tied=False, dtype="float32")
    make_llm(folder / "full", tied=False, dtype="bfloat16", vocab_size=FIRST)
    make_llm(folder / "tied", tied=True, dtype="float32", vocab_size=FIRST + 1)
    return folder


def make(sources: Path, llm: Path, output: Path, capsys, **values) -> tuple[Path, str]:
    file = grafts.write_recipe(output.with_suffix(".yaml"), sources / "siglip", "mlp", llm, output, **values)
    assert cli.main(["graft", "--plan", str(file)]) == 0
    plan = capsys.readouterr().out
    assert not output.exists()
    assert cli.main(["graft", str(file)]) == 0
    return output, plan


@pytest.mark.parametrize(
    ("llm", "rows", "matrices"), [("spare", 384, MATRICES), ("full", 384, MATRICES), ("tied", 384, MATRICES[:1])]
)
def test_new_tokens_get_numbers_and_rows(sources, tmp_path, capsys, llm, rows, matrices):
    output, plan = make(sources, sources / llm, tmp_path / "out", capsys, tokens=OTHERS)
    other, _ = make(sources, sources / llm, tmp_path / "other", capsys, tokens=OTHERS, seed=7)
    assert f"<|picture|> is {FIRST}, <|see|> is {FIRST + 1}" in plan
    assert ("rows that were spare" in plan) == (llm == "spare")
    before, after, seeded = (load_file(folder / "model.safetensors") for folder in (sources / llm, output, other))
    for name in matrices:
        old, new = before[name], after[name]
        drawn = [FIRST, FIRST + 1, *range(max(FIRST + 2, len(old)), rows)]
        kept = [number for number in range(len(old)) if number not in drawn]
        assert new.shape == (rows, old.shape[1])
        assert torch.equal(new[kept].view(torch.uint8), old[kept].view(torch.uint8))
        mean, spread = old[:FIRST].float().mean(0), old[:FIRST].float().std()
        assert ((new[drawn].float() - mean).abs().max() < spread * 0.06).all()
        assert not torch.equal(new[FIRST], new[FIRST + 1])
        assert not torch.equal(new[FIRST], seeded[name][FIRST])  # the control of what follows: the seed draws them
        assert torch.equal(new[kept], seeded[name][kept])
    manifest = json.loads((output / "merge_manifest.json").read_text())
    assert set(manifest["tensors"]["new_rows"]) == set(matrices)

    model, processor = AutoModelForImageTextToText.from_pretrained(output).eval(), AutoProcessor.from_pretrained(output)
    assert model.config.image_token_id == processor.image_token_id == FIRST
    assert model.config.vision_start_token_id == FIRST + 1
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == rows
    text = "<|see|><|picture|><|vision_end|>What?"
    inputs = processor(text=text, images=[Image.new("RGB", (70, 56))], return_tensors="pt")
    assert (inputs["input_ids"] == FIRST).sum() == model.config.tokens(inputs["image_grid_thw"][0].tolist())
    assert processor.decode(inputs["input_ids"][0, :2]) == "<|see|><|picture|>"
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert "<|see|><|picture|><|vision_end|>" in processor.apply_chat_template(conversation)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        ids, own = torch.arange(40)[None], grafts.language_model(sources / llm).float()
        assert torch.allclose(model.float()(input_ids=ids).logits[..., :FIRST], own(ids).logits[..., :FIRST], atol=1e-5)


def drop_tokens(llm: Path) -> None:
    """As a tokenizer from before vision: its added tokens end with <|im_end|>."""
    kept = [TOKEN_IDS[name] for name in SPECIAL_TOKENS[:3]]
    tokenizer = json.loads((llm / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [entry for entry in tokenizer["added_tokens"] if entry["id"] in kept]
    (llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((llm / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {k: v for k, v in config["added_tokens_decoder"].items() if int(k) in kept}
    config["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    (llm / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("fast", [True, False])
def test_a_tokenizer_from_before_vision(sources, tmp_path, capsys, fast):
    """With tokenizer.json, and with vocab.json and merges.txt alone."""
    llm = make_llm(tmp_path / "llm", tied=True, dtype="float32")
    drop_tokens(llm)
    if not fast:
        (llm / "tokenizer.json").unlink()
    output, plan = make(sources, llm, tmp_path / "out", capsys)
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    numbers = [BASE_VOCABULARY + 3 + place for place in range(4)]
    assert all(f"{name} is {number}" in plan for name, number in zip(names, numbers, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.convert_tokens_to_ids(list(names)) == numbers
    assert tokenizer("a<|vision_start|><|image_pad|>b")["input_ids"][1:3] == [numbers[2], numbers[0]]
    assert len(AutoTokenizer.from_pretrained(llm)("<|image_pad|>")["input_ids"]) > 1  # the control


def test_what_is_there_stays_as_it_is(sources, tmp_path, capsys):
    output, plan = make(sources, sources / "full", tmp_path / "out", capsys)
    assert "added to the tokenizer" not in plan
    before, after = (load_file(folder / "model.safetensors") for folder in (sources / "full", output))
    assert all(torch.equal(before[name], after[name]) for name in MATRICES)
    assert "new_rows" not in json.loads((output / "merge_manifest.json").read_text())["tensors"]


def test_tokens_may_change_their_places(sources, tmp_path, capsys):
    """Each other's spelling, too: replaced one by one both would be the same in the chat template."""
    swapped = {"image": "<|video_pad|>", "video": "<|image_pad|>"}
    output, _ = make(sources, sources / "spare", tmp_path / "out", capsys, tokens=swapped)
    plain, _ = make(sources, sources / "spare", tmp_path / "plain", capsys)
    for kind in ("image", "video"):
        conversation = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "What?"}]}]
        found, before = (
            AutoProcessor.from_pretrained(folder).apply_chat_template(conversation) for folder in (output, plain)
        )
        assert f"<|vision_start|>{swapped[kind]}<|vision_end|>What?" in found
        assert f"<|vision_start|><|{kind}_pad|><|vision_end|>What?" in before  # the control


def test_a_longer_vocabulary_is_measured_by_the_llm_s_words(sources, tmp_path, capsys):
    file = grafts.write_recipe(
        tmp_path / "graft.yaml", sources / "siglip", "mlp", sources / "full", tmp_path / "out", tokens=OTHERS
    )
    assert cli.main(["graft", str(file), "--measure"]) == 0
    assert "(+0.0000); KL divergence from the LLM 0.0000" in capsys.readouterr().out
