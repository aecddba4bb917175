"""The report: every number where it belongs, none beside one made under other settings, and nobody's text as markup.

Each proof has a control: the same folder with one thing changed, for which the opposite must hold. The layout is
checked in headless Chromium where there is one (Debian's package `chromium`).
"""

import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwen_merge.cli import main
from qwen_merge.errors import UserError
from qwen_merge.report.charts import bins, log_ticks, ticks
from qwen_merge.report.losses import logarithmic, read_training, smoothed
from qwen_merge.report.published import BY_DATASET, PUBLISHED, SETTINGS, TASKS
from qwen_merge.report.responses import choose, lengths, read_responses, thought_of
from qwen_merge.report.results import read_run
from qwen_merge.report.scores import read_score
from qwen_merge.report.table import arrange, build
from qwen_merge.report.write import read_all

MODEL = "Qwen-Merge-VL-4B"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PUBLISHED_4B = "Qwen-Merge-VL-4B-stage3"


def write_csv(file: Path, rows: list[dict]) -> None:
    """As VLMEvalKit's dump: every field quoted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, rows[0].keys(), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def options(folder: Path, dataset: str, fraction: float, split: str = "none") -> None:
    write_csv(folder / f"{folder.name}_{dataset}_acc.csv", [{"split": split, "Overall": fraction, "math": 0.1}])


def settings(folder: Path, dataset: str, judge: str | None = "chatgpt-0125", pins=None, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model": folder.name,
        "model_path": "outputs/stage3",
        "model_type": "qwen2_5_vl_merge",
        "backend": "vllm",
        "settings": SETTINGS | {"seed": 0} | changes,
        "judge": judge,
        "pins": pins or {"vllm": "0.9.1"},
        "checkpoint": {"sha256": "abc"},
    }
    (folder / f"{folder.name}_{dataset}_settings.json").write_text(json.dumps(content))


def answered(folder: Path, dataset: str, answers: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{folder.name}_{dataset}_responses.jsonl"
    lines = []
    for number, answer in enumerate(answers):
        whole = {"key": str(number), "dataset": dataset, "question": f"question {number}?", "images": []}
        whole |= {"response": "<think>hm</think>A", "closed": True, "answer": "A", "tokens": 10, "thought_tokens": 5}
        lines.append(json.dumps(whole | answer, ensure_ascii=False))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def table_of(*folders: Path, split: bool = False):
    return build(arrange(read_all(folders)[0], split))


def cell_of(table, task: str, column: int = 0):
    return next(row.cells[column] for row in table.rows if row.name == task)


def page_of(tmp_path: Path, *arguments: object) -> str:
    output = tmp_path / "page.html"
    assert main(["report", *map(str, arguments), "--output", str(output)]) == 0
    return output.read_text(encoding="utf-8").replace("<wbr>", "")  # where names may break


class Elements(HTMLParser):
    """Tags and attributes as a browser would see them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


# The published table


def test_the_published_table_is_the_published_one():
    assert len(TASKS) == 13
    assert PUBLISHED[PUBLISHED_4B]["ScienceQA_VAL"] == 91.13
    assert PUBLISHED["Qwen2.5-VL-7B-Instruct"]["OCRBench"] == 88.2
    assert PUBLISHED["Qwen-Merge-VL-8B-stage3"]["VisOnlyQA-VLMEvalKit"] == 44.18
    assert PUBLISHED[PUBLISHED_4B]["MathVista_MINI"] == 66.40  # corrected from 45.81
    assert PUBLISHED["Qwen-Merge-VL-8B-stage3"]["MathVista_MINI"] == 67.90  # corrected from 53.05


# Score files


def write_all_kinds(folder: Path) -> dict[str, float]:
    """One file of each form as VLMEvalKit writes it, with the number it holds."""
    name = folder.name
    options(folder, "MMStar", 0.6246)
    write_csv(
        folder / f"{name}_MMMU_DEV_VAL_acc.csv",
        [{"split": "validation", "Overall": 0.51, "Art": 0.5}, {"split": "dev", "Overall": 82 / 150, "Art": 0.4}],
    )
    write_csv(folder / f"{name}_ChartQA_TEST_acc.csv", [{"test_human": 60.0, "test_augmented": 72.0, "Overall": 66.0}])
    write_csv(folder / f"{name}_TextVQA_VAL_acc.csv", [{"Overall": 69.1}])
    (folder / f"{name}_OCRBench_score.json").write_text(json.dumps({"Final Score": 748, "Final Score Norm": 74.8}))
    skills = [{"tot": 1000, "prefetch": 1, "hit": 664, "acc": 66.4}, {"tot": 5, "prefetch": 0, "hit": 1, "acc": 20.0}]
    for dataset, label, judge in (
        ("MathVista_MINI", "Task&Skill", "gpt-4o-mini"),
        ("MathVision_MINI", "Subject", "gpt-4o-mini"),
        ("LogicVista", "Task&Skill", "gpt4o-mini"),
    ):
        rows = [{label: kind} | values for kind, values in zip(("Overall", "algebra"), skills, strict=True)]
        write_csv(folder / f"{name}_{dataset}_{judge}_score.csv", rows[::-1])
    write_csv(
        folder / f"{name}_MMVet_gpt-4-turbo_score.csv",
        [{"Category": "rec", "tot": 9, "acc": 1.0}, {"Category": "Overall", "tot": 218, "acc": 25.9}],
    )
    write_csv(folder / f"{name}_MMVet_gpt-4-turbo_score_fine.csv", [{"Category": "Overall", "tot": 218, "acc": 99.0}])
    return {
        "MMStar": 62.46,
        "MMMU_DEV_VAL [dev]": 100 * 82 / 150,
        "MMMU_DEV_VAL [validation]": 51.0,
        "ChartQA_TEST": 66.0,
        "TextVQA": 69.1,
        "OCRBench": 74.8,
        "MathVista_MINI": 66.4,
        "MathVision_MINI": 66.4,
        "LogicVista": 66.4,
        "MMVet": 25.9,
    }


