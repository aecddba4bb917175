"""Questions from the public text sets, what is asked of the teacher about them, and the commands' options."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_merge.cli import main
from qwen_merge.data.counts import Counts
from qwen_merge.data.teacher.steps import Servers
from qwen_merge.data.text2image.ask import modes, request_of
from qwen_merge.data.text2image.judge import problem_of
from qwen_merge.data.text2image.questions import Question, origins, read_questions
from qwen_merge.errors import UserError
from training import REPOSITORY

ALPACA = [
    {"instruction": f"Do {i}.", "input": "With care." if i % 2 else "", "output": f"Done {i}."} for i in range(40)
]


def written(tmp_path, rows=ALPACA):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows))
    return path


def read(paths, **options) -> tuple[list[Question], Counts]:
    counts = Counts()
    return list(read_questions(origins([], paths), counts, **options)), counts


def test_a_question_is_the_instruction_and_its_input(tmp_path):
    questions, counts = read([written(tmp_path)])
    assert [question.text for question in questions[:2]] == ["Do 0.", "Do 1.\nWith care."]
    assert [question.reference for question in questions[:2]] == ["Done 0.", "Done 1."]
    assert {question.source for question in questions} == {"alpaca"}
    assert (counts.rows_in, counts.dropped) == (40, 0)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_every_form_of_a_local_copy_gives_the_same_questions(tmp_path, kind):
    rows = [{"input": f"问题{i}", "content": f"答{i}", "reasoning_content": "想", "score": i} for i in range(9)]
    path = tmp_path / f"copy.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    questions, _ = read([path])
    assert [(question.text, question.reference, question.source) for question in questions] == [
        (f"问题{i}", f"答{i}", "chinese-deepseek-r1") for i in range(9)
    ]


def test_what_gives_no_question_is_counted(tmp_path):
    rows = [
        *ALPACA[:2],
        ALPACA[0],
        {"instruction": " ", "input": "", "output": "x"},
        {"instruction": "No answer", "input": "", "output": ""},
        {"instruction": "Show an <image>", "input": "", "output": "x"},
        {"instruction": None, "input": "Only an input", "output": "x"},
    ]
    questions, counts = read([written(tmp_path, rows)])
    assert [question.text for question in questions] == ["Do 0.", "Do 1.\nWith care.", "Only an input"]
    assert {reason: entry["rows"] for reason, entry in counts.drops.items()} == {
        "question asked before": 1,
        "no question": 1,
        "no reference answer to judge by": 1,
        "media tag or control token in the question": 1,
    }
    assert counts.rows_in == 7


def test_a_share_is_seeded_and_grows(tmp_path):
    path = written(tmp_path)
    texts = lambda **options: [question.text for question in read([path], **options)[0]]  # noqa: E731
    half, again, other = texts(share=0.5), texts(share=0.5), texts(share=0.5, seed=1)
    assert half == again != other
    assert set(texts(share=0.2)) < set(half) < set(texts())
    assert 8 < len(half) < 32
    assert half != texts()[: len(half)]  # control: not the first ones
    assert texts(limit=3) == ["Do 0.", "Do 1.\nWith care.", "Do 2."]


def test_a_limit_is_of_a_set_and_not_of_each_of_its_files(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.json").write_text(json.dumps(ALPACA[number * 4 : number * 4 + 4]))
    deepseek = [{"input": f"问题{i}", "content": f"答{i}"} for i in range(9)]
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps(row) for row in deepseek))
    questions, counts = read([tmp_path], limit=6)
    assert [question.text for question in questions if question.source == "alpaca"] == [
        f"Do {i}.{chr(10) + 'With care.' if i % 2 else ''}" for i in range(6)
    ]
    assert sum(question.source == "chinese-deepseek-r1" for question in questions) == 6
    assert counts.rows_in == 12
    assert len(read([tmp_path])[0]) == 21  # control


def test_a_local_copy_is_known_by_its_content(tmp_path):
    path = written(tmp_path)
    before = [origin.recorded() for origin in origins([], [path])]
    path.write_text(path.read_text().replace("Done 7.", "Done 8."))
    assert [origin.recorded() for origin in origins([], [path])] != before
    written(tmp_path)
    assert [origin.recorded() for origin in origins([], [path])] == before  # control


def test_evaluation_questions_are_left_out(tmp_path):
    class Index:
        def question_hit(self, text):
            return "Bench row 1" if text == "Do 2." else None

    questions, counts = read([written(tmp_path)], index=Index())
    assert len(questions) == 39
    assert counts.drops["near-copy of an evaluation item"]["examples"] == ["Bench row 1: alpaca row 2: Do 2."]


def test_real_evaluation_files_are_left_out(tmp_path):
    from qwen_merge.data.teacher.steps import evaluation_index

    wording = "How many days does a ship need from Lisbon to Rio de Janeiro at twelve knots?"
    tsv = tmp_path / "Bench.tsv"
    tsv.write_text(f"index\tquestion\tanswer\n1\t{wording}\t19\n")
    rows = [*ALPACA[:2], {"instruction": f"Please tell me. {wording.upper()}", "input": "", "output": "19"}]
    questions, counts = read([written(tmp_path, rows)], index=evaluation_index([tsv]))
    assert len(questions) == 2
    assert "Bench" in counts.drops["near-copy of an evaluation item"]["examples"][0]
    assert evaluation_index([]) is None


def test_wrong_sources_are_named_together(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "x"}\n')
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError) as error:
        origins(["dolly"], [other, tmp_path / "notes.txt", tmp_path / "nothing"])
    assert str(error.value).count("\n  - ") == 4
    assert "other.jsonl has the columns prompt; expected (chinese-deepseek-r1: input, content;" in str(error.value)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read"):
        read([path])


def test_modes_and_requests():
    question = Question("abc", "alpaca", "How?", "So.")
    servers = Servers(["http://x"], max_tokens=77, extra_body={"min_p": 0.1})
    assert modes("abc", 0.0, 0) == ("thinking",)
    assert modes("abc", 1.0, 0) == ("thinking", "plain")
    assert {modes(str(i), 0.5, 0) for i in range(20)} == {("thinking",), ("thinking", "plain")}
    thinking, plain = (request_of(question, mode, servers, 5) for mode in ("thinking", "plain"))
    assert thinking.body["messages"][0]["content"] == "How?"
    assert plain.body["messages"][0]["content"] == "How? /no_think"
    assert (thinking.id, plain.id) == ("abc-thinking", "abc-plain")
    assert thinking.body["seed"] != plain.body["seed"]
    assert thinking.body["min_p"] == 0.1
    assert request_of(question, "thinking", servers, 5) == thinking != request_of(question, "thinking", servers, 6)


@pytest.mark.parametrize(
    ("mode", "text", "finish", "problem"),
    [
        ("thinking", "<think>\na\n</think>\n\nb", "stop", None),
        ("plain", "<think>\n\n</think>\n\nb", "stop", None),
        ("plain", "b", "stop", None),
        ("thinking", "<think>\na\n</think>\n\nb", "length", "answer cut off by length"),
        ("thinking", "<think>\na", "stop", "thought not finished"),
        ("thinking", "<think>\na\n</think>\n\n", "stop", "empty answer"),
        ("thinking", "b", "stop", "no thought in thinking mode"),
        ("plain", "<think>\na\n</think>\n\nb", "stop", "a thought without being asked for one"),
        ("plain", "see <image>", "stop", "media tag or control token in the answer"),
        ("plain", "b", "content_filter", "answer ended by content_filter"),
    ],
)
def test_answers_that_no_verdict_can_save(mode, text, finish, problem):
    assert problem_of({"id": "x", "mode": mode, "text": text, "finish_reason": finish}) == problem


# --- commands ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text2image", "ask"], "no --endpoint was given"),
        (["text2image", "ask", "--endpoint", "here"], "'here' is no URL"),
        (
            ["text2image", "judge", "--endpoint", "http://localhost:1"],
            "`qwen-merge data text2image ask` has not been run",
        ),
        (["text2image", "convert"], "`qwen-merge data text2image ask` has not been run"),
        (["image-thinking", "ask", "--endpoint", "http://localhost:1"], "holds no converted set"),
        (["image-thinking", "ask", "--endpoint", "http://localhost:1", "--sets", "x"], "cannot be sampled"),
        (["image-thinking", "judge", "--endpoint", "http://localhost:1"], "image-thinking ask` has not been run"),
    ],
)
def test_what_a_user_can_mend_is_said_with_exit_code_2(tmp_path, capsys, arguments, message):
    if arguments[:2] == ["text2image", "ask"]:
        arguments = [*arguments, "--input", str(written(tmp_path))]
    assert main(["data", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--share", "2"),
        ("--in-flight", "0"),
        ("--extra-body", "[1]"),
        ("--extra-body", "{"),
        *(("--extra-body", json.dumps({"min_p": 0.1, name: 1})) for name in ("messages", "model", "max_tokens")),
        *(("--extra-body", json.dumps({name: 2})) for name in ("stream", "n")),
    ],
)
def test_wrong_values_are_refused(capsys, option, value):
    with pytest.raises(SystemExit):
        main(["data", "text2image", "ask", option, value])
    assert option in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "step"),
    [
        ("text2image/process.py", "text2image ask"),
        ("text2image/evaluate.py", "text2image judge"),
        ("text2image/convert.py", "text2image convert"),
        ("image/process.py", "image-thinking ask"),
        ("image/evaluate.py", "image-thinking judge"),
    ],
)
def test_the_scripts_are_the_commands(tmp_path, script, step):
    """Run without the package installed on the path (-I), as from a bare checkout."""
    path = REPOSITORY / "src/data_process/stage3" / script
    result = subprocess.run(
        [sys.executable, "-I", path, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"qwen-merge data {step}" in result.stdout
