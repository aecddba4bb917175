"""The demo's frame: what is done stays done, what fails is said, and the page holds what it should."""

import json

import pytest

from qwen_merge.cli import main
from qwen_merge.demo import report, run
from qwen_merge.demo.evaluation import Exam
from qwen_merge.demo.language import CHANCE
from qwen_merge.errors import UserError


def test_a_finished_step_is_not_done_again(tmp_path):
    done = []
    demo = run.Demo(tmp_path / "out")
    demo.step("one", "first", lambda: done.append(1))
    again = run.Demo(tmp_path / "out", resume=True)
    again.step("one", "first", lambda: done.append("again"))
    again.step("two", "second", lambda: done.append(2))
    assert done == [1, 2]


def test_a_failed_step_is_done_again(tmp_path):
    demo = run.Demo(tmp_path / "out")

    def fail():
        demo.command("broken", "sh", "-c", "echo out of luck; exit 3")

    with pytest.raises(UserError, match=r"broken failed with exit code 3(.|\n)*out of luck"):
        demo.step("one", "first", fail)
    assert "one" not in run.Demo(tmp_path / "out", resume=True).steps


def test_a_used_folder_needs_resume(tmp_path, capsys):
    run.Demo(tmp_path / "out")
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert "Go on there with --resume" in capsys.readouterr().err


def test_resume_refuses_another_seed_and_a_strange_folder(tmp_path):
    run.Demo(tmp_path / "out", seed=1)
    with pytest.raises(UserError, match="resume it with --seed 1"):
        run.Demo(tmp_path / "out", seed=2, resume=True)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/file").touch()
    with pytest.raises(UserError, match="holds no demo to resume"):
        run.Demo(tmp_path / "strange", resume=True)


def test_the_exam_is_the_same_for_every_checkpoint_and_its_control_is_shuffled_within_topics():
    exam, again = Exam(), Exam()
    assert exam.questions == again.questions
    assert exam.shuffled() == again.shuffled()
    order = exam.shuffled()
    assert sorted(order) == list(range(len(exam.questions)))
    for place, picture in enumerate(order):
        assert exam.questions[picture].topic == exam.questions[place].topic
    moved = sum(place != picture for place, picture in enumerate(order))
    assert moved > 0.95 * len(order)


def test_a_resumed_run_counts_each_step_once(tmp_path):
    lines = [
        {"current_steps": 1, "loss": 3.0},
        {"current_steps": 2, "loss": 2.0},
        {"current_steps": 2, "loss": 2.5},
        {"current_steps": 3, "epoch": 1.0},
    ]
    log = tmp_path / "trainer_log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.losses(log) == [(1, 3.0), (2, 2.5)]


def test_the_page_stands_alone(tmp_path):
    exam = Exam()
    examples = [{"picture": 0, "thought": "a <b> thought", "answer": "red & blue", "text": "red & blue"}]
    one = {
        "caption_loss": 1.0,
        "answer_loss": 1.0,
        "accuracy": dict.fromkeys(CHANCE, 0.5),
        "control": dict(CHANCE),
        "examples": examples,
    }
    log = tmp_path / "trainer_log.jsonl"
    log.write_text('{"current_steps": 1, "loss": 3.0}\n{"current_steps": 2, "loss": 2.0}\n')
    names = list(report.WHAT_HAPPENS)
    results = dict.fromkeys(names, one)
    report.write_report(tmp_path, results, dict.fromkeys(names[1:], log), {"llm": 60.0}, ["shape is missed"], 0)
    page = (tmp_path / "report.html").read_text()
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "<!-- " not in page
    assert "src=" in page
    assert "http" not in page
    assert "shape is missed" in page
    assert exam.questions[0].text in page
    assert "a &lt;b&gt; thought" in page
    assert "red &amp; blue" in page
    assert json.loads((tmp_path / "results.json").read_text())["missed"] == ["shape is missed"]
