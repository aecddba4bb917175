"""The two distilled sets from their sources to the end, as commands: killed, resumed, with servers that misbehave, and
with a real vLLM server as teacher and judge.
"""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import requests
from PIL import Image
from transformers import AutoTokenizer

from endpoint import Endpoint, digest, text_of
from qwen_merge.data import check_recipe
from qwen_merge.data.check import Check, check
from qwen_merge.data.image_thinking.samples import draw, read_samples
from qwen_merge.data.schema import Record
from qwen_merge.data.shards import ShardWriter
from qwen_merge.data.teacher.texts import share_of
from record_sets import settings
from serving import Server
from training import REPOSITORY
from worker_processes import family, kill_one, until

pytestmark = pytest.mark.slow

SCRIPTS = REPOSITORY / "src/data_process/stage3"
REQUESTS = {"请回答图片中的问题。", "Answer the question in the picture."}


def start(*arguments, script: str | None = None, **options) -> subprocess.Popen:
    command = [str(SCRIPTS / script)] if script else ["-m", "qwen_merge.cli", "data"]
    return subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run(*arguments, script: str | None = None, code: int = 0) -> str:
    process = start(*arguments, script=script)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said[-4000:]
    return said


def kill_when(process: subprocess.Popen, path: Path, lines: int) -> None:
    """SIGKILL once the file has that many lines, and not all of them."""
    end = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def files_of(output: Path, name: str) -> dict[str, bytes]:
    """A set's bytes: its shards and its manifest."""
    paths = [*(output / name).iterdir(), output / f"{name}.manifest.json"]
    return {path.name: path.read_bytes() for path in paths}


def check_for_llamafactory(rows: list[dict]) -> None:
    """What LLaMA-Factory checks before it trains: "number of images does not match the number of <image> tokens"."""
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert sum(message["content"].count("<image>") for message in row["messages"]) == len(row["images"])


def llamafactorys(output: Path, name: str, model: Path, cache: Path) -> tuple[list[list[int]], Check]:
    """The set's token ids as LLaMA-Factory's training gets them, and what `data check` says of the set."""
    from llamafactory.data import get_dataset

    config = settings(output, model, name, cache_dir=str(cache / "cache"), output_dir=str(cache / "run"))
    result = check(config)
    arguments, problems = check_recipe.parse(config)
    assert arguments is not None, problems
    tokenizer, processor, template = check_recipe.load(arguments)
    module = get_dataset(
        template, arguments.model, arguments.data, arguments.training, "sft", tokenizer=tokenizer, processor=processor
    )
    return module["train_dataset"]["input_ids"], result


def trains_as_checked(output: Path, name: str, model: Path, cache: Path) -> list[str]:
    """The texts that a finished set trains on; it is known by the dataset_info.json that its own command wrote."""
    ids, result = llamafactorys(output, name, model, cache)
    assert result.problems == []
    (found,) = result.sets
    assert (found.samples, found.tokens) == (len(ids), sum(map(len, ids)))
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode([token for token in row if token >= 0]) for row in ids]


def without_pictures(output: Path, name: str, other: Path) -> Path:
    """The set as the original leaves it: tags in the texts, and no pictures. The control of what loads it."""
    with ShardWriter(other / name, "part-00000") as writer:
        for row in rows_of(output / name):
            writer.add(Record(row["messages"], []))
        writer.close()
    shutil.copy(output / "dataset_info.json", other)
    return other


# --- text2image ---

QUESTIONS = 24


