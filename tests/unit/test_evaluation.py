"""Evaluation without a model: what is recorded and refused, the entries, the spreadsheets, the script, the overlay."""

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from qwen_merge.errors import UserError
from qwen_merge.evaluation import judge, records, vlmevalkit
from qwen_merge.evaluation.records import Question, Records, Settings
from qwen_merge.overlays import engine, manifest

REPOSITORY = Path(__file__).parents[2]


def checkpoint(folder: Path, model_type: str = "qwen2_5_vl_merge", **config) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    weights(folder)
    return folder


def weights(folder: Path, name: str = "model.safetensors", **changed: int) -> None:
    """A large tensor in which a small one drowns, as a projector does in an LLM. `changed`: other values of them."""
    import numpy
    from safetensors.numpy import save_file

    tensors = {"llm": (3000, 1000), "projector": (50, 50), "empty": (0, 4)}
    save_file(
        {tensor: numpy.full(shape, changed.get(tensor, 1), dtype=numpy.float16) for tensor, shape in tensors.items()},
        folder / name,
    )


def document(path: Path, settings: Settings | None = None, backend: str = "transformers", judge: str | None = None):
    return records.document("M", str(path), "qwen2_5_vl_merge", backend, settings or Settings(), judge)


def answered(folder: Path, settings: dict, *, reuse: bool, key: str = "k", answer: str = "A") -> Records:
    found = Records(folder, "M", reuse=reuse)
    found.open("D", settings)
    found.append("D", {"key": key, "answer": answer})
    return found


# --- settings ---


def test_the_published_settings():
    assert dataclasses.asdict(Settings()) == {
        "min_pixels": 1003520,
        "max_pixels": 12845056,
        "max_new_tokens": 8192,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "seed": 0,
        "post_process": True,
        "thinking": True,
        "use_custom_prompt": True,
    }


def test_the_same_settings_go_on(tmp_path):
    settings = document(checkpoint(tmp_path / "m"))
    answered(tmp_path, settings, reuse=False)
    again = Records(tmp_path, "M", reuse=True)
    again.open("D", settings)
    assert again.find("D", "k") == "A"
    assert again.find("D", "another") is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["settings"].update(temperature=0.0), "settings: temperature was 0.6, is 0.0"),
        (lambda d: d["settings"].update(min_pixels=1024), "settings: min_pixels was 1003520, is 1024"),
        (lambda d: d.update(backend="vllm"), "backend was 'transformers', is 'vllm'"),
        (lambda d: d["checkpoint"].update({"sampled sha256 of the weights": "x"}), "sampled sha256 of the weights was"),
    ],
)
def test_other_settings_are_refused_under_reuse(tmp_path, change, named):
    settings = document(checkpoint(tmp_path / "m"))
    answered(tmp_path, settings, reuse=False)
    other = json.loads(json.dumps(settings))
    change(other)
    with pytest.raises(UserError) as refused:
        Records(tmp_path, "M", reuse=True).open("D", other)
    assert named in str(refused.value)
    assert "--work-dir" in str(refused.value)
    Records(tmp_path, "M", reuse=True).open("D", settings)  # the control: unchanged is taken
    Records(tmp_path, "M", reuse=True).open("other data set", other)  # and another data set is another number


