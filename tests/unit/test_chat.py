"""`qwen-merge chat`: telling thoughts from answers as they come, and what it refuses."""

import pytest

from clips import write_clip
from qwen_merge.chat.conversation import InProcess, Settings, ThoughtSplitter, question
from qwen_merge.cli import main
from qwen_merge.video import frame_rate, processor_options


def pieces(texts: list[str]) -> tuple[str, str]:
    """(thought, answer) of a text that comes in these pieces."""
    splitter = ThoughtSplitter()
    out = [piece for text in texts for piece in splitter.feed(text)] + splitter.flush()
    assert all(text for _, text in out)
    kinds = [kind for kind, _ in out]
    assert kinds == sorted(kinds, reverse=True), "the thought comes first"
    return tuple("".join(text for kind, text in out if kind == wanted) for wanted in ("thought", "answer"))


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nRound, red.\n</think>\n\nA circle.", "\nRound, red.\n", "\n\nA circle."),
        ("\n<think>Red.</think>A circle.", "Red.", "A circle."),
        ("A circle.", "", "A circle."),
        ("<th", "", "<th"),  # what could have become a tag and did not
        ("1 < 2", "", "1 < 2"),
        ("<think>a </thin b</think>c", "a </thin b", "c"),
        ("<think>never closed </th", "never closed </th", ""),
        ("Not first: <think>a</think>", "", "Not first: <think>a</think>"),
        ("", "", ""),
    ],
)
def test_a_tag_may_be_cut_anywhere(text, thought, answer):
    assert pieces([text]) == (thought, answer)
    assert pieces(list(text)) == (thought, answer)
    for cut in range(len(text)):
        assert pieces([text[:cut], text[cut:]]) == (thought, answer)


def test_a_thought_is_shown_before_it_ends():
    splitter = ThoughtSplitter()
    assert splitter.feed("<think>Round") == [("thought", "Round")]
    assert splitter.feed(" and red") == [("thought", " and red")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "neither MODEL_DIR nor --endpoint given"),
        (["DIR", "--endpoint", "http://localhost:1/v1"], "both MODEL_DIR and --endpoint given"),
        (["DIR", "--image", "gone.png", "-q", "What?"], "no such file: gone.png"),
        (["DIR", "-q", "What?"], "DIR is not a checkpoint: it has no config.json"),
        (["DIR", "--thinking-budget", "5", "-q", "What?"], "--thinking-budget is an option of the server"),
        (["--endpoint", "http://127.0.0.1:1/v1", "-q", "What?"], "no model found at http://127.0.0.1:1/v1"),
    ],
)
def test_what_cannot_work_is_said(arguments, said, capsys):
    assert main(["chat", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_adapter_is_told_from_a_checkpoint(tmp_path, capsys):
    assert main(["chat", str(tmp_path), "-q", "What?"]) == 2
    assert "is an adapter" not in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["chat", str(tmp_path), "-q", "What?"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} is an adapter" in said
    assert "llamafactory-cli export" in said
    assert "qwen-merge split-adapter" in said


# --- videos ---


def test_a_video_is_measured_in_the_frames_that_a_server_keeps(tmp_path):
    short, long = write_clip(tmp_path / "short.mp4", 8, 8), write_clip(tmp_path / "long.mp4", 64, 8)
    assert frame_rate(short) == 8  # all frames are kept
    assert frame_rate(long) == 4  # 32 of them, in 8 seconds
    (tmp_path / "no.mp4").write_bytes(b"no video")
    assert frame_rate(tmp_path / "no.mp4") is None
    assert processor_options([]) == processor_options([tmp_path / "no.mp4"]) == {}
    assert processor_options([short, short]) == {"fps": 8}
    assert processor_options([short, tmp_path / "no.mp4", long]) == {"fps": [8, 2, 4]}


def test_in_process_a_video_s_time_is_that_of_its_frames(tmp_path, tied):
    """Four frames of one second, the fewest that qwen_vl_utils takes: half a second each pair."""
    settings = Settings(max_tokens=1, temperature=0, top_p=1, top_k=1, seed=0, thinking=True)
    answerer = InProcess(tied.merged, settings)
    clip = write_clip(tmp_path / "clip.mp4", 8, 8)
    inputs = answerer.inputs([question("What?", videos=[clip])])
    assert inputs["video_grid_thw"][:, 0].tolist() == [2]
    assert inputs["second_per_grid_ts"].tolist() == [0.5]
    assert "second_per_grid_ts" not in answerer.inputs([question("What?")])  # control: no video, no time


def test_an_answer_ends_where_the_tokenizer_says_without_a_generation_config(tied):
    answerer = InProcess(tied.merged, Settings(max_tokens=3, temperature=0, top_p=1, top_k=1, seed=0, thinking=True))
    answerer.model.generation_config.eos_token_id = None
    list(answerer.answer([question("What?")]))
    assert answerer.cut_off  # control
    inputs, tokenizer = answerer.inputs([question("What?")]), answerer.processor.tokenizer
    first = answerer.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    list(answerer.answer([question("What?")]))
    assert not answerer.cut_off