def test_each_form_of_score_file_gives_its_number(tmp_path):
    expected = write_all_kinds(tmp_path / MODEL)
    table = table_of(tmp_path / MODEL)
    assert {row.name: row.cells[0].value for row in table.rows} == pytest.approx(expected)
    assert cell_of(table, "MathVista_MINI").answers == 1000  # from `tot`
    assert cell_of(table, "LogicVista").judge == "judge gpt-4o-mini"
    assert cell_of(table, "OCRBench").judge == "scored by rule"


@pytest.mark.parametrize("name", ["MMStar_acc.csv", "ChartQA_TEST_acc.csv", "OCRBench_score.json"])
def test_a_score_file_without_its_number_is_refused(tmp_path, name):
    folder = tmp_path / MODEL
    write_all_kinds(folder)
    file = folder / f"{MODEL}_{name}"
    file.write_text(file.read_text().replace("Overall", "Total").replace("Final Score Norm", "Norm"))
    with pytest.raises(UserError, match=f"{name}(.|\n)* has no"):
        table_of(folder)


def test_a_form_that_is_not_known_gives_no_number_rather_than_a_guess(tmp_path):
    file = tmp_path / "own_acc.csv"
    write_csv(file, [{"split": "a", "Overall": 61.0}])
    assert read_score(file, None) == ({}, None)
    write_csv(file, [{"split": "none", "Overall": 0.61}])
    assert read_score(file, None)[0] == {None: pytest.approx(61.0)}


def test_a_custom_data_set_is_shown_without_a_published_number(tmp_path):
    options(tmp_path / MODEL, "my_own_set", 0.5)
    options(tmp_path / MODEL, "MMStar", 0.6246)
    table = table_of(tmp_path / MODEL)
    own, known = table.rows[1], table.rows[0]
    assert (own.name, own.cells[0].value, own.published) == ("my_own_set", 50.0, [None] * 4)
    assert own.cells[0].difference is None
    assert known.published == [56.40, 64.27, 60.46, 61.86]


def test_names_that_begin_alike_keep_their_own_files(tmp_path):
    folder = tmp_path / MODEL
    for dataset, value in (("MMVet", 25.0), ("MMVet_Hard", 11.0)):
        rows = [{"Category": "Overall", "tot": 4, "acc": value}]
        write_csv(folder / f"{MODEL}_{dataset}_gpt-4-turbo_score.csv", rows)
        (folder / f"{MODEL}_{dataset}.xlsx").touch()
        (folder / f"{MODEL}_{dataset}_gpt-4-turbo.xlsx").touch()
    options(folder, "MMStar_MINI", 0.3)
    assert {e.dataset: e.numbers[None] for e in read_run(folder).evaluations} == pytest.approx(
        {"MMVet": 25.0, "MMVet_Hard": 11.0, "MMStar_MINI": 30.0}
    )


def test_scores_by_two_judges_need_a_word_which_is_meant(tmp_path):
    folder = tmp_path / MODEL
    for judge, value in (("gpt-4-turbo", 25.0), ("chatgpt-0125", 31.0)):
        rows = [{"Category": "Overall", "tot": 4, "acc": value}]
        write_csv(folder / f"{MODEL}_MMVet_{judge}_score.csv", rows)
    with pytest.raises(UserError, match="several scores of MMVet"):
        read_run(folder)
    settings(folder, "MMVet", judge="chatgpt-0125")
    assert read_run(folder).evaluations[0].numbers == {None: 31.0}