@pytest.mark.parametrize("changed", ["llm", "projector"])
@pytest.mark.parametrize("file", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_answers_of_another_stage_of_the_same_size_are_refused_under_reuse(tmp_path, changed, file):
    before, after, copy = (checkpoint(tmp_path / name) for name in ("stage1", "stage2", "copy"))
    for folder in (before, copy):
        weights(folder, file)
    weights(after, file, **{changed: 2})
    sizes = [[(path.name, path.stat().st_size) for path in sorted(folder.iterdir())] for folder in (before, after)]
    assert sizes[0] == sizes[1]
    answered(tmp_path, document(before), reuse=False)
    Records(tmp_path, "M", reuse=True).open("D", document(copy))  # the control: the same weights, elsewhere
    with pytest.raises(UserError, match="sampled sha256 of the weights was"):
        Records(tmp_path, "M", reuse=True).open("D", document(after))


def test_the_fingerprint_reads_little_of_a_large_file(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "m")
    whole = (path / "model.safetensors").stat().st_size
    read = 0

    class Counting(io.FileIO):
        def read(self, size=-1):
            nonlocal read
            content = super().read(size)
            read += len(content)
            return content

    monkeypatch.setattr(records, "open", lambda file, mode: Counting(file), raising=False)
    records.fingerprint(str(path))
    # The header, four blocks of the large tensor, and the small one nearly whole.
    assert 5 * records.SAMPLE_BYTES < read < 10 * records.SAMPLE_BYTES < whole / 100


def test_half_a_file_of_weights_is_named(tmp_path):
    path = checkpoint(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        records.fingerprint(str(path.parent))


def test_another_judge_or_version_is_no_other_answer(tmp_path):
    settings = document(checkpoint(tmp_path / "m"))
    answered(tmp_path, settings, reuse=False)
    later = {**settings, "judge": "gpt-4o-mini", "pins": {"vllm": "9"}}
    Records(tmp_path, "M", reuse=True).open("D", later)
    kept = json.loads((tmp_path / "M/M_D_settings.json").read_text())
    assert kept["judge"] == "gpt-4o-mini"
    assert kept["pins"] == settings["pins"]  # those that the answers were given with


def test_without_reuse_earlier_files_are_set_aside_and_nothing_else(tmp_path):
    settings = document(checkpoint(tmp_path / "m"))
    old = answered(tmp_path, settings, reuse=False)
    old.open("D_LONGER", settings)
    folder = tmp_path / "M"
    (folder / "T20250101_Gabc").mkdir()
    ours = ["M_D.xlsx", "M_D_acc.csv", "M_D_openai_result.pkl", "01_D.pkl", "T20250101_Gabc/M_D.xlsx"]
    theirs = ["M_D_LONGER.xlsx", "M_D2.xlsx", "01_DD.pkl"]
    for name in (*ours, *theirs):
        (folder / name).write_text(name)
    aside = Records(tmp_path, "M", reuse=False).set_aside("D")
    assert sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()) == sorted(
        [*ours, "M_D_settings.json", "M_D_responses.jsonl"]
    )
    assert all((folder / name).read_text() == name for name in theirs)
    assert (folder / "M_D_LONGER_settings.json").is_file()
    assert Records(tmp_path, "M", reuse=False).set_aside("D") is None


# --- answers ---


def test_a_line_that_a_kill_cut_short_is_asked_again_and_harms_no_other(tmp_path):
    settings = document(checkpoint(tmp_path / "m"))
    answered(tmp_path, settings, reuse=False, key="first")
    file = tmp_path / "M/M_D_responses.jsonl"
    with open(file, "a") as stream:
        stream.write('{"key": "second", "ans')
    again = Records(tmp_path, "M", reuse=True)
    again.open("D", settings)
    assert again.find("D", "first") == "A"
    assert again.find("D", "second") is None
    again.append("D", {"key": "third", "answer": "C"})
    last = Records(tmp_path, "M", reuse=True)
    last.open("D", settings)
    assert last.find("D", "third") == "C"
    assert json.loads(file.read_text().splitlines()[-1]) == {"key": "third", "answer": "C", "dataset": "D"}


def test_an_answer_never_ends_its_line(tmp_path):
    hard = "a\n\r\x85\u2028\u2029b"
    answered(tmp_path, document(checkpoint(tmp_path / "m")), reuse=False, answer=hard)
    (line,) = (tmp_path / "M/M_D_responses.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] == hard


def test_the_key_of_a_question_is_what_is_shown_not_where_it_lies(tmp_path):
    for name, content in (("a", b"red"), ("b", b"red"), ("c", b"blue")):
        (tmp_path / f"{name}.png").write_bytes(content)

    def key(picture: str, text: str = "What colour?", **context) -> str:
        message = [{"type": "image", "value": str(tmp_path / f"{picture}.png")}, {"type": "text", "value": text}]
        return Question.of(message, **context).key

    assert key("a") == key("b")
    assert len({key("a"), key("c"), key("a", "What shape?"), key("a", fps=2), key("a", fps=1)}) == 5


def test_each_question_has_a_seed_of_its_own_that_the_run_s_seed_changes():
    assert Settings().seed_of("k") == Settings().seed_of("k")
    assert len({Settings().seed_of("k"), Settings().seed_of("l"), Settings(seed=1).seed_of("k")}) == 3


# --- the checkpoint ---


def test_the_model_type_decides_and_not_the_path(tmp_path):
    named_otherwise = checkpoint(tmp_path / "plain")
    assert records.model_type_of(str(named_otherwise)) == "qwen2_5_vl_merge"
    misleading = checkpoint(tmp_path / "Qwen-Merge-VL-4B-merger", "qwen2_5_vl")
    with pytest.raises(UserError, match=r"model_type 'qwen2_5_vl'; .* expect 'qwen2_5_vl_merge'"):
        records.model_type_of(str(misleading))


def test_a_graft_s_pictures_have_the_sizes_of_its_own_processor(tmp_path):
    path = checkpoint(tmp_path / "m", "qwen_merge_graft")
    assert records.model_type_of(str(path)) == "qwen_merge_graft"

    def recorded(model_type: str) -> tuple[int, int]:
        settings = records.document("M", str(path), model_type, "vllm", Settings(), None)["settings"]
        return settings["min_pixels"], settings["max_pixels"]

    with pytest.raises(UserError, match=r"preprocessor_config\.json does not say how large pictures are"):
        recorded("qwen_merge_graft")
    (path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 784, "max_pixels": 12544}))
    assert recorded("qwen_merge_graft") == (784, 12544)
    assert recorded("qwen2_5_vl_merge") == (1003520, 12845056)  # control: the published setting


