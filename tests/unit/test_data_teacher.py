"""Teachers and judges: servers that misbehave, answers that survive a kill, verdicts that stay with their answers."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from endpoint import Endpoint, digest, text_of
from qwen_merge.data.teacher.answers import AnswerFile, Request, collect, read_at
from qwen_merge.data.teacher.endpoints import Patience, Pool
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