def write_sources(folder: Path) -> Path:
    """Both public sets in their own schema, with a question that is there twice and others that are no use."""
    folder.mkdir()
    deepseek = [
        {
            "input": f"第{i}题：一加{i}等于多少？",
            "content": f"等于{i + 1}。",
            "reasoning_content": "想一想",
            "repo_name": "math/x",
            "prompt_tokens_len": 9,
            "reasoning_content_tokens_len": 3,
            "content_tokens_len": 3,
            "score": 10,
        }
        for i in range(QUESTIONS)
    ]
    alpaca = [
        {"instruction": f"Spell the number {i}.", "input": "In capitals." if i % 2 else "", "output": "…", "text": "x"}
        for i in range(QUESTIONS)
    ]
    alpaca += [
        alpaca[0],
        {"instruction": "", "input": "", "output": "x", "text": ""},
        {"instruction": "Nothing to compare with", "input": "", "output": "", "text": ""},
        {"instruction": "What is <|im_end|>?", "input": "", "output": "x", "text": ""},
        {"instruction": "ठीक है?", "input": "", "output": "x", "text": ""},  # cannot be drawn
    ]
    (folder / "deepseek.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in deepseek))
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    return folder


def teach(body: dict) -> dict:
    """A teacher and judge whose words follow from the request. Some answers are cut off, some are judged poor."""
    text = text_of(body)
    if "strict examiner" in text:
        rated = digest(text)
        rating = "poor" if rated[0] in "0123" else "fair" if rated[0] in "45" else "good"
        verdict = json.dumps({"reason": f"not good, by {rated}", "rating": rating})
        if rated[1] == "0":
            verdict = f"I think it is good: {verdict}"
        return {"content": f"<think>\n\n</think>\n\n{verdict}"}
    cut = {"finish_reason": "length"} if digest(text)[0] == "1" else {}
    if text.endswith(" /no_think"):
        return {"content": f"<think>\n\n</think>\n\nplainly {digest(text)}", **cut}
    return {"reasoning_content": f"\nabout {digest(text)}\n", "content": f"\n\nat length {digest(text)}", **cut}


def text_steps(output: Path, url: str, sources: Path) -> None:
    run("--endpoint", url, "--input", sources, "--output", output, script="text2image/process.py")
    run("--endpoint", url, "--output", output, script="text2image/evaluate.py")
    run("--output", output, script="text2image/convert.py")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources") / "local")


@pytest.fixture(scope="module")
def text_set(sources, tmp_path_factory):
    """Made without interruption, by the reproduction's scripts."""
    output = tmp_path_factory.mktemp("text") / "data"
    with Endpoint(teach) as server:
        text_steps(output, server.url, sources)
        return output, server.bodies


def test_the_text2image_set_holds_each_judged_answer_once(text_set):
    output, bodies = text_set
    rows = rows_of(output / "text2image")
    manifest = json.loads((output / "text2image.manifest.json").read_text())
    answers = lines_of(output / "text2image.answers/answers.jsonl")
    verdicts = {line["id"]: line for line in lines_of(output / "text2image.answers/verdicts.jsonl")}
    check_for_llamafactory(rows)

    # The set is exactly what the teacher's answers and the judge's words ask for, worked out here from both.
    expected, drops = [], Counter()
    for line in sorted(answers, key=lambda line: line["id"]):
        if line["finish_reason"] == "length":
            drops["answer cut off by length"] += 1
            continue
        verdict = verdicts[line["id"]]["verdict"]
        if verdict is None:
            drops["verdict unreadable"] += 1
        elif verdict["rating"] == "poor":
            drops["judged poor"] += 1
        else:
            asked = line["question"] + (" /no_think" if line["mode"] == "plain" else "")
            said = f"plainly {digest(asked)}"
            if line["mode"] == "thinking":
                said = f"<think>\nabout {digest(asked)}\n</think>\n\nat length {digest(asked)}"
            expected.append((line["mode"], line["question"], said))
    assert [row["messages"][1]["content"] for row in rows] == [said for _, _, said in expected]
    assert all(drops.values())
    assert len(drops) == 3
    assert len(rows) > 20

    found = {reason: entry["rows"] for reason, entry in manifest["drops"].items()}
    assert found == {
        **drops,
        "question asked before": 1,
        "no question": 1,
        "no reference answer to judge by": 1,
        "media tag or control token in the question": 1,
    }
    assert manifest["rows_in"] == manifest["rows_out"] + sum(found.values()) == len(answers) + 4
    assert manifest["rows_out"] == len(rows)
    assert manifest["extra"]["questions"] == 2 * QUESTIONS + 1

    # The user's turn: fixed, in the question's language, with the switch of the answers that were asked for with it.
    for row, (mode, question, _) in zip(rows, expected, strict=True):
        user = row["messages"][0]["content"]
        assert user.endswith(" /no_think") == (mode == "plain")
        if "ठ" in question:
            assert (row["images"], user.removesuffix(" /no_think")) == ([], question)
        else:
            request = user.removeprefix("<image>\n").removesuffix(" /no_think")
            assert request in REQUESTS
            assert ("请" in request) == ("题" in question)
    assert sum(not row["images"] for row in rows) == sum(
        entry["rows"] for entry in manifest["extra"]["left as text"].values()
    )

    # What was sent: both modes as the recipe says, and a judge's switch that is a slash and letters.
    sent = [body for body in bodies if "strict examiner" not in text_of(body)]
    assert {(body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) for body in sent} == {
        (0.6, 0.95, 20, 8000),
        (0.7, 0.8, 20, 8000),
    }
    assert all((body["temperature"] == 0.7) == text_of(body).endswith(" /no_think") for body in sent)
    judged = [text_of(body) for body in bodies if "strict examiner" in text_of(body)]
    assert judged
    assert all(text.endswith("} /no_think") and "\no_think" not in text for text in judged)
    # The judge is shown the answer, never the thought, with the reference of the same question.
    for line in answers:
        answer = line["text"].split("</think>")[-1].strip()
        about = [text for text in judged if f"<answer>\n{answer}\n</answer>" in text]
        assert bool(about) == (line["finish_reason"] == "stop")
        for text in about:
            assert f"<question>\n{line['question']}\n</question>" in text
            assert f"<reference>\n{line['reference']}\n</reference>" in text


def test_llamafactory_loads_the_text2image_set_as_data_check_says(text_set, tied, tmp_path):
    output, _ = text_set
    assert list(json.loads((output / "dataset_info.json").read_text())) == ["text2image"]
    texts = trains_as_checked(output, "text2image", tied.merged, tmp_path)
    rows = rows_of(output / "text2image")
    assert len(texts) == len(rows)
    for text, row in zip(texts, rows, strict=True):
        assert row["messages"][1]["content"] in text
        assert ("<|image_pad|>" in text) == bool(row["images"])
    other = without_pictures(output, "text2image", tmp_path / "other")
    with pytest.raises(ValueError, match=r"number of images does not match the number of <image> tokens"):
        llamafactorys(other, "text2image", tied.merged, tmp_path)


def shown_twice(shown: list[tuple[str, bytes]]) -> list[set[str]]:
    """Questions that share a picture with another question."""
    questions: dict[bytes, set[str]] = {}
    for question, data in shown:
        questions.setdefault(data, set()).add(question)
    return [together for together in questions.values() if len(together) > 1]


def test_every_question_is_its_own_picture(text_set):
    """The original drew one sample sentence for every question."""
    output, _ = text_set
    answers = lines_of(output / "text2image.answers/answers.jsonl")
    asked = {line["text"].split("</think>")[-1].strip(): line["question"] for line in answers}
    shown = []
    for row in rows_of(output / "text2image"):
        if row["images"]:
            said = row["messages"][1]["content"].split("</think>")[-1].strip()
            shown.append((asked[said], row["images"][0]["bytes"]))
    assert len(shown) > 20
    assert shown_twice(shown) == []
    assert len(dict(shown)) == len(set(shown))  # with and without thinking, a question has one picture
    constant = [(question, shown[0][1]) for question, _ in shown]
    assert shown_twice(constant) == [{question for question, _ in shown}]  # control
    for _, data in shown:
        assert len(Image.open(io.BytesIO(data)).convert("RGB").getcolors(1 << 20)) > 2  # ink on paper


def test_modes_are_drawn_by_the_questions_hash(text_set):
    output, _ = text_set
    answers = lines_of(output / "text2image.answers/answers.jsonl")
    plain = {line["id"].removesuffix("-plain") for line in answers if line["mode"] == "plain"}
    thinking = {line["id"].removesuffix("-thinking") for line in answers if line["mode"] == "thinking"}
    assert plain == {key for key in thinking if share_of(0, f"plain {key}") < 0.5}
    assert 0.25 < len(plain) / len(thinking) < 0.75


def test_a_killed_and_resumed_text2image_is_the_same_set(text_set, sources, tmp_path):
    whole, _ = text_set
    folder = tmp_path / "text2image.answers"
    with Endpoint(teach, delay=0.05) as server:
        asking = ("text2image", "ask", "--endpoint", server.url, "--in-flight", 4, "--output", tmp_path)
        process = start(*asking, "--input", sources)
        kill_when(process, folder / "answers.jsonl", 9)
        there = len(lines_of(folder / "answers.jsonl"))
        total = len(lines_of(whole / "text2image.answers/answers.jsonl"))
        assert 9 <= there < total
        # Judging half of the answers would make another set: refused.
        said = run("text2image", "judge", "--endpoint", server.url, "--output", tmp_path, code=2)
        assert "`qwen-merge data text2image ask` is not finished" in said
        # Other options are refused too, and named.
        said = run(*asking, "--input", sources, "--seed", 1, "--max-tokens", 100, code=2)
        assert "--max-tokens: 8000 before, 100 now" in said
        assert "--seed: 0 before, 1 now" in said
        said = run(*asking, "--input", sources, "--resume")
        assert f"{total - there} answered, {there} were there" in said
        assert sum(server.asked.values()) <= total + 4  # only what was under way was asked twice
        assert "finished already" in run(*asking, "--input", sources)

        judging = ("text2image", "judge", "--endpoint", server.url, "--in-flight", 2, "--output", tmp_path)
        process = start(*judging)
        kill_when(process, folder / "verdicts.jsonl", 7)
        run(*judging)
    key = lambda line: line["id"]  # noqa: E731
    for name in ("answers.jsonl", "verdicts.jsonl"):
        lines = lines_of(folder / name)
        assert len({line["id"] for line in lines}) == len(lines)
        assert sorted(lines, key=key) == sorted(lines_of(whole / "text2image.answers" / name), key=key)
    run("text2image", "convert", "--output", tmp_path)
    assert files_of(tmp_path, "text2image") == files_of(whole, "text2image")
    assert "finished already" in run("text2image", "convert", "--output", tmp_path)


CONVERT = """
import sys
from pathlib import Path
from qwen_merge.data.text2image.convert import ConvertOptions, convert
if __name__ == "__main__":
    options = ConvertOptions(Path(sys.argv[1]), unit_rows=UNIT)
    convert(options, sys.argv[2], int(sys.argv[3]), resume="--resume" in sys.argv)
"""
UNIT = 4  # rows


@pytest.fixture
def render(text_set, tmp_path):
    """Starts drawing the answers of `text_set` in units of few rows, in a session of its own, killed afterwards."""
    whole, _ = text_set
    script = tmp_path / "convert.py"
    script.write_text(CONVERT.replace("UNIT", str(UNIT)))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    started: list[subprocess.Popen] = []

    def start(output: Path, engine: str, *options: str) -> subprocess.Popen:
        if not output.exists():
            output.mkdir()
            (output / "text2image.answers").symlink_to(whole / "text2image.answers")
        process = subprocess.Popen(
            [sys.executable, script, output, engine, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for member in family(process.pid):
            member.kill()
        process.kill()
        process.wait()
        process.stdout.close()


def test_rendering_killed_anywhere_and_by_any_engine_gives_the_same_files(text_set, render, tmp_path):
    whole, _ = text_set
    journal = ".text2image.working/journal.jsonl"

    def units(output: Path) -> int:
        return (output / journal).read_bytes().count(b"\n") if (output / journal).exists() else 0

    assert render(tmp_path / "one", "processes", "1").wait(300) == 0
    expected = files_of(tmp_path / "one", "text2image")
    rows = rows_of(tmp_path / "one" / "text2image")
    assert rows == rows_of(whole / "text2image")
    every = -(-len(rows) // UNIT)
    assert len(expected) == every + 1 > 6  # a shard a unit, and the manifest

    killed = tmp_path / "killed"
    kill_when(render(killed, "processes", "1"), killed / journal, 2)
    assert not (killed / "text2image").exists()  # a half-done set is never taken for one
    assert render(killed, "processes", "1", "--resume").wait(300) == 0
    assert files_of(killed, "text2image") == expected

    for engine, lost in (("processes", "its unit is done again"), ("ray", "A worker died or was killed")):
        output = tmp_path / engine
        process = render(output, engine, "2")
        until(lambda output=output: units(output) >= 1, 180, "a unit was done", process)
        kill_one(process, engine)
        assert units(output) < every
        said = process.communicate(timeout=240)[0]
        assert process.returncode == 0, said
        assert lost in said  # without this the kill may have come too late to matter
        assert files_of(output, "text2image") == expected


def test_servers_that_misbehave_give_the_same_set(text_set, sources, tmp_path):
    whole, _ = text_set
    with Endpoint(teach, delay=0.02) as flaky, Endpoint(teach, delay=0.02) as steady:
        # 429 last: it asks to be left alone for a while, in which the other server would answer all that is left.
        faults = ["500", "half", "json", "torn", "text", "abort", "503", "429"]
        flaky.plan = [plan for fault in faults for plan in (fault, None)]  # three in a row, and it would be taken out
        dead = Endpoint()
        servers = [argument for server in (flaky, dead, steady) for argument in ("--endpoint", server.url)]
        said = run("text2image", "ask", *servers, "--input", sources, "--output", tmp_path, "--in-flight", "2")
        assert f"{dead.url} is left out until it answers" in said
        assert not flaky.plan
        run("text2image", "judge", *servers, "--output", tmp_path)
    run("text2image", "convert", "--output", tmp_path)
    assert files_of(tmp_path, "text2image") == files_of(whole, "text2image")


def test_unanswered_requests_stop_the_next_step_until_they_are_accepted(sources, tmp_path):
    def answer(body):
        if "Spell the number 3." in text_of(body) and "examiner" not in text_of(body):
            raise OSError("the connection ends")
        return teach(body)

    with Endpoint(answer) as server:
        asking = ("text2image", "ask", "--endpoint", server.url, "--input", sources / "alpaca.json")
        options = ("--output", tmp_path, "--attempts", 1)
        judging = ("text2image", "judge", "--endpoint", server.url, "--output", tmp_path)
        assert "run the same command again" in run(*asking, *options, code=1)
        said = run(*judging, code=2)
        assert "have no answer" in said
        assert "--accept-missing" in said
        run(*judging, "--accept-missing")
        run("text2image", "convert", "--output", tmp_path, "--accept-missing")
        manifest = json.loads((tmp_path / "text2image.manifest.json").read_text())
        missing = manifest["drops"]["no answer from the teacher"]["rows"]
        assert missing in (1, 2)
        assert manifest["rows_in"] == manifest["rows_out"] + sum(x["rows"] for x in manifest["drops"].values())
        server.answer = teach  # mended: the missing ones only are asked, judged, and the set is another
        before = sum(server.asked.values())
        assert f"{missing} answered" in run(*asking, *options)
        assert sum(server.asked.values()) == before + missing
        run(*judging)
        assert "made with other options" in run("text2image", "convert", "--output", tmp_path, code=2)
        run("text2image", "convert", "--output", tmp_path, "--overwrite")
    manifest = json.loads((tmp_path / "text2image.manifest.json").read_text())
    assert "no answer from the teacher" not in manifest["drops"]


# --- image_thinking ---

SETS = {"chartqa_cauldron_llava_format": 30, "geo3k": 12}


def picture(number: int) -> bytes:
    """A JPEG that no other number has; what re-encodes it changes its bytes."""
    image = Image.new("RGB", (40, 40), (number * 5 % 256, number * 11 % 256, 90))
    for i in range(40):
        image.putpixel((i, (i * number) % 40), (255, 255, 255))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=83, comment=f"picture {number}".encode())
    return file.getvalue()


def write_converted(folder: Path) -> Path:
    number = 0
    for name, rows in SETS.items():
        with ShardWriter(folder / name, "part-00000", max_bytes=6000) as writer:
            for i in range(rows):
                turns = [f"<image>\nHow many dots has figure {number}?", str(number)]
                if i % 3 == 0:
                    turns += ["And its colour?", "White"]
                messages = [{"role": ("user", "assistant")[k % 2], "content": turn} for k, turn in enumerate(turns)]
                writer.add(Record(messages, [picture(number)]))
                number += 1
            assert len(writer.close()) > 1
    return folder


def number_in(text: str) -> int:
    return int(text.split("figure ")[1].split("?", maxsplit=1)[0])


LONG = "I look at the figure and count its dots one after the other, which gives"


def see(body: dict) -> dict:
    """A reasoning VLM: its words follow from the question's number, and so does what is wrong with them."""
    text = text_of(body)
    assert body["messages"][0]["content"][0]["type"] == "image_url"  # teacher and judge see the picture
    n = number_in(text)
    if "strict examiner" in text:
        verdict = {"reason": "not good", "final_answer_correct": n % 13 != 9, "guesswork": n % 13 == 10}
        verdict |= {"contradiction": n % 13 == 11, "rating": "fair" if n % 13 == 12 else "good"}
        return {"content": f"<think>hm</think><answer>{json.dumps(verdict)}</answer>"}
    answers = {
        0: f"<think>{LONG} {n}.</think>{n}",  # no <answer>
        1: f"<think>{LONG} {n}.</think><answer>The answer is {n + 5000}.</answer>",  # wrong
        2: f"<think>{'Let me count again. ' * 40}</think><answer>{n}</answer>",
        3: f"<think>Easy.</think><answer>{n}</answer>",
        4: f"<think>{LONG} 再数一遍图中的点一共有几个点.</think><answer>{n}</answer>",
        5: f"<think>{LONG} no more. So the answer is {n + 900}.</think><answer>{n}</answer>",
    }
    boxed = f"<think>{LONG} {n}.</think><answer>It has <|begin_of_box|>{n}<|end_of_box|> dots.</answer>"
    return {"content": answers.get(n % 13, boxed), **({"finish_reason": "length"} if n % 13 == 6 else {})}


def image_steps(output: Path, url: str, converted: Path, *options) -> None:
    run("--endpoint", url, "--input", converted, "--output", output, *options, script="image/process.py")
    run("--endpoint", url, "--output", output, script="image/evaluate.py")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return write_converted(tmp_path_factory.mktemp("converted") / "llavaonevision_converted")


@pytest.fixture(scope="module")
def image_set(converted, tmp_path_factory):
    output = tmp_path_factory.mktemp("image") / "data"
    with Endpoint(see) as server:
        image_steps(output, server.url, converted)
        return output, server.bodies


def test_the_image_thinking_set_keeps_good_answers_with_their_own_pictures(image_set):
    output, bodies = image_set
    rows = rows_of(output / "image_thinking")
    manifest = json.loads((output / "image_thinking.manifest.json").read_text())
    check_for_llamafactory(rows)
    with pytest.raises(AssertionError):  # control: the original leaves the pictures out
        check_for_llamafactory([{**row, "images": []} for row in rows])
    total = sum(SETS.values())
    # 7 and 8 of 13 have nothing wrong with them: not more, not others, each with the bytes of its own picture.
    good = [n for n in range(total) if n % 13 in (7, 8)]
    assert [number_in(row["messages"][0]["content"]) for row in rows] == good
    for n, row in zip(good, rows, strict=True):
        assert row["messages"][0]["content"] == f"<image>\nHow many dots has figure {n}?"
        assert row["messages"][1]["content"] == f"<think>\n{LONG} {n}.\n</think>\n\nIt has {n} dots."
        assert [image["bytes"] for image in row["images"]] == [picture(n)]

    each = Counter(n % 13 for n in range(total))
    assert {reason: entry["rows"] for reason, entry in manifest["drops"].items()} == {
        "answer without <answer>": each[0],
        "wrong final answer": each[1] + each[9],
        "heavy repetition": each[2],
        "guesswork without reasoning": each[3] + each[10],
        "language mixing": each[4],
        "thought and summary contradict": each[5] + each[11],
        "answer cut off by length": each[6],
        "judged fair": each[12],
    }
    assert manifest["extra"]["filters"] == {
        "wrong final answer": each[1] + each[9],
        "heavy repetition": each[2],
        "guesswork without reasoning": each[3] + each[10],
        "thought and summary contradict": each[5] + each[11],
        "language mixing": each[4],
    }
    assert (manifest["rows_in"], manifest["rows_out"]) == (total, len(good))
    assert manifest["extra"]["sets"]["geo3k"]["several_turns"] == 4
    assert manifest["extra"]["sets"]["geo3k"]["drawn"] == 12

    # Teacher and judge were shown the picture of the question they were asked about, and only what rules let pass
    # was judged.
    judged = []
    for body in bodies:
        picture_part, text_part = body["messages"][0]["content"]
        url = picture_part["image_url"]["url"]
        n = number_in(text_part["text"])
        assert url == f"data:image/jpeg;base64,{base64.b64encode(picture(n)).decode()}"
        if "strict examiner" in text_part["text"]:
            judged.append(n)
            assert f"<reference>\n{n}\n</reference>" in text_part["text"]
            assert f"<thought>\n{LONG} {n}.\n</thought>" in text_part["text"]
        else:
            assert "temperature" not in body  # the server's own
    assert sorted(judged) == [n for n in range(total) if n % 13 >= 7]


def test_llamafactory_loads_the_image_thinking_set_as_data_check_says(image_set, tied, tmp_path):
    output, _ = image_set
    texts = trains_as_checked(output, "image_thinking", tied.merged, tmp_path)
    rows = rows_of(output / "image_thinking")
    assert [number_in(text) for text in texts] == [number_in(row["messages"][0]["content"]) for row in rows]
    assert all("<|image_pad|>" in text and f"<think>\n{LONG}" in text for text in texts)
    other = without_pictures(output, "image_thinking", tmp_path / "other")
    config = settings(other, tied.merged, "image_thinking", cache_dir=str(tmp_path / "cache"))
    (problem,) = check(config).problems
    assert f"training stops at {len(rows)} rows: <image> tags and pictures differ in number" in problem


def test_a_killed_and_resumed_image_thinking_is_the_same_set(image_set, converted, tmp_path):
    whole, _ = image_set
    folder = tmp_path / "image_thinking.answers"
    with Endpoint(see, delay=0.05) as server:
        asking = ("image-thinking", "ask", "--endpoint", server.url, "--in-flight", 3, "--output", tmp_path)
        process = start(*asking, "--input", converted)
        kill_when(process, folder / "answers.jsonl", 8)
        assert "--rows: 1000 before, 5 now" in run(*asking, "--input", converted, "--samples", 5, code=2)
        run(*asking, "--input", converted)
        judging = ("image-thinking", "judge", "--endpoint", server.url, "--in-flight", 1, "--output", tmp_path)
        process = start(*judging)
        kill_when(process, folder / "verdicts.jsonl", 5)
        assert not (tmp_path / "image_thinking").exists()
        run(*judging)
        assert (
            sum(server.asked.values())
            <= sum(len(lines_of(folder / f"{name}.jsonl")) for name in ("answers", "verdicts")) + 4
        )
    assert files_of(tmp_path, "image_thinking") == files_of(whole, "image_thinking")


def test_verdicts_in_another_order_keep_the_same_answers(image_set, converted, tmp_path):
    """The original zips verdicts in completion order with inputs in input order: of 10 good ones it kept 5."""
    whole, _ = image_set

    def late_first(body):
        if "strict examiner" in text_of(body):
            time.sleep(1.5 - 0.03 * number_in(text_of(body)))
        return see(body)

    with Endpoint(late_first) as server:
        image_steps(tmp_path, server.url, converted)
    came = [line["id"] for line in lines_of(tmp_path / "image_thinking.answers/verdicts.jsonl")]
    sent = [line["id"] for line in lines_of(whole / "image_thinking.answers/verdicts.jsonl")]
    assert sorted(came) == sorted(sent)
    assert came != sorted(came, key=lambda key: (key.split("/")[0], int(key.split("/")[1])))  # control
    assert files_of(tmp_path, "image_thinking") == files_of(whole, "image_thinking")


def test_samples_are_uniform_seeded_and_whatever_the_shards(converted, tmp_path):
    name = "chartqa_cauldron_llava_format"
    chosen = {}
    for seed in range(40):
        line = draw(name, converted / name, 10, seed, tmp_path / f"{seed}.parquet")
        assert (line["seen"], line["eligible"], line["counts"]["rows_out"]) == (30, 30, 10)
        chosen[seed] = [sample.id for sample in read_samples(tmp_path / f"{seed}.parquet")]
        assert all(
            sample.picture == picture(number_in(sample.question))
            for sample in read_samples(tmp_path / f"{seed}.parquet")
        )
    assert len({tuple(ids) for ids in chosen.values()}) == 40
    often = Counter(key for ids in chosen.values() for key in ids)
    assert len(often) == 30  # every row has a chance: control, the first ten would be ten
    assert max(often.values()) < 25
    # Fewer and larger shards, same rows: same sample.
    with ShardWriter(tmp_path / name, "other") as writer:
        for row in rows_of(converted / name):
            writer.add(Record(row["messages"], [image["bytes"] for image in row["images"]]))
        assert len(writer.close()) == 1
    draw(name, tmp_path / name, 10, 0, tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "0.parquet").read_bytes()


def test_evaluation_items_are_not_asked(converted, tmp_path):
    tsv = tmp_path / "Bench.tsv"
    image = base64.b64encode(picture(2)).decode()
    tsv.write_text(f"index\tquestion\tanswer\timage\n1\tWhat is it?\tx\t{image}\n")
    with Endpoint(see) as server:
        asking = ("image-thinking", "ask", "--endpoint", server.url, "--input", converted, "--sets", "geo3k")
        run(*asking, "--output", tmp_path / "all")
        everything = len(server.bodies)
        asking = (*asking[:-1], "chartqa_cauldron_llava_format", "--decontaminate", tsv)
        run(*asking, "--output", tmp_path / "clean")
        asked = [number_in(text_of(body)) for body in server.bodies[everything:]]
        run("image-thinking", "judge", "--endpoint", server.url, "--output", tmp_path / "clean")
    assert everything == SETS["geo3k"]  # control: without evaluation sets all are asked
    assert 2 not in asked
    manifest = json.loads((tmp_path / "clean/image_thinking.manifest.json").read_text())
    dropped = manifest["drops"]["near-copy of an evaluation item"]
    assert dropped["rows"] == manifest["extra"]["filters"]["near-copy of an evaluation item"] == 30 - len(asked)
    assert any("Bench" in example for example in dropped["examples"])


# --- a real server ---


@pytest.fixture(scope="module")
def vllm(untied, tmp_path_factory):
    """vLLM on the tiny checkpoint, thoughts left in the text: its words are noise, so grammars give them a form."""
    options = ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "4096", "--host", "127.0.0.1"]
    command = [Path(sys.executable).parent / "vllm", "serve", untied.merged, *options]
    running = Server(command, tmp_path_factory.mktemp("vllm"))
    try:
        running.wait()
        yield f"{running.url}/v1"
    finally:
        running.stop()


THOUGHT = "<think>([a-z]{2,4} ){9,12}</think>"
TEXT_VERDICT = r'\{"reason": "[a-z ]{3,9}", "rating": "(good|fair|poor)"\}'
IMAGE_VERDICT = (
    r'\{"reason": "[a-z ]{3,9}", "final_answer_correct": true, "guesswork": false, '
    r'"contradiction": (true|false), "rating": "(good|fair)"\}'
)


def grammar(pattern: str) -> tuple[str, str]:
    return "--extra-body", json.dumps({"guided_regex": pattern})


def test_a_real_server_teaches_judges_and_a_killed_run_gives_the_same_set(vllm, sources, tmp_path):
    """One request at a time: in a batch of another size, the same seed may draw another word by rounding."""
    servers = ("--endpoint", vllm, "--in-flight", 1)
    outputs = tmp_path / "whole", tmp_path / "killed"
    for output in outputs:
        asking = ("text2image", "ask", *servers, "--output", output, "--input", sources / "deepseek.jsonl")
        asking += ("--limit", 14, "--max-tokens", 80, *grammar(f"({THOUGHT})?[a-z ]{{5,30}}"))
        judging = ("text2image", "judge", *servers, "--output", output, "--no-json-schema", *grammar(TEXT_VERDICT))
        if output == outputs[1]:
            kill_when(start(*asking), output / "text2image.answers/answers.jsonl", 6)
        run(*asking)
        if output == outputs[1]:
            kill_when(start(*judging), output / "text2image.answers/verdicts.jsonl", 3)
        run(*judging)
        run("text2image", "convert", "--output", output)
    answers = lines_of(outputs[0] / "text2image.answers/answers.jsonl")
    assert (
        json.loads((outputs[0] / "text2image.answers/answers.options.json").read_text())["options"]["model"] == "tiny"
    )
    rows = rows_of(outputs[0] / "text2image")
    check_for_llamafactory(rows)
    verdicts = {line["id"]: line["verdict"] for line in lines_of(outputs[0] / "text2image.answers/verdicts.jsonl")}
    assert {verdict["rating"] for verdict in verdicts.values()} <= {"good", "fair", "poor"}
    kept = [
        line
        for line in sorted(answers, key=lambda line: line["id"])
        if verdicts.get(line["id"], {}).get("rating") in ("good", "fair")
    ]
    assert len(rows) == len(kept) > 0
    for line, row in zip(kept, rows, strict=True):
        answer = line["text"].split("</think>")[-1].strip()
        assert row["messages"][1]["content"].split("</think>\n\n")[-1] == answer
    assert files_of(outputs[1], "text2image") == files_of(outputs[0], "text2image")


def test_a_real_server_sees_pictures_and_forces_verdicts(vllm, converted, tmp_path):
    servers = ("--endpoint", vllm, "--in-flight", 4, "--output", tmp_path)
    answer = f"{THOUGHT}<answer>[a-z]{{3,8}}</answer>"
    run("image-thinking", "ask", *servers, "--input", converted, "--samples", 12, "--max-tokens", 120, *grammar(answer))
    run("image-thinking", "judge", *servers, *grammar(IMAGE_VERDICT))
    answers = {line["id"]: line for line in lines_of(tmp_path / "image_thinking.answers/answers.jsonl")}
    verdicts = {line["id"]: line["verdict"] for line in lines_of(tmp_path / "image_thinking.answers/verdicts.jsonl")}
    manifest = json.loads((tmp_path / "image_thinking.manifest.json").read_text())
    assert len(answers) == manifest["rows_in"] == 24
    good = {key for key, verdict in verdicts.items() if verdict["rating"] == "good" and not verdict["contradiction"]}
    rows = rows_of(tmp_path / "image_thinking")
    check_for_llamafactory(rows)
    assert len(rows) == len(good) == manifest["rows_out"]
    for row in rows:
        assert row["images"][0]["bytes"] == picture(number_in(row["messages"][0]["content"]))
    expected = {answers[key]["text"].split("<answer>")[1].removesuffix("</answer>") for key in good}
    assert {row["messages"][1]["content"].split("</think>\n\n")[1] for row in rows} == expected


def test_a_real_server_obeys_the_verdicts_schema(vllm):
    """`--json-schema`, the default of the text judge: a model of random weights writes a verdict that can be read."""
    from qwen_merge.data.teacher.judge import TEXT_FIELDS, read_verdict, response_format

    form = response_format(TEXT_FIELDS)
    form["json_schema"]["schema"]["properties"]["reason"]["maxLength"] = 20  # noise fills all the room there is
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Rate it."}], "max_tokens": 300}

    def replies(**more) -> list[dict]:
        answers = [
            requests.post(f"{vllm}/chat/completions", json={**body, **more, "seed": i}, timeout=120) for i in range(5)
        ]
        return [answer.json()["choices"][0] for answer in answers]

    # Some fill the room with the white space that JSON allows anywhere: those are cut off, and no verdicts.
    finished = [reply for reply in replies(response_format=form) if reply["finish_reason"] == "stop"]
    assert finished
    for reply in finished:
        assert read_verdict(reply["message"]["content"], TEXT_FIELDS)["rating"] in ("good", "fair", "poor")
    for reply in replies()[:3]:
        with pytest.raises(ValueError):  # noqa: PT011  (control: without the schema it is noise)
            read_verdict(reply["message"]["content"], TEXT_FIELDS)