@pytest.mark.parametrize(("make", "seen"), [(False, "there is no such folder"), (True, "has no config.json")])
def test_a_missing_checkpoint_is_named(tmp_path, make, seen):
    if make:
        (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=seen):
        records.model_type_of(str(tmp_path / "m"))


# --- VLMEvalKit's command line ---


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """Run `configure` on a command line, with a stand-in for VLMEvalKit's table of models."""
    table: dict = {}
    for name, module in (("vlmeval", types.ModuleType("vlmeval")), ("vlmeval.config", types.ModuleType("config"))):
        module.__dict__.update(supported_VLM=table)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("QWEN_MERGE_ENDPOINT", raising=False)
    monkeypatch.delenv("MMEVAL_ROOT", raising=False)
    monkeypatch.setattr(vlmevalkit, "keep_whole_answers", lambda: None)
    monkeypatch.setattr(judge, "settle", lambda args: None)

    def run(*arguments: str) -> dict:
        parser = argparse.ArgumentParser()
        for option in ("--data", "--model"):
            parser.add_argument(option, nargs="+")
        for option in ("--config", "--judge", "--mode"):
            parser.add_argument(option)
        parser.add_argument("--work-dir", default=str(tmp_path / "work"))
        for option in ("--reuse", "--use-vllm"):
            parser.add_argument(option, action="store_true")
        vlmevalkit.add_arguments(parser)
        vlmevalkit.configure(parser.parse_args(arguments))
        return {name: entry.keywords for name, entry in table.items()}

    return run


def test_the_four_entries(configure, tmp_path):
    path = str(checkpoint(tmp_path / "m"))
    entries = configure("--data", "D", "--model", "Qwen-Merge-VL-8B", "--model-path", path, "--use-vllm")
    assert list(entries) == [
        "Qwen-Merge-VL-4B",
        "Qwen-Merge-VL-4B-matched",
        "Qwen-Merge-VL-8B",
        "Qwen-Merge-VL-8B-matched",
    ]
    assert entries["Qwen-Merge-VL-8B"]["settings"] == Settings()
    assert entries["Qwen-Merge-VL-8B"]["model_path"] == path
    assert all(entry["use_vllm"] for entry in entries.values())
    assert entries["Qwen-Merge-VL-4B"]["model_path"] == "outputs/Qwen-Merge-VL-4B-stage3"
    matched = entries["Qwen-Merge-VL-8B-matched"]["settings"]
    assert (matched.min_pixels, matched.max_pixels, matched.temperature) == (1024, 262144, 0.6)


def test_greedy_and_seed(configure, tmp_path):
    path = str(checkpoint(tmp_path / "m"))
    line = ("--data", "D", "--model", "Qwen-Merge-VL-4B", "--model-path", path, "--temperature", "0", "--seed", "7")
    assert configure(*line)["Qwen-Merge-VL-4B"]["settings"] == Settings(temperature=0.0, seed=7)


