"""Teachers and judges: servers that misbehave, answers that survive a kill, verdicts that stay with their answers."""

import asyncio
import json
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from endpoint import Endpoint, digest, text_of
from qwen_merge.cli import main
from qwen_merge.data.image_thinking.judge import answered
from qwen_merge.data.image_thinking.samples import fingerprint
from qwen_merge.data.journal import Journal
from qwen_merge.data.schema import Record
from qwen_merge.data.shards import ShardWriter
from qwen_merge.data.teacher.answers import AnswerFile, Request, collect, read_at
from qwen_merge.data.teacher.endpoints import Patience, Pool, base_url
from qwen_merge.data.teacher.judge import IMAGE_FIELDS, TEXT_FIELDS, judging, read_verdict, response_format
from qwen_merge.data.teacher.replies import Failed, Refused
from qwen_merge.errors import UserError

# Everything that is seconds in use is a fraction of one here.
QUICK = Patience(
    back_off=0.02, longest_back_off=0.1, connect=1, grace=1, slowest=1e9, probe_every=0.1, probe=2, all_dead=1.5
)


def body(text: str, max_tokens: int = 100) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}


def ask(urls: list[str], *texts: str, patience: Patience = QUICK, in_flight: int = 32, **options) -> list:
    """The replies, or the exceptions, to requests that are sent together."""

    async def run():
        async with Pool(urls, in_flight=in_flight, patience=patience) as pool:
            return await asyncio.gather(*(pool.ask(body(text, **options)) for text in texts), return_exceptions=True)

    return asyncio.run(run())


def said(text: str) -> str:
    return f"<think>\nabout {digest(text)}\n</think>\n\nanswer {digest(text)}"


# --- one server's faults ---


@pytest.mark.parametrize("fault", ["500", "503", "half", "torn", "json", "text", "abort", "hang"])
def test_a_fault_is_tried_again_and_the_answer_is_whole(fault):
    with Endpoint() as server:
        server.plan = [fault]
        (reply,) = ask([server.url], "hello")
        assert (reply.text, reply.finish_reason, reply.tokens, reply.model) == (said("hello"), "stop", 7, "teacher")
        assert len(server.bodies) == 2
        assert server.bodies[0] == server.bodies[1] == {**body("hello"), "model": "teacher"}


def test_a_request_that_always_fails_is_given_up_and_the_others_are_not():
    def answer(request):
        if "poison" in text_of(request):
            raise OSError("the connection ends")
        return {"content": "well"}

    with Endpoint(answer) as server:
        replies = ask([server.url], "poison", "a", "b", patience=QUICK)
    assert isinstance(replies[0], Failed)
    assert [reply.text for reply in replies[1:]] == ["well", "well"]


def test_retry_after_is_kept_and_counts_as_no_failure():
    with Endpoint() as server:
        server.retry_after = "0.5"
        server.plan = ["429"] * 3
        (reply,) = ask([server.url], "hello", patience=Patience(**{**vars(QUICK), "attempts": 1}))
        assert reply.text == said("hello")
        pauses = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
        assert len(pauses) == 3
        assert min(pauses) >= 0.5


def test_a_resting_server_leaves_the_work_to_the_other():
    with Endpoint() as tired, Endpoint() as fresh:
        tired.retry_after, tired.always = "30", "429"
        began = time.monotonic()
        replies = ask([tired.url, fresh.url], *"abcdef")
        assert [reply.text for reply in replies] == [said(text) for text in "abcdef"]
        assert time.monotonic() - began < 5
        assert 1 <= len(tired.bodies) <= 3  # those that were under way before it said so
        assert len(fresh.bodies) == 6


@pytest.mark.parametrize(("fault", "times"), [("400", 1), ("500", 6)])
def test_what_is_the_requests_fault_is_not_tried_again(fault, times):
    with Endpoint() as server:
        server.always = fault
        (problem,) = ask([server.url], "hello", patience=Patience(**{**vars(QUICK), "failures": 99}))
        assert type(problem) is (Refused if fault == "400" else Failed)
        assert f"fault {fault}" in str(problem)
        assert len(server.bodies) == times


def test_an_answer_that_does_not_fit_gets_less_room():
    """8,000 tokens of answer at a server with 8,192: the original's questions of over 190 tokens were refused."""
    with Endpoint(limit=8192) as server:
        server.always = "too long"
        (reply,) = ask([server.url], "a question of 500 tokens", max_tokens=8000)
        assert [sent["max_tokens"] for sent in server.bodies] == [8000, 7692]
        assert reply.max_tokens == 7692
        server.bodies.clear()
        (reply,) = ask([server.url], "a question of 500 tokens", max_tokens=7000)  # control: it fits
        assert [sent["max_tokens"] for sent in server.bodies] == [7000]