def test_dated_folders_and_their_links(tmp_path):
    """VLMEvalKit 21b00fa: files below T..., linked into the model's folder once evaluated; the newest counts."""
    folder = tmp_path / MODEL
    for day, value in (("T20250101_Gaaaaaaaa", 0.1), ("T20250301_Gbbbbbbbb", 0.3), ("T20250201_Gcccccccc", 0.2)):
        write_csv(folder / day / f"{MODEL}_MMStar_acc.csv", [{"split": "none", "Overall": value}])
    assert read_run(folder).evaluations[0].numbers == {None: pytest.approx(30.0)}
    linked = folder / "T20250201_Gcccccccc" / f"{MODEL}_MMStar_acc.csv"
    (folder / linked.name).symlink_to(linked)
    settings_file = linked.parent / f"{MODEL}_MMStar_settings.json"
    settings(folder, "MMStar", temperature=0.0)
    (folder / settings_file.name).rename(settings_file)
    evaluation = read_run(folder).evaluations[0]
    assert evaluation.numbers == {None: pytest.approx(20.0)}
    assert evaluation.settings["settings"]["temperature"] == 0.0  # lies beside the file, not beside the link
    (folder / linked.name).unlink()
    (folder / linked.name).symlink_to(tmp_path / "moved away")
    assert read_run(folder).evaluations[0].numbers == {None: pytest.approx(30.0)}
    assert read_run(folder / "T20250101_Gaaaaaaaa").model == MODEL


def test_answers_are_counted_in_the_prediction_file_where_nothing_else_says(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl")
    folder = tmp_path / MODEL
    options(folder, "MMStar", 0.5)
    pandas.DataFrame({"index": range(37), "prediction": ["<row A"] * 37}).to_excel(
        folder / f"{MODEL}_MMStar.xlsx", index=False
    )
    assert read_run(folder).evaluations[0].answers == 37


@pytest.mark.slow
def test_vlmevalkit_itself_writes_what_is_read(tmp_path, monkeypatch):
    """The forms above, made by VLMEvalKit's own functions from answers whose score is known."""
    pandas = pytest.importorskip("pandas")
    monkeypatch.setenv("LMUData", str(tmp_path / "data"))
    pytest.importorskip("vlmeval")
    from vlmeval.dataset.image_vqa import ImageVQADataset, OCRBench
    from vlmeval.dataset.utils.logicvista import evaluate_logicvista
    from vlmeval.dataset.utils.mathv import MATH_V_acc
    from vlmeval.dataset.utils.mathvista import MathVista_acc
    from vlmeval.dataset.utils.mmvet import MMVet_acc
    from vlmeval.dataset.utils.multiple_choice import report_acc
    from vlmeval.smp import dump

    folder = tmp_path / MODEL
    folder.mkdir()

    def at(rest: str) -> str:
        return str(folder / f"{MODEL}_{rest}")

    hits = pandas.DataFrame({"hit": [1, 0, 0, 1, 1], "category": list("xxyyy"), "split": ["dev"] * 2 + ["val"] * 3})
    dump(report_acc(hits), at("MMMU_DEV_VAL_acc.csv"))
    dump(report_acc(hits.drop(columns="split")), at("MMStar_acc.csv"))

    judged = {"res": ["1", "2", "9", "4"], "answer": ["1", "2", "3", "4"], "log": ["Prefetch succeed"] * 4}
    judged |= {"question_type": ["free_form"] * 4, "answer_type": ["integer"] * 4, "choices": ["[]"] * 4}
    math = pandas.DataFrame(judged | {"task": ["t"] * 4, "skills": ["['s']"] * 4, "category": ["c"] * 4})
    dump(math, at("MathVista_MINI_gpt-4o-mini.xlsx"))
    dump(MathVista_acc(at("MathVista_MINI_gpt-4o-mini.xlsx")), at("MathVista_MINI_gpt-4o-mini_score.csv"))
    dump(MATH_V_acc(at("MathVista_MINI_gpt-4o-mini.xlsx")), at("MathVision_MINI_gpt-4o-mini_score.csv"))

    skills = ["inductive", "deductive", "numerical", "spatial", "mechanical"]
    dump(pandas.DataFrame({"skill": skills, "hit": [1, 1, 0, 0, 0]}), at("LogicVista_gpt4o-mini.xlsx"))
    dump(evaluate_logicvista(at("LogicVista_gpt4o-mini.xlsx")), at("LogicVista_gpt4o-mini_score.csv"))

    capabilities = ["rec,ocr", "know,gen", "spat,math"]
    dump(pandas.DataFrame({"category": capabilities, "score": [1, 0.5, 0]}), at("MMVet_gpt-4-turbo.xlsx"))
    score, fine = MMVet_acc(at("MMVet_gpt-4-turbo.xlsx"))
    dump(score, at("MMVet_gpt-4-turbo_score.csv"))
    dump(fine, at("MMVet_gpt-4-turbo_score_fine.csv"))

    kinds = ["Regular Text Recognition", "Doc-oriented VQA"]
    ocr = {"index": [0, 1], "prediction": ["HELLO", "no"], "answer": ["['hello']", "['yes']"], "category": kinds}
    dump(pandas.DataFrame(ocr), at("OCRBench.xlsx"))
    OCRBench.evaluate(at("OCRBench.xlsx"))

    chart = {"index": range(4), "prediction": ["10", "20", "x", "7"], "answer": ["10", "20", "5", "1"]}
    dump(pandas.DataFrame(chart | {"split": ["human"] * 2 + ["augmented"] * 2}), at("ChartQA_TEST.xlsx"))
    dataset = ImageVQADataset.__new__(ImageVQADataset)
    dataset.dataset_name = "ChartQA_TEST"
    dataset.evaluate(at("ChartQA_TEST.xlsx"))

    assert {row.name: row.cells[0].value for row in table_of(folder).rows} == pytest.approx(
        {
            "MMMU_DEV_VAL [dev]": 50.0,
            "MMMU_DEV_VAL [val]": 200 / 3,
            "MMStar": 60.0,
            "MathVista_MINI": 75.0,
            "MathVision_MINI": 75.0,
            "LogicVista": 40.0,
            "MMVet": 50.0,
            "OCRBench": 0.1,
            "ChartQA_TEST": 50.0,
        }
    )
    answers = {e.dataset: e.answers for e in read_run(folder).evaluations}
    assert (answers["ChartQA_TEST"], answers["MathVista_MINI"], answers["OCRBench"]) == (4, 4, 2)


# Differences


def complete(folder: Path, dataset: str = "MMStar", fraction: float = 0.6246, **changes) -> None:
    """A whole data set, made with the published settings unless `changes` say otherwise."""
    options(folder, dataset, fraction)
    settings(folder, dataset, **changes)
    answered(folder, dataset, [{}] * BY_DATASET[dataset].questions)


def test_a_difference_counts_under_the_published_settings(tmp_path):
    complete(tmp_path / MODEL)
    cell = cell_of(table_of(tmp_path / MODEL), "MMStar")
    assert (cell.shown, cell.shown_difference, cell.comparable, cell.notes) == ("62.46", "+2.00", True, [])
    page = page_of(tmp_path, tmp_path / MODEL)
    assert '<span class="difference good">+2.00</span>' in page
    complete(tmp_path / MODEL, fraction=0.5946)
    assert '<span class="difference bad">−1.00</span>' in page_of(tmp_path, tmp_path / MODEL)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"min_pixels": 200704}, "not the published setting: min_pixels 200704, published 1003520"),
        ({"judge": "exact_matching"}, "not the published setting: judge exact_matching, published chatgpt-0125"),
        ({"thinking": None}, "not the published setting: thinking not stated, published true"),
    ],
)
def test_a_difference_under_other_settings_is_grey_and_says_why(tmp_path, changes, reason):
    complete(tmp_path / MODEL, **changes)
    cell = cell_of(table_of(tmp_path / MODEL), "MMStar")
    assert (cell.shown_difference, cell.comparable, cell.notes) == ("+2.00", False, [reason])
    page = page_of(tmp_path, tmp_path / MODEL)
    assert '<span class="difference low">(+2.00)</span>' in page
    assert 'class="difference good"' not in page
    assert html.escape(reason) in page


