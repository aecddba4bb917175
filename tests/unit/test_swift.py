"""What ms-swift is told of the architectures: freeze groups, and templates that count and ask the checkpoint."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import grafts

QUESTION, ANSWER = "What colour is it?", "A red circle."
STOCK = {"model_type": "qwen2_5_vl"}


@pytest.fixture(scope="module")
def swift():
    """ms-swift, which knows the architectures from here on."""
    import swift.llm

    from qwen_merge.swift import register

    register()
    return swift.llm


@pytest.fixture(scope="module")
def stock(graft, tmp_path_factory):
    llm = grafts.make_llm(tmp_path_factory.mktemp("stock") / "llm", tied=False, dtype="float32", hidden_size=128)
    folder = llm.parent / "graft"
    file = grafts.write_recipe(
        llm.parent / "graft.yaml", graft.folder / "qwen2_5_vl", "patch_merger", llm, folder, architecture="qwen2_5_vl"
    )
    from qwen_merge.graft.make import make
    from qwen_merge.graft.recipe import read

    make(read(file))
    return folder


@pytest.fixture(scope="module")
def load(swift):
    """Checkpoint -> (model, template), as `swift sft` has them."""

    def of(folder, template: str | None = None, **options):
        model, processor = swift.get_model_tokenizer(
            str(folder), torch_dtype=torch.float32, attn_impl="sdpa", use_hf=True, **options
        )
        made = swift.get_template(template or model.model_meta.template, processor)
        made.model = model
        made.set_mode("train")
        return model, made

    return of


@pytest.fixture
def row(tmp_path):
    """A row with a picture of this size, as in a JSONL file."""

    def make(size=(84, 56), text: str = f"<image>{QUESTION}") -> dict:
        file = tmp_path / f"{size[0]}x{size[1]}.png"
        grafts.pictures(size)[0].save(file)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
        return {"messages": messages, "images": [str(file)]}

    return make


def parts(model) -> dict[str, set[str]]:
    """The freeze groups, and the parameters that are in them: a name that is in the aligner is in no other."""
    keys = model.model_meta.model_arch
    names = [name for name, _ in model.named_parameters()]
    groups = {"aligner": keys.aligner, "vision": keys.vision_tower, "llm": keys.language_model}
    found = {
        group: {name for name in names if name.startswith(tuple(f"{key}." for key in wanted))}
        for group, wanted in groups.items()
    }
    return {**found, "vision": found["vision"] - found["aligner"]}


def test_every_parameter_is_in_one_freeze_group(load, graft, untied):
    deepstack = graft("qwen3_vl", "own", "qwen3_vl", "mrope")
    for folder in (graft("qwen2_5_vl", "patch_merger", "qwen3", "mrope"), deepstack, untied.merged):
        model, _ = load(folder)
        groups = parts(model)
        assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
        assert set().union(*groups.values()) == {name for name, _ in model.named_parameters()}
        assert all(groups.values())
        assert "lm_head.weight" in groups["llm"] or model.config.tie_word_embeddings
        assert all(("projector" in name) or ("merger" in name) for name in groups["aligner"])


@pytest.mark.parametrize("which", ["graft", "merged", "stock"])
def test_a_prompt_is_what_the_checkpoints_own_template_makes(load, graft, untied, stock, row, which):
    folder = {
        "graft": lambda: graft("qwen2_5_vl", "patch_merger", "qwen3", "mrope"),
        "merged": lambda: untied.merged,
        "stock": lambda: stock,
    }[which]()
    options = {"template": "qwen_merge", **STOCK} if which == "stock" else {}
    model, template = load(folder, **options)
    given = row()
    encoded = template.encode(given)
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = f"{prompt}{ANSWER}<|im_end|>\n"  # without the empty thought that the checkpoint's template would add
    inputs, asked = (
        processor(text=[text], images=grafts.pictures((84, 56)), return_tensors="pt") for text in (whole, prompt)
    )
    assert encoded["input_ids"] == inputs["input_ids"][0].tolist()
    assert encoded["input_ids"].count(model.config.image_token_id) == 6
    length = asked["input_ids"].shape[1]
    assert encoded["labels"] == [-100] * length + encoded["input_ids"][length:]
    batch = collated(template, row(), row((56, 56)))
    assert not any(name.startswith("cu_seq") for name in batch)
    model.train()
    template.register_post_encode_hook([model])
    loss = model(**batch).loss
    template.remove_post_encode_hook()
    assert loss.isfinite()
    if which == "graft":
        plain = AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32).train()
        single = plain(**inputs, labels=torch.tensor([encoded["labels"]])).loss
        again = model(**collated(template, row())).loss
        assert again.item() == pytest.approx(single.item(), abs=1e-5)


def collated(template, *rows) -> dict:
    batch = template.data_collator([template.encode(given) for given in rows])
    batch.pop("text_position_ids", None)
    return batch


@pytest.mark.parametrize(
    "kinds",
    [
        ("siglip", "linear", "qwen2", "1d"),
        ("clip", "mlp", "qwen3_moe", "mrope"),
        ("siglip", "resampler", "qwen3", "1d"),
        ("qwen3_vl", "own", "qwen3_vl", "mrope"),
    ],
)
def test_grafts_of_other_parts(load, graft, row, kinds):
    """As many placeholders as their projector gives tokens; a batch of one is no packed row, which experts refuse."""
    folder = graft(*kinds)
    model, template = load(folder)
    batch = collated(template, row())
    wanted = model.config.tokens(batch["image_grid_thw"][0].tolist())
    assert (batch["input_ids"] == model.config.image_token_id).sum() == wanted > 1
    assert model.train()(**batch).loss.isfinite()


def test_a_placeholder_too_many_is_an_error_with_both_numbers(load, graft, untied, stock, row):
    wrong = {"text": "<image>What is <|image_pad|>?"}
    for folder, options in (
        (graft("qwen2_5_vl", "patch_merger", "qwen3", "mrope"), {}),
        (untied.merged, {}),
        (stock, {"template": "qwen_merge", **STOCK}),
    ):
        _, template = load(folder, **options)
        assert template.encode(row())  # the control
        with pytest.raises(ValueError, match=r"\d+ placeholders for images .* its images have 6 features"):
            template.encode(row(**wrong))


def test_the_trap_is_still_there(load, stock, row):
    """ms-swift's own template has Qwen's numbers in its code: with others it counts nothing and goes on."""
    model, template = load(stock, **STOCK)
    encoded = template.encode(row())
    assert encoded["input_ids"].count(model.config.image_token_id) == 1
    assert encoded["image_grid_thw"].prod() // 4 == 6


def test_sizes_are_lowered_by_the_environment_and_never_raised(load, graft, row, monkeypatch):
    folder = graft("qwen2_5_vl", "patch_merger", "qwen3", "mrope")
    for most, tokens in (("4000", 2), ("100000000", 6)):
        monkeypatch.setenv("MAX_PIXELS", most)
        model, template = load(folder)
        largest = json.loads((folder / "preprocessor_config.json").read_text())["max_pixels"]
        assert template.bounds["max_pixels"] == min(int(most), largest)
        assert template.encode(row())["input_ids"].count(model.config.image_token_id) == tokens


def test_a_video_is_refused(load, graft, row):
    _, template = load(graft("qwen2_5_vl", "patch_merger", "qwen3", "mrope"))
    with pytest.raises(ValueError, match="on pictures and texts here; a message has a video"):
        template.encode({**row(text="<video>What is it?"), "images": [], "videos": ["clip.mp4"]})


@pytest.mark.parametrize(
    "kinds", [("qwen2_5_vl", "patch_merger", "qwen3", "mrope"), ("qwen3_vl", "own", "qwen3_vl", "mrope")]
)
def test_texts_alone_reach_the_projector_with_a_zero(load, graft, row, kinds):
    """As if nothing were there, but that its weights are gathered and have gradients on every rank."""
    model, template = load(graft(*kinds))
    batch = collated(template, {**row(text=QUESTION), "images": []})
    expected = model.train()(**batch).loss
    assert not expected.requires_grad or not list(gradients(model, expected))  # the control
    template.register_post_encode_hook([model])
    loss = model(**batch).loss
    template.remove_post_encode_hook()
    assert loss.item() == expected.item()
    found = list(gradients(model, loss))
    assert len(found) == len(list(model.model.projector.parameters()))
    assert not any(gradient.any() for gradient in found)


def test_texts_alone_reach_a_projector_of_large_squares(load, sources, row, tmp_path):
    from qwen_merge.graft.make import make
    from qwen_merge.graft.recipe import read

    parts = (sources / "siglip2", "mlp", sources / "qwen3", tmp_path / "graft")
    make(read(grafts.write_recipe(tmp_path / "graft.yaml", *parts, projector={"merge_size": 6})))
    model, template = load(tmp_path / "graft")
    batch = collated(template, {**row(text=QUESTION), "images": []})
    template.register_post_encode_hook([model.train()])
    found = gradients(model, model(**batch).loss)
    template.remove_post_encode_hook()
    assert len(found) == len(list(model.model.projector.parameters()))


def gradients(model, loss):
    """Those that the projector has got."""
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.model.projector.parameters() if parameter.grad is not None]