def test_time_outs_grow_with_the_answer():
    """60 s for 8,000 tokens was the original's: every long thought timed out."""
    assert Patience().of_answer(8000) > 1800
    assert Patience().of_answer(8000) - Patience().of_answer(0) == 8000 / Patience().slowest
    slow = {**vars(QUICK), "grace": 0.1, "attempts": 2}
    with Endpoint(delay=0.6) as server:
        (reply,) = ask([server.url], "long", max_tokens=100, patience=Patience(**{**slow, "slowest": 50}))
        assert reply.text == said("long")
        (problem,) = ask([server.url], "long", max_tokens=1, patience=Patience(**{**slow, "slowest": 50}))  # control
        assert isinstance(problem, Failed)
        assert "no answer" in str(problem)


# --- several servers ---


def test_requests_go_round_and_in_flight_holds():
    with Endpoint(delay=0.1) as one, Endpoint(delay=0.1) as two:
        texts = [str(i) for i in range(24)]
        replies = ask([one.url, two.url], *texts, in_flight=4)
        assert [reply.text for reply in replies] == [said(text) for text in texts]
        assert len(one.bodies) == len(two.bodies) == 12
        assert (one.most, two.most) == (4, 4)


def test_a_dead_server_is_left_out_and_nothing_is_lost():
    """Killed with requests under way: they are answered by the other."""
    with Endpoint(delay=0.1) as one, Endpoint(delay=0.1) as two:

        async def run():
            async with Pool([one.url, two.url], in_flight=4, patience=QUICK) as pool:
                asks = [asyncio.create_task(pool.ask(body(str(i)))) for i in range(40)]
                await asyncio.sleep(0.25)
                await asyncio.to_thread(one.stop)
                replies = await asyncio.gather(*asks)
                return replies, [endpoint.healthy for endpoint in pool.endpoints]

        replies, healthy = asyncio.run(run())
        assert [reply.text for reply in replies] == [said(str(i)) for i in range(40)]
        assert healthy == [False, True]
        assert len(one.bodies) < 20 < len(two.bodies)


def test_a_server_that_comes_back_is_used_again():
    one, two = Endpoint(), Endpoint(delay=0.02)
    with two:

        async def run():
            async with Pool([one.url, two.url], in_flight=2, patience=QUICK) as pool:
                first = await asyncio.gather(*(pool.ask(body(f"a{i}")) for i in range(4)))
                started = len(one.bodies)
                await asyncio.to_thread(one.start)
                end = time.monotonic() + 5
                while not pool.endpoints[0].healthy and time.monotonic() < end:
                    await asyncio.sleep(0.05)
                second = await asyncio.gather(*(pool.ask(body(f"b{i}")) for i in range(20)))
                return started, first, second, pool.endpoints[0].probation

        started, first, second, probation = asyncio.run(run())
        one.stop()
    assert started == 0
    assert [reply.text for reply in [*first, *second]] == [said(f"a{i}") for i in range(4)] + [
        said(f"b{i}") for i in range(20)
    ]
    assert len(one.bodies) >= 5
    assert not probation


def test_a_server_that_hangs_altogether_loses_its_requests_to_the_other():
    """/v1/models hangs too: nobody waits for the time-out of an answer, which is an hour here."""
    patient = Patience(**{**vars(QUICK), "grace": 3600})
    with Endpoint() as stuck, Endpoint() as fine:
        stuck.always = "hang"

        async def run():
            async with Pool([stuck.url, fine.url], patience=patient) as pool:
                stuck.models_fault = "hang"
                return await asyncio.gather(*(pool.ask(body(text)) for text in "abcd"))

        began = time.monotonic()
        replies = asyncio.run(run())
        assert [reply.text for reply in replies] == [said(text) for text in "abcd"]
        assert len(stuck.bodies) == 2
        assert time.monotonic() - began < 15


def test_all_dead_is_a_clear_error():
    with Endpoint() as server:

        async def run():
            async with Pool([server.url], patience=QUICK) as pool:
                await asyncio.to_thread(server.stop)
                await pool.ask(body("hello"))

        with pytest.raises(UserError, match=r"no endpoint has answered for 2 s\. Every answer that came is kept"):
            asyncio.run(run())


@pytest.mark.parametrize(
    ("fault", "message"),
    [("dead", "Connection error"), ("500", "starting"), ("text", "is no list of models"), ("hang", "timed out")],
)
def test_no_server_at_the_start_is_a_clear_error(fault, message):
    server = Endpoint()
    if fault != "dead":
        server.start().models_fault = fault
    with pytest.raises(UserError, match="no endpoint can be used") as error:
        ask([server.url], "hello")
    server.stop()
    assert server.url in str(error.value)
    assert message in str(error.value)
    assert not server.bodies


