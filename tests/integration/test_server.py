"""`scripts/serve.sh` and what clients send it: questions, options, thinking budgets, and everything that goes wrong."""

import base64
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from clips import write_clip
from evaluations import MODEL, Runs, copy_with_the_overlay, lines, write_tables
from qwen_merge.architecture import register
from serving import chat, data_url, decoded, png, said, serve
from stacks import first_stack
from training import REPOSITORY

pytestmark = pytest.mark.slow

CONTEXT = 1024
SENTENCE = "I have to give the solution based on the thinking directly now."


@pytest.fixture(scope="module")
def server(untied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    checkpoint = shutil.copytree(untied.merged, folder / "served")
    running = serve(
        checkpoint,
        folder,
        "--dtype",
        "float32",
        "--max-model-len",
        str(CONTEXT),
        "--limit-mm-per-prompt",
        '{"image": 2, "video": 1}',
        *([] if first_stack() else ["--enable-log-requests"]),  # vLLM 0.9.1 logs them unasked
    )
    running.wait()
    yield running
    running.stop()


def jpeg(size, colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


PICTURE = data_url(png())
# Frames of a video as vLLM takes them: JPEGs, of which the decoder gives the same pixels everywhere.
FRAMES = [jpeg((84, 56), (30 * number, 200 - 20 * number, 90)) for number in range(8)]
CLIP = {
    "type": "video_url",
    "video_url": {"url": "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in FRAMES)},
}


@pytest.fixture(scope="module")
def tokens(untied):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(untied.merged)
    return lambda *words: tokenizer.convert_tokens_to_ids(list(words))


@pytest.fixture(scope="module")
def transformers_answer(untied):
    """What transformers says to a prompt with the same media: (text, tokens of the prompt)."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    register()
    processor = AutoProcessor.from_pretrained(untied.merged)
    model = AutoModelForImageTextToText.from_pretrained(untied.merged, torch_dtype="float32")
    config = model.config
    never_said = [config.image_token_id, config.video_token_id, config.vision_start_token_id]

    def answer(*content: str, thinking: bool = True, tokens: int = 24, **media) -> tuple[str, int]:
        """`content`: "<image>", "<video>" or text."""
        kinds = {"<image>": {"type": "image"}, "<video>": {"type": "video"}}
        parts = [kinds.get(part, {"type": "text", "text": part}) for part in content]
        messages = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=thinking)
        inputs = processor(text=[text], return_tensors="pt", **media)
        generated = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, suppress_tokens=never_said)
        length = inputs.input_ids.shape[1]
        return processor.tokenizer.decode(generated[0, length:], skip_special_tokens=True), length

    return answer


def test_an_answer_equals_transformers_greedy_one(server, transformers_answer):
    for thinking in (True, False):
        expected = transformers_answer("<image>", "What is it?", thinking=thinking, images=[decoded(png())])
        reply = server.answer(PICTURE, "What is it?", chat_template_kwargs={"enable_thinking": thinking})
        assert said(reply) == expected


def test_two_pictures_are_seen_in_their_order(server, transformers_answer):
    other = png((112, 56), (10, 200, 40))
    expected = transformers_answer("<image>", "<image>", "What is it?", images=[decoded(png()), decoded(other)])
    assert said(server.answer(PICTURE, data_url(other), "What is it?")) == expected
    assert said(server.answer(data_url(other), PICTURE, "What is it?")) != expected  # control


def test_a_picture_stands_where_it_was_put(server, transformers_answer):
    expected = transformers_answer("Before ", "<image>", " and behind it", images=[decoded(png())])
    assert said(server.answer("Before ", PICTURE, " and behind it")) == expected
    assert said(server.answer(PICTURE, "Before ", " and behind it")) != expected  # control


@pytest.mark.parametrize("fps", [None, 0.5])
def test_a_video_is_seen_with_its_time(server, transformers_answer, fps):
    import numpy

    clip = numpy.stack([numpy.asarray(decoded(frame)) for frame in FRAMES])
    expected = transformers_answer("<video>", "What is it?", videos=[clip], fps=fps or 2.0)
    options = {"mm_processor_kwargs": {"fps": fps}} if fps else {}
    assert said(server.answer(CLIP, "What is it?", **options)) == expected
    assert said(server.answer(CLIP, "What is it?", mm_processor_kwargs={"fps": 24})) != expected  # control


def test_chat_tells_the_server_how_fast_a_video_runs(server, transformers_answer, tmp_path):
    """64 frames in 256 seconds, of which the server keeps 32: one in eight seconds.

    Whole seconds a pair of frames: transformers 4.52.3 cuts fractions off in `get_rope_index`, vLLM does not.
    """
    import cv2
    import numpy

    clip = write_clip(tmp_path / "clip.mp4", 64, 0.25)
    capture = cv2.VideoCapture(str(clip))
    frames = [cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB) for _ in range(64)]
    kept = numpy.stack([frames[index] for index in numpy.linspace(0, 63, 32, dtype=int)])
    expected, slower = (
        transformers_answer("<video>", "What?", videos=[kept], fps=fps, tokens=12)[0] for fps in (0.125, 2.0)
    )
    answer = chat("--endpoint", f"{server.url}/v1", "--video", clip)
    # This random model writes bytes that are no characters, which a stream leaves out.
    answer, expected, slower = (text.replace("\ufffd", "").strip() for text in (answer, expected, slower))
    assert answer == expected
    assert answer != slower  # control: what the server takes a video for that nobody measured


# --- thoughts ---


def thinking(tokens) -> dict[str, int]:
    """Options under which this random model opens a thought and never closes it."""
    return {"logit_bias": {str(token): 100 for token in tokens("<think>", "a", "b", "c")}, "max_tokens": 400}


def test_a_thought_that_never_closes_is_no_answer(server, tokens):
    options = {**thinking(tokens), "logit_bias": {str(tokens("<think>")[0]): 100}, "max_tokens": 8}
    message = server.answer("Why?", **options)["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning_content"] == "<think>" * 7


@pytest.mark.parametrize("budget", [0, 1, 20])
def test_a_thinking_budget_is_kept_and_an_answer_follows(server, tokens, untied, budget):
    from transformers import AutoTokenizer

    from qwen_merge.overlays.vllm.thinking_budget import EARLY_STOP

    options = {**thinking(tokens), "logit_bias": {str(tokens("<think>")[0]): 100}}
    without = server.answer(PICTURE, "Why?", **options)["choices"][0]
    assert SENTENCE not in json.dumps(without)  # control: off by default, and then there is no answer
    assert without["message"]["content"] is None

    reply = server.answer(PICTURE, "Why?", **options, chat_template_kwargs={"thinking_budget": budget})
    message = reply["choices"][0]["message"]
    thought, sentence, rest = message["reasoning_content"].partition(EARLY_STOP.removesuffix("</think>\n\n"))
    assert thought == "<think>" * budget
    assert sentence
    assert not rest
    closing = len(AutoTokenizer.from_pretrained(untied.merged).encode(EARLY_STOP))
    assert message["content"] == "\n\n" + "<think>" * (400 - 1 - budget - closing)
    assert reply["usage"]["completion_tokens"] == 400


def test_a_streamed_thinking_budget_gives_the_same_text(server, tokens):
    options = {**thinking(tokens), "temperature": 1}  # draws among the four tokens

    # A seed whose thought opens at once. vLLM's parsers treat what stands before a <think> in three ways: dropped from
    # a whole answer, content of a streamed one, thought of a streamed one whose first tokens came in one piece.
    def opens_at_once(seed: int) -> bool:
        reply = server.answer("Why?", **options | {"seed": seed, "max_tokens": 1})
        return reply["choices"][0]["message"]["content"] is None

    options["seed"] = next(filter(opens_at_once, range(20)))
    options |= {"chat_template_kwargs": {"thinking_budget": 6}, "max_tokens": 150}
    whole = server.answer("Why?", **options)["choices"][0]["message"]
    thought = content = ""
    with server.ask("Why?", **options, stream=True) as stream:
        for line in stream.iter_lines():
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                thought += delta.get("reasoning_content") or ""
                content += delta.get("content") or ""
    assert SENTENCE in thought
    # vLLM's parser drops a streamed piece that is nothing but a <think> token.
    thought, content, *whole = (
        text.replace("<think>", "") for text in (thought, content, whole["reasoning_content"], whole["content"])
    )
    assert [thought, content] == whole


def test_a_budget_that_is_not_reached_changes_nothing(server, untied):
    from transformers import AutoTokenizer

    # Ids without a token, which only random weights choose: vLLM does not take them in a prompt.
    ids = range(len(AutoTokenizer.from_pretrained(untied.merged)), 384)
    options = {"max_tokens": 40, "logit_bias": dict.fromkeys(map(str, ids), -100)}
    plain = server.answer(PICTURE, "What is it?", **options)["choices"][0]
    for budget in (5, 500):  # this model opens no thought of its own
        within = server.answer(PICTURE, "What is it?", **options, chat_template_kwargs={"thinking_budget": budget})
        assert within["choices"][0] == plain
    closed = {"enable_thinking": False}
    plain = server.answer("What?", chat_template_kwargs=closed)["choices"][0]
    assert server.answer("What?", chat_template_kwargs={**closed, "thinking_budget": 3})["choices"][0] == plain


def test_a_budget_leaves_room_for_pictures(server, tokens):
    """vLLM reckons the room for an answer with the prompt before its pictures are expanded; this one has 400 tokens."""
    big = data_url(png((560, 560)))
    bias = {str(tokens("<think>")[0]): 100}
    for budget in (300, 520, 800):
        reply = server.answer(
            big, "Why?", max_tokens=None, logit_bias=bias, chat_template_kwargs={"thinking_budget": budget}
        )
        usage, choice = reply["usage"], reply["choices"][0]
        assert usage["prompt_tokens"] > 400
        assert usage["total_tokens"] <= CONTEXT
        assert choice["finish_reason"] == "length"
        assert (SENTENCE in choice["message"]["reasoning_content"]) == (budget == 300)


def test_a_thought_that_opens_late_is_not_begun(server, tokens):
    """Budget 0, and the first token is no <think>: a thought that nobody counts must not begin behind it."""
    bias = {str(tokens("a")[0]): 90, str(tokens("<think>")[0]): 89.5}
    late = 0
    for seed in range(8):
        options = {"logit_bias": bias, "max_tokens": 60, "temperature": 1, "seed": seed}
        free = server.answer("Why?", **options)["choices"][0]["message"]
        if not (free["content"] or "").startswith("a"):
            continue  # this seed's thought opens at once
        late += "<think>" in free["content"]  # control
        kept = server.answer("Why?", **options, chat_template_kwargs={"thinking_budget": 0})["choices"][0]["message"]
        assert kept["content"].startswith("a")
        assert "<think>" not in kept["content"]
        assert kept["reasoning_content"] is None
    assert late >= 2


# --- what goes wrong ---


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
def test_an_answer_never_holds_a_placeholder(server, tokens, token):
    """One in anybody's answer would stop the engine for everybody: it counts them over the whole batch."""
    other = "<|box_start|>"
    options = {"skip_special_tokens": False, "max_tokens": 200, "ignore_eos": True}
    options["logit_bias"] = {str(tokens(token)[0]): 100, str(tokens(other)[0]): 50}
    with ThreadPoolExecutor(9) as pool:
        long = pool.submit(server.answer, "What is it?", **options)
        beside = list(pool.map(lambda i: server.ask(data_url(png(colour=(i, i, i))), "What?").status_code, range(8)))
        content = long.result()["choices"][0]["message"]["content"]
    assert beside == [200] * 8
    assert content == other * 200  # control: another special token, wanted half as much, is said


BAD = {
    "a picture that does not decode": ([data_url(b"hello")], {}, "cannot identify image file"),
    "half a picture": ([data_url(png((300, 300))[:200])], {}, "a picture of the request cannot be loaded"),
    "a 100-megapixel picture": ([data_url(png((10000, 10000), 0, "L"))], {}, "at most 64,000,000 are allowed"),
    "a local file": ([{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}], {}, "local files"),
    "a loopback address": (
        [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}],
        {},
        "127.0.0.1, which is not public",
    ),
    "a name of a private address": (
        [{"type": "image_url", "image_url": {"url": "http://localhost:1/a.png"}}],
        {},
        "which is not public",
    ),
    "a private network": (
        [{"type": "image_url", "image_url": {"url": "http://192.168.0.1/a.png"}}],
        {},
        "192.168.0.1, which is not public",
    ),
    "another scheme": ([{"type": "image_url", "image_url": {"url": "ftp://a.b/c.png"}}], {}, "HTTP, data or file"),
    "too many pictures": ([PICTURE] * 3, {}, "At most 2 image(s)"),
    "features instead of a picture": (
        [{"type": "image_embeds", "image_embeds": base64.b64encode(b"not a tensor").decode()}],
        {},
        "image_embeds",  # this kit's refusal; on vLLM 0.12 its own, which comes first
    ),
    "a video that does not decode": (
        [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGVsbG8="}}],
        {},
        "Could not open video stream",
    ),
    "a picture scaled beyond all measure": (
        [PICTURE],
        {"mm_processor_kwargs": {"min_pixels": 4_000_000_000, "max_pixels": 4_000_000_000}},
        "min_pixels is 4000000000; expected 1 to 12,845,056 pixels",
    ),
    "patches of another size": ([PICTURE], {"mm_processor_kwargs": {"patch_size": 28}}, "patch_size cannot be set"),
    "frames a patch": ([PICTURE], {"mm_processor_kwargs": {"temporal_patch_size": 1}}, "temporal_patch_size cannot be"),
    "patches that are not merged": ([PICTURE], {"mm_processor_kwargs": {"merge_size": 1}}, "merge_size cannot be set"),
    "a size behind another name": (
        [PICTURE],
        {"mm_processor_kwargs": {"images_kwargs": {"min_pixels": 4_000_000_000}}},
        "images_kwargs cannot be set",
    ),
    "a size that is a number": ([PICTURE], {"mm_processor_kwargs": {"size": 5}}, "size is 5; expected an object"),
    "a video in slow motion beyond all measure": (
        [CLIP],
        {"mm_processor_kwargs": {"fps": 1e-4}},
        "fps is 0.0001; expected 0.001 to 240 frames a second",
    ),
    "a video that runs backwards": ([CLIP], {"mm_processor_kwargs": {"fps": -2}}, "fps is -2; expected 0.001 to 240"),
    "a video of many hours": (
        [CLIP],
        {"mm_processor_kwargs": {"fps": 0.001}},
        "the videos last 8,000 seconds; at most 2,048 are allowed",
    ),
    "frame rates of other videos": (
        [CLIP],
        {"mm_processor_kwargs": {"fps": [2, 2]}},
        "2 value(s) for 1 video(s)",
    ),
    "a prompt that opens a picture and ends": (
        [],
        {
            "messages": [
                {"role": "user", "content": "Go on."},
                {"role": "assistant", "content": "I see <|vision_start|>"},
            ],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
        "no picture follows",
    ),
    "a budget and a grammar": (
        [],
        {"chat_template_kwargs": {"thinking_budget": 9}, "response_format": {"type": "json_object"}},
        "cannot be combined with guided decoding",
    ),
    "a budget and beams": (
        [],
        {"chat_template_kwargs": {"thinking_budget": 9}, "use_beam_search": True, "n": 2},
        "cannot be combined with use_beam_search",
    ),
    "a placeholder in the text": ([PICTURE, "<|image_pad|> and"], {}, "2 image placeholder(s) for 1 image(s)"),
    "a placeholder without a picture": (["<|video_pad|>"], {}, "1 video placeholder(s) for 0 video(s)"),
    "too long a prompt": (["word " * CONTEXT], {}, f"maximum context length is {CONTEXT} tokens"),
    "a negative budget": ([], {"chat_template_kwargs": {"thinking_budget": -1}}, "expected a whole number of tokens"),
    "a budget of text": ([], {"chat_template_kwargs": {"thinking_budget": "9"}}, "expected a whole number of tokens"),
    "a budget and two answers": (
        [],
        {"chat_template_kwargs": {"thinking_budget": 9}, "n": 2, "temperature": 1},
        "cannot be combined with n > 1",
    ),
}


@pytest.mark.parametrize(
    "prompt",
    ["x<|vision_start|>", "<|image_pad|> here", [[1, 2, 3], [-1]]],
    ids=["opened picture", "placeholder", "negative id"],
)
def test_bad_completions_are_answered_400_and_the_server_goes_on(server, prompt):
    response = server.complete(prompt)
    assert response.status_code == 400, response.text[:500]
    assert server.complete("x").status_code == 200
    assert server.ask(PICTURE, "What is it?").status_code == 200


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_answered_400_and_the_server_goes_on(server, case):
    content, options, message = BAD[case]
    assert message in server.refusal(*content, "What is it?", **options)
    assert server.ask("Are you there?").status_code == 200


@pytest.mark.parametrize("when", ["an answer", "a thought", "an answer after a budget"])
def test_a_client_that_leaves_is_forgotten_and_the_others_go_on(server, tokens, when):
    expected = server.answer(PICTURE, "What is it?")["choices"]
    options = {"stream": True, "max_tokens": 900, "ignore_eos": True}
    if when != "an answer":
        options |= {
            "logit_bias": {str(tokens("<think>")[0]): 100, str(tokens("a")[0]): 100},
            "temperature": 1,
            "seed": 3,
        }
        options["chat_template_kwargs"] = {"thinking_budget": 800 if when == "a thought" else 5}
    wanted = SENTENCE if when == "an answer after a budget" else '"delta"'
    with server.ask("Tell a long story.", **options) as stream:
        lines = map(bytes.decode, stream.iter_lines())  # kept: the client leaves when the iterator goes
        while wanted not in (line := next(lines)):
            pass
        request = json.loads(line.removeprefix("data: "))["id"] + ("-answer" if SENTENCE in wanted else "")
        server.wait_for_running(lambda number: number >= 1)
        assert f"Request {request} aborted" not in server.log.read_text()  # control: it is at work
    end = time.monotonic() + 30
    while f"Request {request} aborted" not in server.log.read_text():
        assert time.monotonic() < end, "the engine still works for a client that has left"
        time.sleep(0.1)
    assert server.answer(PICTURE, "What is it?")["choices"] == expected


def test_two_hundred_requests_at_once_are_all_answered(server):
    questions = [f"Number {i}?" for i in range(200)]

    def ask(i: int) -> tuple[int, str]:
        content = [PICTURE, questions[i]] if i % 2 else [questions[i]]
        response = server.ask(*content, max_tokens=8)
        return response.status_code, response.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(200) as pool:
        together = list(pool.map(ask, range(200)))
    assert [status for status, _ in together] == [200] * 200
    # Each answer belongs to its question. Not all are equal to the letter: sums are rounded in another order in another
    # batch, and random weights have words that are almost equally likely.
    sample = range(0, 200, 10)
    same = sum(together[i] == ask(i) for i in sample)
    assert same >= 16
    assert same > sum(together[i] == together[(i + 1) % 200] for i in sample)  # control: another question's answer


def test_chat_asks_the_server_and_the_checkpoint_alike(server, untied, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    places = ([str(untied.merged)], ["--endpoint", f"{server.url}/v1"])
    texts = [chat(*where, "--image", tmp_path / "a.png") for where in places]
    assert texts[0] == texts[1] != ""


def test_vlmevalkit_gets_the_same_answers_from_the_server_as_in_process(server, untied, tmp_path):
    if importlib.util.find_spec("vlmeval") is None:
        pytest.skip("VLMEvalKit is not installed")
    launch = Runs(copy_with_the_overlay(tmp_path / "site"), write_tables(tmp_path), untied.merged)
    greedy = ("--temperature", "0", "--max-new-tokens", "24")
    found = {}
    for backend, options in (("transformers", ()), ("endpoint", ("--endpoint", f"{server.url}/v1", "--nproc", "4"))):
        work = tmp_path / backend
        result = launch(work, *greedy, *options, name="FewChoices")
        assert result.returncode == 0, result.stdout[-3000:]
        recorded = json.loads((work / MODEL / f"{MODEL}_FewChoices_settings.json").read_text())
        assert recorded["backend"] == backend
        found[backend] = {line["key"]: (line["response"], line["tokens"]) for line in lines(work, "FewChoices")}
    assert len(found["endpoint"]) == 4
    assert len(set(found["endpoint"].values())) > 1, "answers that are all alike prove nothing"
    assert found["endpoint"] == found["transformers"]


def test_serving_something_else_is_refused(tmp_path, untied):
    for folder, config, message in (
        ("nothing", None, "is not a folder"),
        ("empty", "", "has no config.json"),
        ("qwen3", '{"model_type": "qwen3"}', "is not qwen2_5_vl_merge"),
    ):
        if config is not None:
            (tmp_path / folder).mkdir()
        if config:
            (tmp_path / folder / "config.json").write_text(config)
        result = subprocess.run(
            ["bash", "scripts/serve.sh", tmp_path / folder], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr


REDIRECT = """
import asyncio, http.server, threading
from qwen_merge.overlays.vllm import media

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302 if self.path == "/away" else 200)
        self.send_header("Location", f"http://127.0.0.2:{self.server.server_port}/inside")
        self.end_headers()
        if self.path != "/away":
            self.wfile.write(b"x" * 2000 if self.path == "/long" else b"a file")

server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
media.is_public = lambda address: address == "127.0.0.1"  # one loopback address plays the internet, the others stay
media.MAX_BYTES = 1000
connection = media._limited_connector_class()().connection

async def main():
    for path in ("/", "/away", "/long"):
        try:
            print(path, await connection.async_get_bytes(f"http://127.0.0.1:{server.server_port}{path}", timeout=9))
        except ValueError as error:
            print(path, str(error).replace(str(server.server_port), "PORT"))

asyncio.run(main())
"""


def test_a_redirect_to_a_private_address_is_not_followed():
    result = subprocess.run(
        [sys.executable, "-c", REDIRECT],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("/")]
    assert lines[0] == "/ b'a file'"  # control: the first address is fetched from
    assert lines[1].startswith("/away the media URL's host 127.0.0.2 has the address 127.0.0.2, which is not public")
    assert lines[2] == "/long the file at http://127.0.0.1:PORT/long has more than 1,000 bytes."