def test_a_seed_of_ones_own_is_no_other_setting(tmp_path):
    complete(tmp_path / MODEL, seed=7)
    assert cell_of(table_of(tmp_path / MODEL), "MMStar").comparable


def test_a_number_without_settings_says_so(tmp_path):
    options(tmp_path / MODEL, "MMStar", 0.6246)
    table = table_of(tmp_path / MODEL)
    assert cell_of(table, "MMStar").notes == ["settings unknown"]
    assert not cell_of(table, "MMStar").comparable
    assert table.columns[0].warnings == ["settings unknown"]
    assert "settings unknown" in page_of(tmp_path, tmp_path / MODEL)


def test_a_part_of_a_data_set_is_not_compared_with_the_whole(tmp_path):
    complete(tmp_path / MODEL)
    answered(tmp_path / MODEL, "MMStar", [{}] * 100)
    cell = cell_of(table_of(tmp_path / MODEL), "MMStar")
    assert (cell.comparable, cell.notes) == (False, ["100 of 1500 questions: not comparable"])


def test_a_question_asked_twice_is_no_missing_one(tmp_path):
    """One answer serves both, so a whole data set can have fewer answers than questions; its score file knows."""
    folder = tmp_path / MODEL
    rows = [{"Subject": "Overall", "tot": 304, "acc": 30.0}]
    write_csv(folder / f"{MODEL}_MathVision_MINI_chatgpt-0125_score.csv", rows)
    settings(folder, "MathVision_MINI")
    answered(folder, "MathVision_MINI", [{}] * 300)
    cell = cell_of(table_of(folder), "MathVision_MINI")
    assert (cell.answers, cell.comparable) == (304, True)
    write_csv(folder / f"{MODEL}_MathVision_MINI_chatgpt-0125_score.csv", [rows[0] | {"tot": 300}])
    assert not cell_of(table_of(folder), "MathVision_MINI").comparable


@pytest.mark.parametrize(
    ("model", "difference", "comparable"),
    [
        ("Qwen-Merge-VL-8B", "+0.60", True),
        ("mine-4b-rlvr", "+2.00", True),
        ("Qwen2.5-VL-7B-Instruct", "−1.81", False),  # how the published 7B was asked is not stated
        ("Qwen-Merge-VL-14B", "", False),
        ("nameless", "", False),
    ],
)
def test_the_published_model_of_the_same_size_is_the_measure(tmp_path, model, difference, comparable):
    complete(tmp_path / model)
    cell = cell_of(table_of(tmp_path / model), "MMStar")
    assert (cell.shown_difference, cell.comparable) == (difference, comparable)