def test_different_models_are_refused_and_a_named_one_is_taken():
    with Endpoint() as one, Endpoint(model="another") as two:
        with pytest.raises(UserError, match="serve different models") as error:
            ask([one.url, two.url], "hello")
        assert f"{two.url}: another" in str(error.value)

        async def run(model):
            async with Pool([one.url, two.url], model, patience=QUICK) as pool:
                await asyncio.gather(*(pool.ask(body(text)) for text in "abcd"))
                return pool.model

        assert asyncio.run(run("another")) == "another"
        assert (len(one.bodies), len(two.bodies)) == (0, 4)
        with pytest.raises(UserError, match="serves teacher; expected a third"):
            asyncio.run(run("a third"))


def test_wrong_options_are_named_together():
    with pytest.raises(UserError) as error:
        Pool(["localhost:8000", "ftp://x"], in_flight=0)
    assert str(error.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        ("https://open.bigmodel.cn/api/paas/v4", "https://open.bigmodel.cn/api/paas/v4"),
        ("https://ark.example.com/api/v3/", "https://ark.example.com/api/v3"),
    ],
)
def test_only_an_address_without_a_path_gets_one(given, used):
    assert base_url(given) == used
    assert Pool([given]).urls == [used]


@pytest.mark.parametrize(
    "given",
    [
        "http://localhost:notaport",
        "http://localhost:99999/v1",
        "http://localhost:0",
        "http://[::1/v1",
        "http://:8000",
        "http://",
        "http://local host",
        "http://localhost:8000/v1?key=x",
        "http://a\x00b/v1",
        "",
    ],
)
def test_what_is_no_address_is_said_before_anything_is_asked(given):
    with pytest.raises(UserError, match="is no URL such as http://localhost:8000/v1"):
        Pool([given, "http://localhost:8000"])


def test_reasoning_content_is_joined():
    replies = {
        "apart": {"reasoning_content": "\nhm\n", "content": "\n\nso"},
        "newer name": {"reasoning": "hm", "content": "so"},
        "prompt opens it": {"content": "hm\n</think>\n\nso"},
        "cut off": {"reasoning_content": "hm", "content": None, "finish_reason": "length"},
        "plain": {"content": "so"},
    }
    with Endpoint(lambda request: dict(replies[text_of(request)])) as server:
        texts = {name: reply.text for name, reply in zip(replies, ask([server.url], *replies), strict=True)}
    assert texts == {
        "apart": "<think>\nhm\n</think>\n\nso",
        "newer name": "<think>\nhm\n</think>\n\nso",
        "prompt opens it": "<think>\nhm\n</think>\n\nso",
        "cut off": "<think>\nhm",
        "plain": "so",
    }


# --- the file of answers ---


def run_collect(folder: Path, urls: list[str], texts: list[str], in_flight: int = 4, **options):
    async def run():
        with AnswerFile(folder, "answers") as file:
            file.begin({"seed": 0, **options})
            async with Pool(urls, in_flight=in_flight, patience=QUICK) as pool:
                requests = (Request(f"id-{text}", body(text), {"question": text}) for text in texts)
                return await collect(file, requests, pool)

    return asyncio.run(run())


def answers(folder: Path) -> dict[str, str]:
    return {entry["id"]: entry.get("text", entry.get("refused")) for entry in AnswerFile(folder, "answers").entries()}


def test_a_restart_asks_only_for_what_is_missing(tmp_path):
    texts = [f"q{i}" for i in range(12)]
    with Endpoint() as server:
        first = run_collect(tmp_path, [server.url], texts[:7])
        second = run_collect(tmp_path, [server.url], texts)
        assert (first.answered, second.answered, second.there) == (7, 5, 7)
        assert server.asked == dict.fromkeys(texts, 1)
    assert answers(tmp_path) == {f"id-{text}": said(text) for text in texts}


def test_a_torn_line_is_asked_again(tmp_path):
    texts = [f"q{i}" for i in range(5)]
    with Endpoint() as server:
        run_collect(tmp_path, [server.url], texts)
        path = tmp_path / "answers.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])  # as a kill in the middle of a write leaves it
        assert len(answers(tmp_path)) == 4
        again = run_collect(tmp_path, [server.url], texts)
    assert (again.there, again.answered) == (4, 1)
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_what_got_no_answer_is_asked_again_and_what_was_refused_is_not(tmp_path):
    down = {"bad"}

    def answer(request):
        if text_of(request) in down:
            raise OSError("the connection ends")
        return {"content": text_of(request)}

    with Endpoint(answer) as server:
        first = run_collect(tmp_path, [server.url], ["good", "bad"])
        assert (first.answered, first.failed) == (1, 1)
        assert answers(tmp_path) == {"id-good": "good"}
        down.clear()
        server.plan = ["400"]
        second = run_collect(tmp_path, [server.url], ["good", "wrong"])
        third = run_collect(tmp_path, [server.url], ["good", "bad", "wrong"])
    assert (second.refused, third.there, third.answered) == (1, 2, 1)
    assert answers(tmp_path) == {"id-good": "good", "id-bad": "bad", "id-wrong": "400 fault 400"}


