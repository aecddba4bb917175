"""VLMEvalKit's own `run.py` with a tiny merged checkpoint: scores, resuming after a kill, both back ends, a server.

The tables are drawn here and the checkpoint is random, so nothing is downloaded. What a right answer is worth is proven
with answers written by hand, which a run takes up like those of an earlier run.

A checkout of VLMEvalKit's commit 21b00fa is tested too where one is at hand:
QWEN_MERGE_VLMEVALKIT_CHECKOUT=DIR pytest tests/integration/test_vlmevalkit.py
"""

import base64
import http.server
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clips import write_clip
from evaluations import COLOURS, LETTERS, MODEL, ROWS, TABLE, Runs, copy_with_the_overlay, lines, picture, write_tables
from qwen_merge.errors import UserError
from qwen_merge.evaluation.records import Records, Settings
from qwen_merge.overlays import engine, manifest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vlmeval") is None, reason="VLMEvalKit is not installed"),
]

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("lmu"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return copy_with_the_overlay(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def launch(site, data, untied) -> Runs:
    return Runs(site, data, untied.merged)


def predictions(work: Path, name: str = TABLE) -> list[str]:
    import pandas
    from openpyxl.utils.escape import unescape

    file = work / MODEL / f"{MODEL}_{name}.xlsx"
    return [unescape(text) for text in pandas.read_excel(file, dtype=str, keep_default_na=False)["prediction"]]


def accuracy(work: Path, name: str = TABLE) -> float:
    import pandas

    return float(pandas.read_csv(work / MODEL / f"{MODEL}_{name}_acc.csv")["Overall"][0])


@pytest.fixture(scope="module")
def uninterrupted(launch, tmp_path_factory) -> Path:
    """A sampled run, so that a resumed one proves that no answer depends on the ones before it."""
    work = tmp_path_factory.mktemp("whole") / "work"
    result = launch(work, "--max-new-tokens", "24")
    assert result.returncode == 0, result.stdout[-3000:]
    return work


def test_every_question_is_asked_once_and_recorded_whole(uninterrupted):
    asked = lines(uninterrupted)
    assert len(asked) == len({line["key"] for line in asked}) == ROWS
    assert all(1 <= line["tokens"] <= 24 and line["response"] for line in asked)
    assert [line["answer"] for line in asked] == predictions(uninterrupted)
    settings = json.loads((uninterrupted / MODEL / f"{MODEL}_{TABLE}_settings.json").read_text())
    assert settings["model_type"] == "qwen2_5_vl_merge"
    assert settings["backend"] == "transformers"
    assert settings["settings"]["temperature"] == 0.6
    assert settings["settings"]["max_pixels"] == 262144
    assert settings["judge"] == "exact_matching"
    assert settings["pins"]["transformers"] == "4.52.3"


def test_killed_and_resumed_gives_the_same_answers_and_asks_only_the_missing(launch, uninterrupted, tmp_path):
    work = tmp_path / "work"
    process = subprocess.Popen(
        launch.command(work, "--max-new-tokens", "24"),
        env=launch.environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 400
        while len(lines(work)) < 3:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = lines(work)
    assert 3 <= len(before) < ROWS
    result = launch(work, "--max-new-tokens", "24", "--reuse")
    assert result.returncode == 0, result.stdout[-3000:]
    after = lines(work)
    assert after[: len(before)] == before
    assert len(after) == ROWS, "a question was asked twice, or not at all"
    assert predictions(work) == predictions(uninterrupted)
    assert accuracy(work) == accuracy(uninterrupted)
    refused = launch(work, "--max-new-tokens", "24", "--reuse", "--seed", "1")  # the control: other answers
    assert refused.returncode == 2
    assert "settings: seed was 0, is 1" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert lines(work) == after


def answers_by_hand(source: Path, work: Path, answers: list[str]) -> None:
    """What a run that gave these answers leaves when it is killed before it writes a table."""
    folder = work / MODEL
    folder.mkdir(parents=True)
    shutil.copy(source / MODEL / f"{MODEL}_{TABLE}_settings.json", folder)
    changed = [{**line, "answer": answer} for line, answer in zip(lines(source), answers, strict=True)]
    text = "".join(json.dumps(line) + "\n" for line in changed)
    (folder / f"{MODEL}_{TABLE}_responses.jsonl").write_text(text)


def test_known_answers_have_the_known_score(launch, uninterrupted, tmp_path):
    wrong = {"A": "B", "B": "C", "C": "D", "D": "A"}
    long = "because of this and that, " * 2000  # 52,000 characters, then the answer
    nine_right = [
        *LETTERS[:6],
        *(f"{long}{letter}" for letter in LETTERS[6:8]),  # behind the cut that a spreadsheet would make
        COLOURS["ABCD".index(LETTERS[8])],  # the option's text instead of its letter
        wrong[LETTERS[9]],
        "",  # an unfinished thought
        "none of them",
    ]
    answers_by_hand(uninterrupted, tmp_path / "work", nine_right)
    result = launch(tmp_path / "work", "--max-new-tokens", "24", "--reuse")
    assert result.returncode == 0, result.stdout[-3000:]
    assert predictions(tmp_path / "work") == nine_right
    assert accuracy(tmp_path / "work") == 9 / 12
    # The control: one right answer less.
    answers_by_hand(uninterrupted, tmp_path / "control", [wrong[LETTERS[0]], *nine_right[1:]])
    launch(tmp_path / "control", "--max-new-tokens", "24", "--reuse")
    assert accuracy(tmp_path / "control") == 8 / 12


def test_both_back_ends_give_the_same_greedy_answers(launch, tmp_path):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    found = {}
    for backend, options in (("transformers", ()), ("vllm", ("--use-vllm",))):
        work = tmp_path / backend
        line = ("--temperature", "0", "--max-new-tokens", "24", *options)
        result = launch(work, *line, name="FewChoices", VLLM_CPU_KVCACHE_SPACE="1")
        assert result.returncode == 0, result.stdout[-3000:]
        found[backend] = [(line["key"], line["response"], line["tokens"]) for line in lines(work, "FewChoices")]
    assert len(found["vllm"]) == 4
    assert len({response for _, response, _ in found["vllm"]}) > 1, "answers that are all alike prove nothing"
    assert found["vllm"] == found["transformers"]


# --- what becomes of the tokens that a model in this process gives ---


@pytest.fixture(params=[False, True], ids=["transformers", "vllm"])
def in_process(request, monkeypatch, tmp_path, untied):
    """`QwenMergeChat` with the checkpoint's processor and a back end that gives what it is told to."""
    from qwen_merge.evaluation import models

    def back_end(name: str):
        class BackEnd:
            def __init__(self, *_):
                self.name = name

            def generate(self, prompt, seed):
                ask.prompts.append(prompt)
                if isinstance(ask.says, Exception):
                    raise ask.says
                return tuple(ask.tokenizer.encode(ask.says, add_special_tokens=False))

        return BackEnd

    monkeypatch.setattr(models, "Transformers", back_end("transformers"))
    monkeypatch.setattr(models, "Vllm", back_end("vllm"))

    def ask(says: str | Exception, settings: Settings | None = None) -> tuple[str, dict]:
        """(what is scored, what is recorded)"""
        records = Records(tmp_path, "M", reuse=False)
        model = models.QwenMergeChat(str(untied.merged), records=records, settings=settings, use_vllm=request.param)
        model._load()
        ask.tokenizer, ask.says = model.processor.tokenizer, says
        assert model.backend.name == ("vllm" if request.param else "transformers") == model.document["backend"]
        answer = model.generate([{"type": "text", "value": "What colour?"}], dataset="D")
        return answer, json.loads((tmp_path / "M/M_D_responses.jsonl").read_text().splitlines()[-1])

    ask.prompts = []
    return ask


@pytest.mark.parametrize(
    ("says", "answer", "closed"),
    [
        ("<think>\nblue or red\n</think>\n\nred", "red", True),
        ("<think>\nblue or red", "", False),
        ("<think>\n\\boxed{blue}?\n</think>\n\nIt is \\boxed{a {red} one}.", "a {red} one", True),
        ("<think>a</think>b<think>c", "", False),
        ("red", "red", None),
    ],
)
def test_thoughts_of_a_model_in_this_process(in_process, says, answer, closed):
    found, line = in_process(says)
    assert (found, line["answer"], line["closed"], line["response"]) == (answer, answer, closed, says)
    whole, thought = (
        len(in_process.tokenizer.encode(text, add_special_tokens=False))
        for text in (says, says.partition("</think>")[0] + "</think>")
    )
    assert (line["tokens"], line["thought_tokens"]) == (whole, thought if closed else None)
    (prompt,) = in_process.prompts
    assert "What colour?" in prompt.text


def test_boxes_and_thoughts_are_left_when_settings_say_so(in_process):
    """The control of the cutting: the box stays when it is not to be opened."""
    assert in_process("<think>a</think>\\boxed{red}", Settings(post_process=False))[0] == "\\boxed{red}"


def test_a_prompt_that_is_too_long_is_an_empty_answer_on_record(in_process):
    from qwen_merge.evaluation.backends import PromptTooLong

    with pytest.warns(UserWarning, match="a question of D is too long to be answered"):
        found, line = in_process(PromptTooLong("9 tokens, the limit is 8"))
    assert found == line["answer"] == line["response"] == ""
    assert (line["tokens"], line["closed"], line["error"]) == (0, None, "9 tokens, the limit is 8")
    with pytest.raises(ZeroDivisionError):  # control: other errors are not answers
        in_process(ZeroDivisionError())


def test_a_processor_that_makes_pictures_smaller_is_refused(in_process, untied, capsys):
    own = json.loads((untied.merged / "preprocessor_config.json").read_text())["max_pixels"]
    assert in_process("red", Settings(max_pixels=own))[0] == "red"  # control
    with pytest.raises(SystemExit) as stopped:
        in_process("red", Settings(max_pixels=own + 1))
    assert stopped.value.code == 2
    assert f"limits pictures to {own} pixels, the setting is {own + 1}" in capsys.readouterr().err


# --- the judge ---

FREE = "the second of the four, as far as one can tell"  # no letter and no option's text: only a judge sees B in it


@pytest.fixture
def judge_server():
    """Stands for a judge: B, whatever it is asked, under /v1/chat/completions alone."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.server.asked.append((self.path, self.headers["Authorization"]))
            known = self.path == "/v1/chat/completions"
            content = json.dumps({"choices": [{"message": {"content": "B"}}]} if known else {"error": "no such path"})
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked = []
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def judged(launch, uninterrupted, tmp_path):
    """Score eleven right answers and a free one, whose answer is B, with a judge; no model is loaded."""
    answers = [FREE if number == 1 else letter for number, letter in enumerate(LETTERS)]

    def run(**environment: str):
        work = tmp_path / "work"
        answers_by_hand(uninterrupted, work, answers)
        result = launch(work, "--max-new-tokens", "24", "--reuse", "--judge", "chatgpt-0125", **environment)
        settings = json.loads((work / MODEL / f"{MODEL}_{TABLE}_settings.json").read_text())
        return work, result, settings["judge"]

    return run


def test_a_judge_at_the_usual_address_judges(judged, judge_server):
    base = f"http://127.0.0.1:{judge_server.server_port}/v1"
    work, result, recorded = judged(OPENAI_API_KEY="sk-stub", OPENAI_API_BASE=base)
    assert result.returncode == 0, result.stdout[-3000:]
    assert recorded == "chatgpt-0125"
    assert set(judge_server.asked) == {("/v1/chat/completions", "Bearer sk-stub")}
    assert accuracy(work) == 1


def test_a_judge_that_does_not_answer_ends_the_run(judged, judge_server):
    base = f"http://127.0.0.1:{judge_server.server_port}/elsewhere"
    work, result, _ = judged(OPENAI_API_KEY="sk-stub", OPENAI_API_BASE=base)
    assert result.returncode == 2, result.stdout[-3000:]
    assert f"the judge chatgpt-0125 does not answer at {base}/chat/completions (status 404" in result.stdout
    assert "Traceback" not in result.stdout
    assert not list((work / MODEL).glob("*_acc.csv"))


def test_without_a_key_exact_matching_is_said_and_recorded(judged):
    work, result, recorded = judged(OPENAI_API_KEY="")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "OPENAI_API_KEY is not set: answers are matched exactly instead of judged by chatgpt-0125" in result.stdout
    assert recorded == "exact_matching"
    assert accuracy(work) == 11 / 12


# --- each kind of score, on answers by hand (in this process: VLMEvalKit's scoring needs no model) ---


@pytest.fixture
def scoring(monkeypatch, data):
    """VLMEvalKit's data sets as `run.py --judge exact_matching` leaves them; undone afterwards."""
    import pandas
    import xlsxwriter.worksheet

    from qwen_merge.evaluation import vlmevalkit

    monkeypatch.setenv("LMUData", str(data))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    from vlmeval.dataset import image_vqa

    for owner, name in (
        (xlsxwriter.worksheet.Worksheet, "__init__"),
        (xlsxwriter.Workbook, "__init__"),
        (pandas, "read_excel"),
        (image_vqa, "build_judge"),
        (image_vqa.MMVet, "evaluate"),
        (image_vqa.LogicVista, "evaluate"),
        (image_vqa.CustomVQADataset, "evaluate"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    vlmevalkit.keep_whole_answers()
    vlmevalkit.score_without_a_judge()
    vlmevalkit.score_local_tables()
    return image_vqa


def score_of(dataset_class, name: str, folder: Path, columns: dict[str, list]):
    import pandas
    from vlmeval.smp import dump

    folder.mkdir(parents=True, exist_ok=True)
    file = str(folder / f"M_{name}.xlsx")
    rows = len(columns["prediction"])
    dump(pandas.DataFrame({"index": range(rows), "question": ["?"] * rows, **columns}), file)
    dataset = dataset_class.__new__(dataset_class)  # its table would be downloaded
    dataset.dataset_name = name
    return dataset.evaluate(file, model="exact_matching", nproc=1)


def test_short_answers(scoring, tmp_path):
    columns = {"answer": ["12", "yes", "red"], "prediction": ["12.3", "no", "red"], "split": ["test"] * 3}
    score = score_of(scoring.ImageVQADataset, "ChartQA_TEST", tmp_path / "a", columns)  # 12.3 is within 5 %
    assert round(float(score["Overall"].iloc[0]), 2) == 66.67
    columns["prediction"][2] = "blue"
    score = score_of(scoring.ImageVQADataset, "ChartQA_TEST", tmp_path / "b", columns)
    assert round(float(score["Overall"].iloc[0]), 2) == 33.33


def test_short_answers_in_a_table_of_ones_own(scoring, tmp_path):
    columns = {
        "answer": ["407", '["a dog", "dog"]', "red", "[__import__('os').abort()]", "two"],
        "prediction": ["407", "The dog", "Red", "x", ""],
        "category": ["number", "word", "colour", "colour", "number"],
    }
    score = score_of(scoring.CustomVQADataset, "Mine_openended", tmp_path / "a", columns)
    assert score.iloc[0].to_dict() == {"Overall": 60.0, "colour": 50.0, "number": 50.0, "word": 100.0}
    assert (tmp_path / "a/M_Mine_openended_acc.csv").read_text().startswith('"Overall"')
    columns["prediction"] = ["470", "cat", "red or blue", "", "one"]
    score = score_of(scoring.CustomVQADataset, "Mine_openended", tmp_path / "b", columns)
    assert score["Overall"].iloc[0] == 0
    del columns["answer"]
    with pytest.raises(UserError, match="no column `answer`"):
        score_of(scoring.CustomVQADataset, "Mine_openended", tmp_path / "c", columns)


def test_text_in_pictures(scoring, tmp_path):
    columns = {
        "answer": ["['stop']", "['go']"],
        "prediction": ["It says STOP.", ""],
        "category": ["Scene Text-centric VQA"] * 2,
    }
    assert score_of(scoring.OCRBench, "OCRBench", tmp_path / "a", columns)["Final Score"] == 1
    columns["prediction"][0] = "It says go."
    assert score_of(scoring.OCRBench, "OCRBench", tmp_path / "b", columns)["Final Score"] == 0


def test_mathematics_without_a_judge(scoring, tmp_path):
    columns = {
        "answer": ["4", "B", "3"],
        "prediction": ["4", "(B)", "five"],
        "question_type": ["free_form", "multi_choice", "free_form"],
        "answer_type": ["integer", "text", "integer"],
        "choices": ["[]", "['1', '2', '3']", "[]"],
        "answer_option": ["", "B", ""],
        "task": ["t"] * 3,
        "skills": ["['arithmetic reasoning']"] * 3,
    }

    def overall(folder: str) -> float:
        score = score_of(scoring.MathVista, "MathVista_MINI", tmp_path / folder, columns)
        return float(score.loc[score["Task&Skill"] == "Overall", "acc"].iloc[0])

    right = overall("a")
    columns["prediction"][0] = "5"
    assert right - overall("b") == pytest.approx(100 / 3, abs=0.1)


@pytest.mark.parametrize("name", ["MMVet", "LogicVista"])
def test_what_only_a_judge_can_score_gets_no_number(scoring, tmp_path, name):
    from qwen_merge.errors import UserError

    with pytest.raises(UserError, match="has no score under exact matching"):
        score_of(getattr(scoring, name), name, tmp_path, {"answer": ["a"], "prediction": ["a"]})


# --- a served model ---


@pytest.fixture
def server():
    """An OpenAI-compatible server whose replies are taken from a list; keeps the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, status: int, body: dict) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.reply(200, {"data": [{"id": "tiny", "max_model_len": 4096}]})

        def do_POST(self):
            self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.reply(*self.server.replies.pop(0))

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.requests, found.replies = [], []
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def completion(**message) -> tuple[int, dict]:
    return 200, {"choices": [{"message": message}], "usage": {"completion_tokens": 5}}


def served(server, work: Path, **options):
    from qwen_merge.evaluation.served import QwenMergeAPI

    address = f"http://127.0.0.1:{server.server_port}/v1"
    return QwenMergeAPI(address, records=Records(work, "M", reuse=True), wait=0, retry=3, **options)


def test_a_served_model_is_asked_the_same_way(server, tmp_path):
    shown = tmp_path / "picture.png"
    shown.write_bytes(base64.b64decode(picture(0)))
    message = [{"type": "image", "value": str(shown)}, {"type": "text", "value": "What colour?"}]
    model = served(server, tmp_path)
    server.replies = [completion(content="<think>red or blue</think>It is \\boxed{red}.")]
    assert model.generate(message, dataset="D") == "red"
    (request,) = server.requests
    assert request["model"] == "tiny"
    assert request["mm_processor_kwargs"] == {"min_pixels": 1003520, "max_pixels": 12845056}
    assert {k: request[k] for k in ("temperature", "top_p", "top_k")} == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
    }
    sent = request["messages"][0]["content"]
    assert base64.b64decode(sent[0]["image_url"]["url"].split(",")[1]) == shown.read_bytes()
    assert sent[1] == {"type": "text", "text": "What colour?"}
    (line,) = [json.loads(text) for text in (tmp_path / "M/M_D_responses.jsonl").read_text().splitlines()]
    assert request["seed"] == Settings().seed_of(line["key"])
    assert (line["closed"], line["answer"], line["tokens"]) == (True, "red", 5)
    # Asked again, by another process say, nothing is sent.
    assert served(server, tmp_path).generate(message, dataset="D") == "red"
    assert len(server.requests) == 1


def test_a_served_model_is_told_how_fast_a_video_runs(server, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 64, 8)
    message = [{"type": "video", "value": str(clip)}, {"type": "text", "value": "What colour?"}]
    server.replies = [completion(content="red")]
    assert served(server, tmp_path).generate(message, dataset="D") == "red"
    (request,) = server.requests
    assert request["mm_processor_kwargs"] == {"min_pixels": 1003520, "max_pixels": 12845056, "fps": 4}
    assert base64.b64decode(request["messages"][0]["content"][0]["video_url"]["url"].split(",")[1]) == clip.read_bytes()


@pytest.mark.parametrize(
    ("message", "answer", "closed"),
    [
        ({"reasoning_content": "red or blue", "content": "red"}, "red", True),
        ({"reasoning_content": "red or", "content": None}, "", False),
        ({"content": "<think>red or"}, "", False),
        ({"content": "red"}, "red", None),
    ],
)
def test_thoughts_of_a_served_model(server, tmp_path, message, answer, closed):
    server.replies = [completion(**message)]
    assert served(server, tmp_path).generate([{"type": "text", "value": "?"}], dataset="D") == answer
    (line,) = [json.loads(text) for text in (tmp_path / "M/M_D_responses.jsonl").read_text().splitlines()]
    assert line["closed"] is closed
    assert len(server.requests) == 1, "an empty answer is an answer"


def test_a_server_that_fails_leaves_the_question_open(server, tmp_path):
    model = served(server, tmp_path)
    server.replies = [(500, {}), (500, {}), (500, {})]
    assert "Failed to obtain answer" in model.generate([{"type": "text", "value": "?"}], dataset="D")
    assert not (tmp_path / "M/M_D_responses.jsonl").exists()
    server.replies = [(500, {}), completion(content="B")]
    assert model.generate([{"type": "text", "value": "?"}], dataset="D") == "B"


def test_an_answer_that_does_not_fit_the_context_is_asked_for_shorter(server, tmp_path):
    said = "maximum context length is 4096 tokens. However, you requested 4195 tokens (100 in the messages, 4095 in the"
    server.replies = [(400, {"message": said}), completion(content="B")]
    assert served(server, tmp_path).generate([{"type": "text", "value": "?"}], dataset="D") == "B"
    assert [request["max_tokens"] for request in server.requests] == [4095, 3996]


# --- the overlay by its effects ---


@pytest.fixture(params=["installed", "checkout"])
def upstream(request, site, tmp_path) -> Path:
    """A folder with VLMEvalKit as it was shipped."""
    root = tmp_path / "root"
    if request.param == "installed":
        shutil.copytree(site, root, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        checkout = os.environ.get("QWEN_MERGE_VLMEVALKIT_CHECKOUT")
        if not checkout:
            pytest.skip("QWEN_MERGE_VLMEVALKIT_CHECKOUT is not set")
        shutil.copytree(checkout, root, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    engine.revert(manifest.load("vlmevalkit"), root / "vlmeval")
    return root


def test_the_overlay_is_applied_verified_and_reverted_to_the_byte(upstream):
    def overlay(action: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "qwen_merge.cli", "overlay", action, "vlmevalkit", "--root", str(upstream)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )

    def contents() -> dict[str, bytes]:
        files = (path for path in upstream.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {str(path.relative_to(upstream)): path.read_bytes() for path in files}

    original = contents()
    assert overlay("verify").returncode == 1  # the control: nothing is applied
    assert overlay("apply").returncode == 0
    assert contents() != original
    verified = overlay("verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr[-2000:]
    assert verified.stdout.count("  ok  ") == 3
    assert overlay("revert").returncode == 0
    assert contents() == original