def test_what_was_answered_and_not_scored_has_no_number(tmp_path):
    folder = tmp_path / MODEL
    settings(folder, "LogicVista")
    answered(folder, "LogicVista", [{}] * 5)
    cell = cell_of(table_of(folder), "LogicVista")
    assert (cell.shown, cell.shown_difference, cell.answers, cell.notes) == ("—", "", 5, ["answered, not scored"])


# Columns


def test_different_settings_do_not_share_a_column(tmp_path, capsys):
    folder = tmp_path / MODEL
    complete(folder, "MMStar")
    complete(folder, "MathVision_MINI", temperature=0.0, pins={"vllm": "0.9.2"})
    write_csv(
        folder / f"{MODEL}_MathVision_MINI_chatgpt-0125_score.csv", [{"Subject": "Overall", "tot": 304, "acc": 30.0}]
    )
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "temperature: 0.6 (MMStar); 0.0 (MathVision_MINI)" in said
    assert "pins.vllm: 0.9.1 (MMStar); 0.9.2 (MathVision_MINI)" in said
    assert "--split-by-settings" in said
    assert "top_p" not in said
    assert not (tmp_path / "page.html").exists()

    table = table_of(folder, split=True)
    assert [column.label for column in table.columns] == [f"{MODEL} [1]", f"{MODEL} [2]"]
    assert [cell is None for row in table.rows for cell in row.cells] == [False, True, True, False]
    assert table.columns[1].warnings == ["not the published setting: temperature 0.0"]

    settings(folder, "MathVision_MINI")  # the control: equal settings share one
    assert len(table_of(folder).columns) == 1


def test_one_judge_for_all_that_one_judge_scores(tmp_path):
    folder = tmp_path / MODEL
    complete(folder, "MMStar")
    complete(folder, "AI2D_TEST", judge="exact_matching")
    with pytest.raises(UserError, match=r"judge: exact_matching \(AI2D_TEST\); chatgpt-0125 \(MMStar\)"):
        table_of(folder)
    assert len(table_of(folder, split=True).columns) == 2
    complete(folder, "AI2D_TEST", judge=None)  # left to VLMEvalKit, which says which one in a file name only
    (folder / f"{MODEL}_AI2D_TEST_openai_result.xlsx").touch()
    assert cell_of(table_of(folder), "AI2D_TEST").comparable
    (folder / f"{MODEL}_AI2D_TEST_openai_result.xlsx").rename(folder / f"{MODEL}_AI2D_TEST_exact_matching_result.xlsx")
    with pytest.raises(UserError, match="judge: exact_matching"):
        table_of(folder)
    complete(folder, "AI2D_TEST")
    settings(folder, "OCRBench", judge=None)  # scored by rule
    (folder / f"{MODEL}_OCRBench_score.json").write_text('{"Final Score Norm": 74.8}')
    settings(folder, "MMVet", judge="gpt-4-turbo")  # by its own judge
    write_csv(folder / f"{MODEL}_MMVet_gpt-4-turbo_score.csv", [{"Category": "Overall", "tot": 218, "acc": 25.9}])
    assert len(table_of(folder).columns) == 1


def test_runs_of_one_name_are_told_apart_and_differ_freely(tmp_path):
    complete(tmp_path / "before" / MODEL)
    complete(tmp_path / "after" / MODEL, temperature=0.0)
    table = table_of(tmp_path / "before", tmp_path / "after")
    assert [column.label for column in table.columns] == [f"before/{MODEL}", f"after/{MODEL}"]
    assert table_of(tmp_path / "before").columns[0].label == MODEL


# Page and Markdown


def test_markdown_and_page_hold_the_same_numbers(tmp_path):
    folder = tmp_path / MODEL
    expected = write_all_kinds(folder)
    page = page_of(tmp_path, folder, "--markdown", tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    rows = rows[: len(expected)]  # the second table counts answers
    from_markdown = {row[0].replace("\\", ""): [re.match(r"[\d.]*", cell)[0] for cell in row[1:]] for row in rows}
    from_page = {}
    for row in re.findall(r"<tr><th>([^<]*)</th>(.*?)</tr>", page.split("<tbody>")[1]):
        cells = re.findall(r'<td(?: class="low")?>(?:<span class="value">)?([\d.]*)', row[1])
        from_page[row[0]] = cells
    assert from_page == from_markdown
    assert {name: float(cells[0]) for name, cells in from_page.items()} == pytest.approx(expected, abs=0.005)
    assert from_page["MMStar"][1:] == ["56.40", "64.27", "60.46", "61.86"]
    differences = re.findall(r"\(([+−][\d.]+)\)", "\n".join(lines))
    assert differences == re.findall(r'class="difference low">\(([+−][\d.]+)\)', page)
    assert len(differences) == 9


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' & <!-- CURVES --> \u202eevil\x00 \\1 答案是三"


def test_other_peoples_text_stays_text(tmp_path):
    for name in ("a-4B", "b<i>|x-4B"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        options(tmp_path / name, "<b>set", 0.5)
        said = {"question": HOSTILE, "response": f"<think>{HOSTILE}</think>{HOSTILE}", "answer": HOSTILE + name}
        answered(tmp_path / name, "<b>set", [said | {"images": [HOSTILE, "x" * 5000, "cut.png"]}])
    page = page_of(tmp_path, tmp_path / "a-4B", tmp_path / "b<i>|x-4B", "--markdown", tmp_path / "table.md")
    elements = Elements(page)
    assert not {"script", "img", "i", "iframe", "link"} & set(elements.tags)
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name in ("href", "src")]
    assert "<script>alert(1)</script>" in elements.text  # the control: it is shown
    assert "答案是三" in page
    assert "\u202e" not in page
    assert "\x00" not in page
    assert "<!-- CURVES -->" not in page
    table = (tmp_path / "table.md").read_text()
    assert "<b>" not in table
    first = table.split("\n\n")[0].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in first} == {4}
    assert "published" not in first[0], "nothing is published about a table of one's own"