def test_when_everything_is_refused_nothing_is_kept(tmp_path):
    with Endpoint() as server:
        server.always = "400"
        for texts in ([f"q{i}" for i in range(50)], ["few"]):
            with pytest.raises(UserError, match="got no answer; the last one: 400 fault 400"):
                run_collect(tmp_path, [server.url], texts)
        assert len(server.bodies) < 40
        assert answers(tmp_path) == {}
        server.always = None
        assert run_collect(tmp_path, [server.url], ["few"]).answered == 1  # control


def test_reading_ahead_is_bounded(tmp_path):
    read = []

    def texts():
        for i in range(100):
            read.append(i)
            yield f"q{i}"

    ahead = []

    def answer(request):
        ahead.append(len(read) - len(ahead))
        return {"content": "x"}

    with Endpoint(answer, delay=0.01) as server:
        run_collect(tmp_path, [server.url], texts(), in_flight=3)
    assert len(ahead) == 100
    assert max(ahead) <= 8


def test_answers_are_written_while_the_source_blocks(tmp_path):
    seen = []

    def texts():
        yield from ("a", "b", "c")
        time.sleep(1.5)  # a hub that stalls
        seen.append(len(answers(tmp_path)))
        yield "d"

    with Endpoint() as server:
        assert run_collect(tmp_path, [server.url], texts()).answered == 4
    assert seen == [3]


def test_answers_that_came_with_the_end_of_the_servers_are_kept(tmp_path):
    with Endpoint(delay=0.02) as server:

        def texts():
            for i in range(60):
                if i == 30:
                    server.stop()
                yield f"q{i}"

        with pytest.raises(UserError, match="no endpoint has answered"):
            run_collect(tmp_path, [server.url], texts())
        there = answers(tmp_path)
        assert 20 <= len(there) <= 30
        assert there == {key: said(key.removeprefix("id-")) for key in there}
        server.start()
        again = run_collect(tmp_path, [server.url], [f"q{i}" for i in range(60)])
    assert (again.there, again.answered) == (len(there), 60 - len(there))


def test_changed_options_are_refused(tmp_path):
    with Endpoint() as server:
        run_collect(tmp_path, [server.url], ["a"], share=0.5)
        with pytest.raises(UserError, match=r"--share: 0.5 before, 0.6 now\. Give the same to go on, --overwrite"):
            run_collect(tmp_path, [server.url], ["a"], share=0.6)
    with AnswerFile(tmp_path, "answers") as file:
        assert file.begin({"seed": 0, "share": 0.6}, overwrite=True) is False
        assert list(file.entries()) == []


def test_a_refused_run_leaves_what_was_finished(tmp_path):
    with Endpoint() as server:
        run_collect(tmp_path, [server.url], ["a"], share=0.5)
    with AnswerFile(tmp_path, "answers") as file:
        file.begin({"seed": 0, "share": 0.5})
        file.finish({"requests": 1, "missing": 0})
    finished = file.done("ask")
    with pytest.raises(UserError, match="--share"):
        AnswerFile(tmp_path, "answers").begin({"seed": 0, "share": 0.6})
    assert file.done("ask") == finished
    with AnswerFile(tmp_path, "answers") as file:
        file.begin({"seed": 0, "share": 0.5})  # control: begun again, it is finished only at its end
        with pytest.raises(UserError, match="is not finished"):
            file.done("ask")


def test_a_hash_of_the_content_knows_no_order(tmp_path):
    lines = [{"id": str(i), "text": f"answer {i}"} for i in range(4)]
    found = []
    for number, entries in enumerate([lines, lines[::-1], [*lines, lines[0]], lines[1:], [{**lines[0], "text": "x"}]]):
        file = AnswerFile(tmp_path, str(number))
        file.journal.extend(entries)
        found.append(file.content())
    assert found[0] == found[1] == found[2]
    assert len(set(found)) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", "null"])
def test_a_broken_record_is_named(tmp_path, content):
    with AnswerFile(tmp_path, "answers") as file:
        file.begin({"seed": 0})
        file.finish({"requests": 0, "missing": 0})
    for path in (file.options_path, file.done_path):
        path.write_text(content)
    with pytest.raises(UserError, match=r"answers\.options\.json .*--overwrite"):
        AnswerFile(tmp_path, "answers").begin({"seed": 0})
    with pytest.raises(UserError, match=r"answers\.done\.json .*--overwrite"):
        file.done("ask")
    with AnswerFile(tmp_path, "answers") as file:
        assert file.begin({"seed": 0}, overwrite=True) is False