def test_other_models_are_left_alone(configure):
    assert len(configure("--data", "D", "--model", "Qwen2.5-VL-7B-Instruct")) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "Qwen-Merge-VL-4B", "Qwen-Merge-VL-8B", "--model-path", "x"], "exactly one Qwen-Merge entry"),
        (["--model", "GPT4o", "--model-path", "x"], "names 0"),
        (["--model", "Qwen-Merge-VL-4B", "--model-path", "x", "--temperature", "-1"], "-1.0 is negative"),
        (["--model", "Qwen-Merge-VL-4B", "--use-vllm", "--endpoint", "http://x"], "leave one of them out"),
        (["--model", "Qwen-Merge-VL-4B", "--model-path", "x"], "there is no such folder"),
    ],
)
def test_contradictions_end_with_one_message_and_exit_code_2(configure, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        configure("--data", "D", *arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_other_settings_are_refused_before_anything_is_loaded(configure, capsys, tmp_path):
    path = str(checkpoint(tmp_path / "m"))
    line = ["--data", "D", "--model", "Qwen-Merge-VL-4B", "--model-path", path]
    settings = records.document("Qwen-Merge-VL-4B", path, "qwen2_5_vl_merge", "transformers", Settings(), None)
    Records(tmp_path / "work", "Qwen-Merge-VL-4B", reuse=False).open("D", settings)
    configure(*line, "--reuse")  # the control
    with pytest.raises(SystemExit) as stopped:
        configure(*line, "--reuse", "--seed", "1")
    assert stopped.value.code == 2
    assert "settings: seed was 0, is 1" in capsys.readouterr().err
    configure(*line, "--seed", "1")  # without --reuse: asked anew, the old files set aside
    assert not (tmp_path / "work/Qwen-Merge-VL-4B/Qwen-Merge-VL-4B_D_settings.json").exists()
    assert list((tmp_path / "work/set-aside").rglob("Qwen-Merge-VL-4B_D_settings.json"))


def test_the_judge_of_answers_that_are_there_is_noted(configure, tmp_path):
    """VLMEvalKit scores finished predictions without asking the model, which would write the settings."""
    path = str(checkpoint(tmp_path / "m"))
    settings = records.document("Qwen-Merge-VL-4B", path, "qwen2_5_vl_merge", "transformers", Settings(), "a")
    Records(tmp_path / "work", "Qwen-Merge-VL-4B", reuse=False).open("D", settings)
    line = ["--data", "D", "--model", "Qwen-Merge-VL-4B", "--model-path", path, "--reuse", "--judge", "gpt-4o-mini"]

    def recorded() -> str:
        file = tmp_path / "work/Qwen-Merge-VL-4B/Qwen-Merge-VL-4B_D_settings.json"
        return json.loads(file.read_text())["judge"]

    configure(*line, "--mode", "infer")  # the control: nobody judges
    assert recorded() == "a"
    configure(*line)
    assert recorded() == "gpt-4o-mini"


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        ("http://localhost:8001/v1", "http://localhost:8001/v1/chat/completions"),
        ("http://localhost:8001/v1/", "http://localhost:8001/v1/chat/completions"),
        ("http://localhost:8001", "http://localhost:8001/v1/chat/completions"),
        ("https://gate.way/openai/v1/chat/completions", "https://gate.way/openai/v1/chat/completions"),
        ("https://gate.way/chat?version=2", "https://gate.way/chat?version=2"),
        ("OFFICIAL", "OFFICIAL"),
        ("", ""),
    ],
)
def test_the_judge_s_address_is_completed(monkeypatch, given, completed):
    monkeypatch.setenv("OPENAI_API_BASE", given)
    for _ in range(2):  # what is complete stays
        judge.complete_address()
        assert os.environ["OPENAI_API_BASE"] == completed


def test_a_judge_s_address_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_API_BASE", "localhost:8001/v1")
    with pytest.raises(UserError, match=r"OPENAI_API_BASE is 'localhost:8001/v1', no address of a judge"):
        judge.complete_address()


# --- spreadsheets ---

HARD = [
    "x" * 40_000 + " B",
    "",
    "None",
    "N/A",
    "=2",
    "3",
    "007",
    "a\rb\x01",
    "https://a.b/" + "c" * 3000,
    "B",
]


def through_a_spreadsheet(file: Path) -> tuple[list, list]:
    import pandas

    frame = pandas.DataFrame({"index": range(len(HARD)), "A": [None] * len(HARD), "prediction": HARD})
    frame.to_excel(file, index=False, engine="xlsxwriter")  # as VLMEvalKit writes and reads
    back = pandas.read_excel(file)
    return list(back["prediction"]), list(back["A"].isna())


