"""A graft whose tower is not Qwen's, served, asked and evaluated: pictures of one size, their checks, all back ends."""

import base64
import importlib.util
import json

import pytest

import grafts
from evaluations import MODEL, Runs, copy_with_the_overlay, lines, write_tables
from qwen_merge.architecture import register
from serving import chat, data_url, decoded, png, said, serve
from stacks import first_stack

pytestmark = pytest.mark.slow

PICTURE = data_url(png())
VIDEO = {
    "type": "video_url",
    "video_url": {"url": "data:video/jpeg;base64," + ",".join([base64.b64encode(png()).decode()] * 4)},
}


@pytest.fixture(scope="module")
def checkpoint(graft, tmp_path_factory):
    made = graft("siglip", "mlp", "qwen3", "mrope")
    return grafts.with_projector(made, tmp_path_factory.mktemp("graft") / "served", seed=1)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    options = ("--dtype", "float32", "--max-model-len", "1024", *(["--enforce-eager"] if first_stack() else []))
    running = serve(checkpoint, tmp_path_factory.mktemp("serve"), *options)
    running.wait()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def unreadable(checkpoint) -> list[int]:
    """Ids that this random model must not say: vLLM leaves half a character at an answer's end out of its text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [number for number in range(384) if not tokenizer.decode([number]).isascii() or number >= 320]


def by_transformers(checkpoint, *content: str, images, never_said: list[int], tokens: int = 24) -> tuple[str, int]:
    """As `said` of the server's answer. content: "<image>" or text."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    register()
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, torch_dtype="float32")
    parts = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in content]
    messages = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=images, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, suppress_tokens=never_said)
    length = inputs.input_ids.shape[1]
    return processor.tokenizer.decode(generated[0, length:], skip_special_tokens=True), length


def test_an_answer_about_pictures_equals_transformers_greedy_one(server, checkpoint, unreadable):
    options = {"logit_bias": dict.fromkeys(map(str, unreadable), -100)}
    other = png((112, 56), (10, 200, 40))
    images = [decoded(png()), decoded(other)]
    expected = by_transformers(checkpoint, "<image>", "<image>", "What is it?", images=images, never_said=unreadable)
    assert said(server.answer(PICTURE, data_url(other), "What is it?", **options)) == expected
    assert said(server.answer(data_url(other), PICTURE, "What is it?", **options)) != expected  # control


def test_a_huge_picture_becomes_one_of_the_tower_s_size(server):
    prompts = [said(server.answer(data_url(png(size)), "What is it?"))[1] for size in ((84, 84), (3000, 2000))]
    assert prompts[0] == prompts[1]


BAD = {
    "a placeholder in the text": ([PICTURE, "<|image_pad|> and"], {}, "2 image placeholder(s) for 1 image(s)"),
    "a picture that does not decode": ([data_url(b"hello")], {}, "cannot identify image file"),
    "a 100-megapixel picture": ([data_url(png((10000, 10000), 0, "L"))], {}, "at most 64,000,000 are allowed"),
    "a video": ([VIDEO], {}, "video"),
    "a frame rate": (
        [PICTURE],
        {"mm_processor_kwargs": {"fps": 2}},
        "fps cannot be set by a request; expected min_pixels",
    ),
    "a picture scaled beyond all measure": (
        [PICTURE],
        {"mm_processor_kwargs": {"max_pixels": 4_000_000_000}},
        "max_pixels is 4000000000; expected 1 to 262,144 pixels",
    ),
    "too many pictures": ([PICTURE] * 9, {}, "At most 8 image(s)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_answered_400_and_the_server_goes_on(server, case):
    content, options, message = BAD[case]
    assert message in server.refusal(*content, "What is it?", **options)
    assert server.ask(PICTURE, "Are you there?").status_code == 200


def test_a_thought_that_never_closes_is_no_answer_and_a_budget_closes_it(server, checkpoint):
    from transformers import AutoTokenizer

    think = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("<think>")
    options = {"logit_bias": {str(think): 100}, "max_tokens": 200}
    message = server.answer(PICTURE, "Why?", **options)["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning_content"].startswith("<think>")
    if first_stack():  # vLLM 0.12 refuses budgets
        within = server.answer(PICTURE, "Why?", **options, chat_template_kwargs={"thinking_budget": 5})
        assert within["choices"][0]["message"]["content"]


def test_chat_asks_the_server_and_the_checkpoint_alike(server, checkpoint, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    places = ([str(checkpoint)], ["--endpoint", f"{server.url}/v1"])
    texts = [chat(*where, "--image", tmp_path / "a.png").replace("\ufffd", "").strip() for where in places]
    assert texts[0] == texts[1] != ""


def test_vlmevalkit_gets_the_same_answers_from_all_back_ends(server, checkpoint, tmp_path):
    if not first_stack() or importlib.util.find_spec("vlmeval") is None:
        pytest.skip("VLMEvalKit's run.py learns the options by an overlay for the first stack")
    launch = Runs(copy_with_the_overlay(tmp_path / "site"), write_tables(tmp_path), checkpoint)
    greedy = ("--temperature", "0", "--max-new-tokens", "24")
    found = {}
    places = {"transformers": (), "vllm": ("--use-vllm",), "endpoint": ("--endpoint", f"{server.url}/v1")}
    for backend, options in places.items():
        work = tmp_path / backend
        result = launch(work, *greedy, *options, name="FewChoices", VLLM_CPU_KVCACHE_SPACE="1")
        assert result.returncode == 0, result.stdout[-3000:]
        recorded = json.loads((work / MODEL / f"{MODEL}_FewChoices_settings.json").read_text())
        assert (recorded["backend"], recorded["model_type"]) == (backend, "qwen_merge_graft")
        assert recorded["settings"]["min_pixels"] == 56 * 56, "the graft's own, not the entry's"
        answers = lines(work, "FewChoices")
        found[backend] = {line["key"]: (line["response"].replace("\ufffd", ""), line["tokens"]) for line in answers}
    assert len(found["endpoint"]) == 4
    assert len(set(found["endpoint"].values())) > 1, "answers that are all alike prove nothing"
    assert found["endpoint"] == found["transformers"] == found["vllm"]