@contextmanager
def room_for(size: int):
    """Files cannot grow beyond that many bytes: a write that crosses it is done in part, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_message_and_costs_no_other_line(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"id": "first"})
    with pytest.raises(UserError, match=r"journal\.jsonl: File too large"), room_for(100):
        journal.append({"id": "x" * 200})
    assert journal.path.stat().st_size == 100  # half a line is there
    journal.append({"id": "second"})  # the same process goes on: not glued to it
    assert journal.read() == [{"id": "first"}, {"id": "second"}]


def test_a_folder_that_cannot_be_written_is_a_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file.*: Not a directory"):
        AnswerFile(tmp_path / "file" / "answers", "answers").begin({})
    with AnswerFile(tmp_path, "answers") as file, pytest.raises(UserError, match="File too large"), room_for(10):
        file.begin({"seed": "x" * 100})


def test_two_processes_do_not_write_to_one_file(tmp_path):
    with AnswerFile(tmp_path, "answers") as file:
        file.begin({})
        with pytest.raises(UserError, match="another process is writing"):
            AnswerFile(tmp_path, "answers").begin({})
    AnswerFile(tmp_path, "answers").begin({})  # control: the first has let go


def test_lines_are_read_by_place(tmp_path):
    with Endpoint() as server:
        run_collect(tmp_path, [server.url], ["ä", "問題", "c"])
    file = AnswerFile(tmp_path, "answers")
    places = file.index()
    wanted = ["id-c", "id-ä", "id-問題"]
    assert [entry["id"] for entry in read_at(file.path, (places[key] for key in wanted))] == wanted


# --- verdicts ---

GOOD = '{"reason": "right", "rating": "good"}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"<think>\nIs it poor? No.\n</think>\n\n{GOOD}",
        f"<think>hm</think><answer>{GOOD}</answer>",
        f"<think>hm</think><answer><|begin_of_box|>{GOOD}<|end_of_box|></answer>",
        f"```json\n{GOOD}\n```",
    ],
)
def test_a_verdict_is_read(text):
    assert read_verdict(text, TEXT_FIELDS) == {"reason": "right", "rating": "good"}


@pytest.mark.parametrize(
    "text",
    [
        "This answer is not good.",  # the original: the word anywhere, negated or not
        "good",
        "",
        "<think>\n" + GOOD,  # a thought that is not finished
        f"My verdict: {GOOD}",
        GOOD + GOOD,
        '{"reason": "right", "rating": "excellent"}',
        '{"reason": "right", "rating": "not good"}',
        '{"reason": "right", "rating": "poor", "rating": "good"}',
        '{"rating": "good"}',
        '{"reason": "right", "rating": "good", "confidence": 1}',
        '{"reason": 1, "rating": "good"}',
        '["good"]',
        GOOD[:-1],
    ],
)
def test_anything_else_is_no_verdict(text):
    with pytest.raises(ValueError):  # noqa: PT011
        read_verdict(text, TEXT_FIELDS)


def test_a_reason_may_quote_the_end_of_a_thought():
    text = '{"reason": "nothing after </think>", "rating": "poor"}'
    assert read_verdict(text, TEXT_FIELDS) == {"reason": "nothing after </think>", "rating": "poor"}


def test_a_reason_may_have_line_ends():
    assert read_verdict('{"reason": "one\ntwo", "rating": "poor"}', TEXT_FIELDS)["reason"] == "one\ntwo"


def test_truth_values_are_no_words():
    fields = '{"reason": "r", "final_answer_correct": %s, "guesswork": false, "contradiction": false, "rating": "good"}'
    assert read_verdict(fields % "true", IMAGE_FIELDS)["final_answer_correct"] is True
    for wrong in ('"true"', "1", "null"):
        with pytest.raises(ValueError, match="final_answer_correct"):
            read_verdict(fields % wrong, IMAGE_FIELDS)


def test_the_schema_has_the_fields_in_order():
    schema = response_format(TEXT_FIELDS)["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["reason", "rating"]
    assert schema["properties"]["rating"] == {"type": "string", "enum": ["good", "fair", "poor"]}


def test_an_unreadable_verdict_is_asked_for_once_more(tmp_path):
    replies = {"readable": [GOOD], "second": ["not good", GOOD], "never": ["good!", "very good!"]}

    def answer(request):
        return {"content": replies[text_of(request)].pop(0)}

    with Endpoint(answer) as server:

        async def run():
            with AnswerFile(tmp_path, "verdicts") as file:
                file.begin({})
                async with Pool([server.url], patience=QUICK) as pool:
                    requests = [Request(text, {k: v for k, v in body(text).items() if k != "seed"}) for text in replies]
                    await collect(file, requests, pool, judging(TEXT_FIELDS, seed=3))

        asyncio.run(run())
        temperatures = {text: [b["temperature"] for b in server.bodies if text_of(b) == text] for text in replies}
        seeds = [b["seed"] for b in server.bodies if text_of(b) == "second"]
    lines = {entry["id"]: entry for entry in AnswerFile(tmp_path, "verdicts").entries()}
    assert {text: line["verdict"] and line["verdict"]["rating"] for text, line in lines.items()} == {
        "readable": "good",
        "second": "good",
        "never": None,
    }
    assert {text: line["tries"] for text, line in lines.items()} == {"readable": 1, "second": 2, "never": 2}
    assert lines["never"]["text"] == "very good!"
    assert temperatures == {"readable": [0], "second": [0, 0.7], "never": [0, 0.7]}
    assert len(set(seeds)) == 2


def test_verdicts_stay_with_their_answers_when_they_come_in_another_order(tmp_path):
    """The original zips verdicts in the order they come with answers in the order they were sent."""
    good = {f"q{i}" for i in range(20) if i % 2}

    def answer(request):
        text = text_of(request)
        time.sleep(0.3 - 0.015 * int(text[1:]))  # the last one sent comes first
        return {"content": json.dumps({"reason": text, "rating": "good" if text in good else "poor"})}

    with Endpoint(answer) as server:

        async def run():
            with AnswerFile(tmp_path, "verdicts") as file:
                file.begin({})
                async with Pool([server.url], patience=QUICK) as pool:
                    await collect(
                        file, [Request(f"q{i}", body(f"q{i}")) for i in range(20)], pool, judging(TEXT_FIELDS, 0)
                    )

        asyncio.run(run())
    entries = list(AnswerFile(tmp_path, "verdicts").entries())
    assert {entry["id"] for entry in entries if entry["verdict"]["rating"] == "good"} == good
    assert all(entry["verdict"]["reason"] == entry["id"] for entry in entries)
    # Control: in this run the order did change, so the original's way would have kept others.
    in_order = [entry["verdict"]["rating"] for entry in entries]
    assert {f"q{i}" for i, rating in enumerate(in_order) if rating == "good"} != good


# --- the steps, one after the other ---

ROWS = [{"instruction": f"Do {i}.", "input": "", "output": f"Done {i}."} for i in range(6)]


class Teacher:
    """Teacher and judge of both sets. Its answers carry the generation that it is in; `poor`: judged so by the text."""

    def __init__(self):
        self.generation = "one"
        self.poor: set[str] = set()
        self.silent: set[str] = set()  # questions that get no answer
        self.judged: list[str] = []

    def __call__(self, request: dict) -> dict:
        text = text_of(request)
        if "strict examiner" in text:
            self.judged.append(text)
            rating = "poor" if any(f"{word} " in text for word in self.poor) else "good"
            verdict = {"reason": "r", "rating": rating}
            if "<thought>" in text:
                verdict |= {"final_answer_correct": True, "guesswork": False, "contradiction": False}
            return {"content": json.dumps(verdict)}
        if text in self.silent:
            raise OSError("the connection ends")
        thought = f"I look at it for as long as it takes and then I know what {text.split()[1]} is about."
        said = f"{self.generation} for {text}"
        image = not isinstance(request["messages"][0]["content"], str)
        return {"content": f"<think>{thought}</think>{f'<answer>{said}</answer>' if image else said}"}


def command(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def texts_of(output: Path, name: str) -> list[str]:
    """What the assistant says in a set, without its thoughts."""
    rows = [row for path in sorted((output / name).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return sorted(row["messages"][1]["content"].split("</think>")[-1].strip() for row in rows)


@pytest.fixture
def teacher():
    return Teacher()


@pytest.fixture
def text_steps(tmp_path, teacher):
    """ask, judge, convert: each runs its step with more options, in tmp_path/data."""
    source = tmp_path / "alpaca.json"
    source.write_text(json.dumps(ROWS))
    with Endpoint(teacher) as server:
        every = ("--output", tmp_path / "data")
        asking = ("--input", source, "--plain-share", 0, "--attempts", 1)
        yield (
            lambda *more: command("text2image", "ask", "--endpoint", server.url, *asking, *every, *more),
            lambda *more: command("text2image", "judge", "--endpoint", server.url, *every, *more),
            lambda *more: command("text2image", "convert", *every, *more),
        )


def test_a_verdict_is_of_the_answer_that_was_judged(tmp_path, teacher, text_steps, capsys):
    """The same questions asked anew with the same options: as many answers, and none of them was judged."""
    ask, judge, convert = text_steps
    assert (ask(), judge(), convert()) == (0, 0, 0)
    assert texts_of(tmp_path / "data", "text2image") == [f"one for Do {i}." for i in range(6)]
    assert len(teacher.judged) == 6
    assert judge() == 0
    assert "finished already" in capsys.readouterr().out
    assert len(teacher.judged) == 6  # control: nothing has changed, nothing is judged again

    teacher.generation = "two"
    teacher.poor = {f"two for Do {i}.\n</answer>\n\nCompare what the answer" for i in (0, 3)}
    assert ask("--overwrite") == 0
    assert convert("--overwrite") == 2
    assert "the answers have changed since `qwen-merge data text2image judge` read them" in capsys.readouterr().err
    assert judge() == 0
    assert len(teacher.judged) == 12
    assert convert() == 2  # as many answers as before, but others
    assert "answers in all" in capsys.readouterr().err
    assert convert("--resume", "--overwrite") == 0
    assert texts_of(tmp_path / "data", "text2image") == [f"two for Do {i}." for i in (1, 2, 4, 5)]


def test_answers_that_came_after_the_verdicts_are_not_lost(tmp_path, teacher, text_steps, capsys):
    ask, judge, convert = text_steps
    teacher.silent = {"Do 2."}
    assert (ask(), judge(), judge("--accept-missing")) == (1, 2, 0)
    teacher.silent = set()
    assert ask() == 0
    assert convert("--accept-missing") == 2
    assert "Run it again first; it asks only about what is new" in capsys.readouterr().err
    assert not (tmp_path / "data/text2image").exists()
    assert (judge(), convert()) == (0, 0)
    assert len(teacher.judged) == 6
    assert texts_of(tmp_path / "data", "text2image") == [f"one for Do {i}." for i in range(6)]


def test_later_steps_take_a_folder_and_a_limit(tmp_path, teacher, text_steps, capsys):
    ask, judge, convert = text_steps
    answers = tmp_path / "elsewhere"
    assert ask("--output", answers) == 0
    assert judge() == 2  # control: nothing in --output
    assert judge("--input", answers, "--limit", 2) == 0
    assert len(teacher.judged) == 2
    capsys.readouterr()
    assert convert("--input", answers) == 2
    assert "was run with --limit 2: the answers beyond have no verdicts" in capsys.readouterr().err
    assert convert("--input", answers, "--limit", 2) == 0
    manifest = json.loads((tmp_path / "data/text2image.manifest.json").read_text())
    assert (manifest["rows_in"], manifest["rows_out"], manifest["drops"]["beyond --limit"]["rows"]) == (6, 2, 4)
    assert manifest["options"]["limit"] == 2
    few = texts_of(tmp_path / "data", "text2image")
    assert judge("--input", answers) == 0
    assert len(teacher.judged) == 6  # the others only
    assert judge("--input", answers, "--limit", 3) == 0
    assert convert("--input", answers, "--overwrite") == 0  # a smaller limit has taken nothing back
    assert set(few) < set(texts_of(tmp_path / "data", "text2image"))
    assert len(texts_of(tmp_path / "data", "text2image")) == 6


def test_a_manifest_says_which_fonts_drew_it(tmp_path, text_steps):
    from qwen_merge.data.render.fonts import describe

    assert [step() for step in text_steps] == [0, 0, 0]
    manifest = json.loads((tmp_path / "data/text2image.manifest.json").read_text())
    assert manifest["options"]["font files"] == describe("mplfonts")
    assert {"mplfonts", "matplotlib", "pillow"} <= set(manifest["versions"])


def write_set(folder: Path, colours: list[str]) -> Path:
    """A converted set of small pictures, a question each."""
    with ShardWriter(folder / "geo3k", "part-00000") as writer:
        for number, colour in enumerate(colours):
            turns = [f"<image>\nDescribe figure{number} here", f"It is {number}"]
            messages = [
                {"role": role, "content": turn} for role, turn in zip(("user", "assistant"), turns, strict=True)
            ]
            writer.add(Record(messages, [colour.encode()]))
        writer.close()
    return folder


@pytest.fixture
def image_steps(tmp_path, teacher):
    """The server, and ask and judge in tmp_path/data, from tmp_path/converted."""
    with Endpoint(teacher) as server:
        every = ("--endpoint", server.url, "--output", tmp_path / "data")
        yield (
            server,
            lambda *more: command("image-thinking", "ask", *every, "--input", tmp_path / "converted", *more),
            lambda *more: command("image-thinking", "judge", *every, *more),
        )


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_asking_anew_without_a_teacher_changes_nothing(tmp_path, teacher, image_steps):
    server, ask, judge = image_steps
    write_set(tmp_path / "converted", ["red", "white", "blue"])
    assert ask() == 0
    before = files_below(tmp_path / "data")
    assert len(before) == 7
    write_set(tmp_path / "converted", ["tan", "black", "gold"])
    server.stop()
    assert ask("--overwrite") == 2
    assert files_below(tmp_path / "data") == before
    server.start()
    assert ask("--overwrite") == 0  # control: with one, the samples are drawn anew
    assert files_below(tmp_path / "data").keys() == before.keys()
    name = "image_thinking.answers/samples/geo3k.parquet"
    assert files_below(tmp_path / "data")[name] != before[name]
    assert judge() == 0
    assert len(texts_of(tmp_path / "data", "image_thinking")) == 3


def test_an_answer_is_of_the_sample_that_was_shown(tmp_path, teacher, image_steps, capsys):
    """Other pictures under the same ids: their answers are no answers to these."""
    _, ask, judge = image_steps
    converted = write_set(tmp_path / "converted", ["red", "white", "blue"])
    assert ask() == 0
    assert [entry is not None for _, entry in answered(tmp_path / "data")] == [True] * 3
    other = tmp_path / "other"
    write_set(converted, ["red", "black", "blue"])
    assert (
        command("image-thinking", "ask", "--endpoint", image_steps[0].url, "--input", converted, "--output", other) == 0
    )
    names = ("samples.jsonl", "samples.done.json", "samples/geo3k.parquet")
    for name in names:
        (tmp_path / "data/image_thinking.answers" / name).write_bytes(
            (other / "image_thinking.answers" / name).read_bytes()
        )
    assert [entry is not None for _, entry in answered(tmp_path / "data")] == [True, False, True]
    capsys.readouterr()
    assert judge() == 2
    assert "the samples have changed since `qwen-merge data image-thinking ask` read them" in capsys.readouterr().err
    assert teacher.judged == []


def test_samples_that_cannot_be_written_are_a_message(tmp_path, image_steps, capsys):
    _, ask, _ = image_steps
    write_set(tmp_path / "converted", ["red", "white" * 20_000])
    with room_for(50_000):
        assert ask() == 2
    assert "File too large" in capsys.readouterr().err
    assert ask() == 0  # control


@pytest.mark.parametrize("described", [True, False])
def test_two_conversions_of_the_same_size_are_two_sources(tmp_path, described):
    from qwen_merge.data.counts import Counts
    from qwen_merge.data.manifest import Manifest, manifest_path

    found = []
    for colours in (["red", "white"], ["tan", "black"], ["red", "white"]):
        with ShardWriter(tmp_path / "geo3k", "part-00000") as writer:
            for colour in colours:
                messages = [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}]
                writer.add(Record(messages, [colour.encode()]))
            shards = writer.close()
        if described:
            counts = Counts(rows_in=2, rows_out=2)
            Manifest("geo3k", "s", None, {}, 0, counts, shards).write(manifest_path(tmp_path, "geo3k"))
        found.append((fingerprint(tmp_path / "geo3k"), shards[0].bytes))
    assert found[0] == found[2]
    assert found[0][1] == found[1][1]  # of the same size
    assert found[0][0] != found[1][0]


def test_verdicts_stay_when_the_set_is_made_anew(tmp_path, teacher, image_steps, capsys):
    server, ask, judge = image_steps
    write_set(tmp_path / "converted", ["red", "white", "blue"])
    verdicts = tmp_path / "data/image_thinking.answers/verdicts.jsonl"
    teacher.silent = {"Describe figure1 here"}
    assert (ask("--attempts", 1), judge("--accept-missing")) == (1, 0)
    assert len(texts_of(tmp_path / "data", "image_thinking")) == 2
    paid = verdicts.read_bytes()
    teacher.silent = set()
    assert (ask(), judge()) == (0, 0)  # the one that was missing came
    assert len(texts_of(tmp_path / "data", "image_thinking")) == 3
    assert verdicts.read_bytes().startswith(paid)
    assert len(teacher.judged) == 3
    server.stop()
    assert judge("--shard-mb", 7) == 0  # nobody is asked
    manifest = json.loads((tmp_path / "data/image_thinking.manifest.json").read_text())
    assert (manifest["options"]["shard_mb"], manifest["rows_out"]) == (7, 3)
    assert judge("--shard-mb", 7) == 0
    assert "image_thinking: the set is finished already" in capsys.readouterr().out
    # Control: what another hand made is not replaced.
    (tmp_path / "data/image_thinking.manifest.json").unlink()
    assert judge() == 2
    said = capsys.readouterr().err
    assert "this command did not make it" in said
    assert "--overwrite" not in said
    assert len(texts_of(tmp_path / "data", "image_thinking")) == 3


def test_a_limit_of_samples(tmp_path, teacher, image_steps):
    _, ask, judge = image_steps
    write_set(tmp_path / "converted", ["red", "white", "blue"])
    assert (ask("--output", tmp_path / "elsewhere"), judge()) == (0, 2)
    assert judge("--input", tmp_path / "elsewhere", "--limit", 2) == 0
    manifest = json.loads((tmp_path / "data/image_thinking.manifest.json").read_text())
    assert (len(teacher.judged), manifest["rows_in"], manifest["rows_out"]) == (2, 3, 2)
    assert manifest["drops"]["beyond --limit"]["rows"] == 1
    assert judge("--input", tmp_path / "elsewhere") == 0
    assert (len(teacher.judged), len(texts_of(tmp_path / "data", "image_thinking"))) == (3, 3)