def test_the_page_asks_for_nothing(tmp_path):
    complete(tmp_path / MODEL)
    page = page_of(tmp_path, tmp_path / MODEL)
    assert not re.findall(r"https?://|//[a-z]|@import|url\(", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_fits_the_window_in_chromium(tmp_path, width):
    """A script, for which the page's policy is taken out, reads how wide the page became and counts its rows."""
    folders = [tmp_path / name / MODEL for name in ("one", "two")]
    for folder in folders:
        for dataset in ("MMStar", "AI2D_TEST"):
            complete(folder, dataset)
        answer = {"question": "word " * 400, "response": "<think>" + "x" * 3000 + "</think>B", "answer": "B" * 500}
        answered(folder, "MMStar", [answer])
    page = page_of(tmp_path, *folders)
    opened = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert opened != page
    probe = (
        "<script>for (const folded of document.querySelectorAll('details')) folded.open = true;"
        "document.title = document.documentElement.scrollWidth + ' ' + "
        "[...document.querySelectorAll('tbody tr')].filter(row => row.offsetHeight > 0).length</script></body>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(opened.replace("</body>", probe), encoding="utf-8")

    def measured(file: Path) -> tuple[int, int]:
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={width},900", "--dump-dom", file.as_uri()]
        dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        found = re.search(r"<title>(\d+) (\d+)</title>", dumped)
        assert found, dumped[:500]
        return int(found[1]), int(found[2])

    wide, rows = measured(probed)
    assert wide <= width
    assert rows >= 2
    # Control: words that may not be broken, and tables that do not scroll by themselves, are wider than the window.
    broken = tmp_path / "broken.html"
    style = re.sub(r"overflow-wrap: anywhere|overflow-x: auto|overflow: auto", "", probed.read_text(encoding="utf-8"))
    broken.write_text(style, encoding="utf-8")
    assert measured(broken)[0] > width


def test_pictures_come_small_and_without_their_metadata(tmp_path):
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[270] = "secret place"
    image.new("RGB", (1600, 900), "red").save(tmp_path / "big.png", exif=exif)
    for name, answer in (("a-4B", "A"), ("b-4B", "B")):
        images = [str(tmp_path / "big.png"), "gone.png"]
        answered(tmp_path / name, "MMStar", [{"images": images, "answer": answer}])
    page = page_of(tmp_path, tmp_path / "a-4B", tmp_path / "b-4B")
    data = re.findall(r'src="data:image/jpeg;base64,([^"]+)" width="300" height="169"', page)
    assert len(data) == 1
    assert len(data[0]) < 4000
    assert "picture not found" in page


# Answers


def test_open_thoughts_are_counted_and_said_to_be_empty(tmp_path):
    folder = tmp_path / MODEL
    options(folder, "MMStar", 0.5)
    answered(folder, "MMStar", [{"closed": False, "answer": ""}] * 3 + [{}] * 5 + [{"closed": None}] * 2)
    cell = cell_of(table_of(folder), "MMStar")
    assert (cell.answers, cell.unclosed) == (10, 3)
    page = page_of(tmp_path, folder)
    assert '<small class="warning">10, 3 open</small>' in page
    assert "30.0% <small>3 of 10</small>" in page
    answered(folder, "MMStar", [{}] * 10)
    page = page_of(tmp_path, folder)
    assert "<small>10</small>" in page
    assert "open thoughts unknown" not in page
    (folder / f"{MODEL}_MMStar_responses.jsonl").unlink()
    assert "open thoughts unknown" in page_of(tmp_path, folder)


def test_lengths_and_their_change_on_shared_questions(tmp_path):
    before, after = tmp_path / "sft-4B", tmp_path / "rlvr-4B"
    answered(before, "MMStar", [{"tokens": count, "thought_tokens": count // 2} for count in (100, 200, 300, 400)])
    # Question 4 is not shared: its 8000 tokens must not pass for a change.
    answered(after, "MMStar", [{"tokens": t, "thought_tokens": 50} for t in (110, 210, 310, 410, 8000)])
    page = page_of(tmp_path, before, after)
    first = re.search(r"<tr><th>sft-4B</th>(<td>[^<]*</td>){7}", page)[0]
    assert re.findall(r"<td>([^<]*)</td>", first) == ["4", "250.0", "250.0", "385.0", "125.0", "125.0", "192.5"]
    change = re.search(r"<tr><th>rlvr-4B − sft-4B</th>.*?</tr>", page)[0]
    shown = re.findall(r"<td>([^<]*)</td>", change)
    assert shown == ["4", "+10.0", "+10.0", "+10.0", "−75.0", "−75.0", "−142.5", "+0.0 points"]


def test_lengths_are_numpys():
    numpy = pytest.importorskip("numpy")
    values = [3, 9, 1, 44, 8192, 12, 7]
    measured = lengths([*values, None])
    assert measured.count == 7
    assert measured.mean == pytest.approx(numpy.mean(values))
    assert measured.p95 == pytest.approx(numpy.quantile(values, 0.95))
    assert lengths([None]) is None


def test_unequal_settings_are_said_where_lengths_are_compared(tmp_path):
    for name, limit in (("a-4B", 8192), ("b-4B", 1024)):
        answered(tmp_path / name, "MMStar", [{}])
        settings(tmp_path / name, "MMStar", max_new_tokens=limit)
    said = "asked under unequal settings: max_new_tokens (1024, 8192)."
    assert said in page_of(tmp_path, tmp_path / "a-4B", tmp_path / "b-4B")
    settings(tmp_path / "b-4B", "MMStar")
    assert "unequal settings" not in page_of(tmp_path, tmp_path / "a-4B", tmp_path / "b-4B")


def test_questions_whose_answers_differ_come_first_and_data_sets_take_turns(tmp_path):
    def read(name, differing):
        answers = {}
        for dataset, count in (("big", 50), ("small", 4)):
            lines = [{"answer": name if index in differing else " a "} for index in range(count)]
            answers |= read_responses(answered(tmp_path / name, dataset, lines), dataset)
        return answers

    runs = [read("one", range(3)), read("two", range(3))]
    chosen = choose(runs, 8, seed=0)
    assert set(chosen[:6]) == {(dataset, str(index)) for dataset in ("big", "small") for index in range(3)}
    assert [dataset for dataset, _ in chosen].count("small") == 4
    assert chosen == choose(runs, 8, seed=0)
    assert choose(runs, 8, seed=1) != chosen
    assert choose(runs[:1], 8, seed=0) == []


def test_a_repeated_question_counts_once_with_its_last_answer(tmp_path):
    file = answered(tmp_path / MODEL, "MMStar", [{"key": 7, "tokens": 1}, {"key": "7", "tokens": 2}])
    assert [answer.tokens for answer in read_responses(file, "MMStar").values()] == [2]


@pytest.mark.parametrize(
    ("entry", "thought"),
    [
        ({"response": "<think>\nwhy\n</think>\n\nB", "closed": True}, "why"),
        ({"response": "why</think>B", "closed": True}, "why"),
        ({"response": "why and wh", "closed": False}, "why and wh"),
        ({"response": "<think>why and wh", "closed": False}, "why and wh"),
        ({"response": "B", "closed": None}, ""),
    ],
)
def test_the_thought_is_what_comes_before_its_end(entry, thought):
    assert thought_of(entry) == thought


# Training logs


def train(folder: Path, losses: list, first: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "trainer_log.jsonl").open("a") as log:
        for step, loss in enumerate(losses, start=first):
            entry = {
                "current_steps": step,
                "total_steps": 40,
                "loss": loss,
                "lr": 1e-4 / step,
                "elapsed_time": "0:01:07",
            }
            log.write(json.dumps(entry) + "\n")


def test_a_resumed_log_keeps_the_last_word_on_each_step(tmp_path):
    train(tmp_path / "stage1", [9.0, 8.0, 7.0])
    train(tmp_path / "stage1", [5.0, float("nan")], first=3)
    training = read_training(tmp_path / "stage1")
    assert training.losses == [(1, 9.0), (2, 8.0), (3, 5.0)]
    assert training.not_finite == 1
    assert (training.total_steps, training.runtime) == (40, "0:01:07 so far")
    (tmp_path / "stage1/train_results.json").write_text('{"train_runtime": 3725.4}')
    assert read_training(tmp_path / "stage1").runtime == "1:02:05"


def test_the_trainers_own_record_serves_where_the_log_is_missing(tmp_path):
    history = [{"step": 1, "loss": 3.0, "learning_rate": 0.1}, {"step": 2, "loss": 2.0}, {"step": 2, "train_loss": 9.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"max_steps": 2, "log_history": history}))
    training = read_training(tmp_path)
    assert (training.losses, training.rates, training.total_steps) == ([(1, 3.0), (2, 2.0)], [(1, 0.1)], 2)


def test_curves_are_drawn_one_a_stage(tmp_path):
    train(tmp_path / "out/stage1", [10.0 / step for step in range(1, 30)])
    train(tmp_path / "out/stage2.1", [2.0, 1.9, 1.8])
    train(tmp_path / "out/stage3", [2.0])
    page = page_of(tmp_path, tmp_path / "out")
    assert re.findall(r"<figcaption><b>([^<]*)</b>", page) == ["stage1", "stage2.1", "stage3"]
    assert re.findall(r"training loss, (\w+),", page) == ["logarithmic", "linear", "linear"]
    raw = re.search(r'<polyline class="raw" points="([^"]+)"', page)[1].split()
    assert len(raw) == 29
    heights = [float(point.split(",")[1]) for point in raw]
    assert heights == sorted(heights)  # the loss falls, and y grows downwards
    assert "Results" not in page


def test_axes_have_round_numbers():
    assert ticks(0, 40) == [0, 10, 20, 30, 40]
    assert ticks(1.7, 2.1) == pytest.approx([1.7, 1.8, 1.9, 2.0, 2.1])
    assert log_ticks(0.4, 9.0) == pytest.approx([0.5, 1, 2, 5])
    assert smoothed([1.0, 0.0]) == pytest.approx([1.0, 0.9])
    assert (logarithmic([1.0, 5.0]), logarithmic([1.0, 4.9]), logarithmic([0.0, 5.0])) == (True, False, False)
    assert bins([1, 8192])[0] == 1
    assert bins([1, 8192])[-1] > 8192


# Errors


def test_nothing_to_read_is_said(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    output = str(tmp_path / "page.html")
    assert main(["report", str(tmp_path / "gone"), str(tmp_path / "empty"), "--output", output]) == 2
    said = capsys.readouterr().err
    assert "gone does not exist" in said
    assert "empty and the folders in it hold neither scores" in said  # both in one message
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_a_line_cut_by_a_kill_is_left_out_and_said(tmp_path, capsys):
    file = tmp_path / "responses.jsonl"
    whole = [json.dumps({"key": str(i), "answer": "yes", "tokens": i, "closed": True}) for i in (1, 2)]
    file.write_text(f"{whole[0]}\n{whole[1][:20]}\n{whole[1]}\n")
    answers = read_responses(file, "MMStar")
    assert [answer.tokens for answer in answers.values()] == [1, 2]
    assert f"{file}, line 2 was cut short by a kill; left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (f"{MODEL}_MMStar_responses.jsonl", '{"key": "1"}\n{"key": "2", tok}', "responses.jsonl, line 2 is not JSON"),
        (f"{MODEL}_MMStar_responses.jsonl", '{"key": "1", "tokens": "many"}', "line 1: 'tokens' is 'many', expected"),
        (f"{MODEL}_MMStar_responses.jsonl", "[]", "line 1 is list, expected a JSON object"),
        (f"{MODEL}_MMStar_settings.json", '{"settings": ', "settings.json is not JSON"),
        (f"{MODEL}_MMStar_settings.json", "{}", "has no object 'settings'"),
        (f"{MODEL}_MMStar_acc.csv", '"split","Overall"\n"none",""\n', "Overall is '', expected a number"),
        ("trainer_log.jsonl", '{"current_steps": 1, "loss": 1.0}\n{"curr', "trainer_log.jsonl, line 2 is not JSON"),
        ("trainer_log.jsonl", '{"current_steps": 1}\n', "without a single loss"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, capsys, name, content, said):
    folder = tmp_path / MODEL
    options(folder, "MMStar", 0.5)
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0  # the control
    (tmp_path / "page.html").write_text("the old one")
    (folder / name).write_text(content)
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "page.html").read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL, "page.html"]


def test_a_full_disk_leaves_the_old_report_and_nothing_else(tmp_path, capsys, monkeypatch):
    options(tmp_path / MODEL, "MMStar", 0.5)
    page, table = tmp_path / "page.html", tmp_path / "table.md"
    page.write_text("the old one")
    arguments = ["report", str(tmp_path / MODEL), "--output", str(page), "--markdown", str(table)]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("qwen_merge.report.write.os.replace", full)
        assert main(arguments) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert page.read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL, "page.html"]
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL, "page.html", "table.md"]
    assert page.stat().st_mode & 0o444 == 0o444


def test_a_place_that_cannot_be_written_is_refused(tmp_path, capsys):
    options(tmp_path / MODEL, "MMStar", 0.5)
    for output, said in ((tmp_path, "is a folder"), (tmp_path / "no/page.html", "does not exist")):
        assert main(["report", str(tmp_path / MODEL), "--output", str(output)]) == 2
        assert said in capsys.readouterr().err
    same = str(tmp_path / "page.html")
    assert main(["report", str(tmp_path / MODEL), "--output", same, "--markdown", same]) == 2
    assert "the same file" in capsys.readouterr().err


def test_a_folder_with_another_name_than_its_files_is_explained(tmp_path):
    options(tmp_path / MODEL, "MMStar", 0.5)
    (tmp_path / MODEL).rename(tmp_path / "renamed")
    with pytest.raises(UserError, match="none that begins with 'renamed_'"):
        read_run(tmp_path / "renamed")
    (tmp_path / "renamed").rename(tmp_path / MODEL)
    settings(tmp_path / MODEL, "MMStar")
    (tmp_path / MODEL).rename(tmp_path / "renamed")
    assert read_run(tmp_path / "renamed").model == MODEL