def test_answers_survive_the_spreadsheet_whole(tmp_path, monkeypatch):
    import pandas
    import xlsxwriter.worksheet

    for owner, name in (
        (xlsxwriter.worksheet.Worksheet, "__init__"),
        (xlsxwriter.Workbook, "__init__"),
        (pandas, "read_excel"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    cut, _ = through_a_spreadsheet(tmp_path / "before.xlsx")  # the control: the loss is real
    assert len(cut[0]) == 32767
    assert str(cut[1]) == str(cut[2]) == str(cut[3]) == "nan"
    for _ in range(2):  # safe to call again
        vlmevalkit.keep_whole_answers()
    kept, empty_options = through_a_spreadsheet(tmp_path / "after.xlsx")
    assert kept == HARD
    assert all(empty_options), "an option that is not there must stay away"


# --- the script ---


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "usage: scripts/eval.sh"),
        (["/nowhere"], {}, "it has no config.json"),
        (["MERGED"], {"BACKEND": "cuda"}, "BACKEND=cuda is not vllm, transformers or endpoint"),
        (["MERGED"], {"BACKEND": "endpoint"}, "QWEN_MERGE_ENDPOINT"),
        (["MERGED"], {"MODEL_NAME": "Qwen"}, "MODEL_NAME=Qwen is none of"),
        (["MERGED"], {"SEED": "x"}, "SEED=x is not a number"),
        (["OTHER"], {}, '"model_type": "qwen2_5_vl"'),
    ],
)
def test_the_script_refuses_what_cannot_work(tmp_path, arguments, environment, said):
    paths = {"MERGED": checkpoint(tmp_path / "m"), "OTHER": checkpoint(tmp_path / "o", "qwen2_5_vl")}
    names = ("BACKEND", "MODEL_NAME", "SEED", "QWEN_MERGE_ENDPOINT")
    result = subprocess.run(
        [str(REPOSITORY / "scripts/eval.sh"), *(str(paths.get(argument, argument)) for argument in arguments)],
        env={**{k: v for k, v in os.environ.items() if k not in names}, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 2
    assert said in result.stderr


# --- the overlay ---


@pytest.fixture
def installed(tmp_path) -> Path:
    """As much of the installed VLMEvalKit as the overlay looks at, without the overlay."""
    spec = importlib.util.find_spec("vlmeval")
    if spec is None:
        pytest.skip("VLMEvalKit is not installed")
    source, package = Path(next(iter(spec.submodule_search_locations))), tmp_path / "site/vlmeval"
    for name in ("__init__.py", "run.py", "dataset/__init__.py", engine.RECORD):
        if (source / name).is_file():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, package / name)
    engine.revert(manifest.load("vlmevalkit"), package)
    return package


def test_the_overlay_on_the_installed_release(installed):
    overlay = manifest.load("vlmevalkit")
    before = (installed / "run.py").read_bytes()
    assert manifest.find_package("vlmevalkit", installed.parent) == installed
    assert overlay.release_of(installed).version == "0.0.18"
    engine.apply(overlay, installed)
    after = (installed / "run.py").read_text()
    assert "qwen_merge.add_arguments(parser)" in after
    assert "qwen_merge.configure(args)" in after
    compile(after, "run.py", "exec")
    engine.revert(overlay, installed)
    assert (installed / "run.py").read_bytes() == before
    assert not (installed / engine.RECORD).exists()


def test_the_overlay_in_a_checkout_touches_the_runner_beside_the_package(installed, tmp_path):
    """The commit's own run.py, made from the release's: the part that the overlay touches is the same."""
    overlay = manifest.load("vlmevalkit")
    package = installed
    names = package / "dataset/__init__.py"
    names.write_text(names.read_text().replace("VideoMMLU_CAP", "Video_MMLU_CAP"))
    runner = package.parent / "run.py"
    (package / "run.py").rename(runner)
    assert overlay.release_of(package).version == "0.2rc1"
    assert [file.path for file in engine.plan(overlay, package)] == ["../run.py"]
    with pytest.raises(UserError, match=r"run\.py"):  # not the commit's bytes, so it is left alone
        engine.apply(overlay, package)
