"""`qwen-merge demo --ablate`: what is compared, what the table says, what a resume does. Nothing is trained."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import make_llm
from grafts import make_tower
from qwen_merge.cli import main
from qwen_merge.demo import ablation, ablation_report, trial
from qwen_merge.demo.language import CHANCE
from qwen_merge.demo.run import Demo
from qwen_merge.demo.variants import ABLATIONS, UNTRAINED, Budget, Plan, Variant, result_file, with_control
from qwen_merge.errors import UserError

BUDGET = Budget(steps=(2, 3), seeds=2, rows=(8, 8), asked={"colour": 4, "number": 4})


def run_of(colour: float, number: float, **values) -> dict:
    return {
        "caption_loss": 0.5,
        "answer_loss": 0.25,
        "accuracy": {"colour": colour, "number": number},
        "control": {"colour": CHANCE["colour"], "number": 0.0},
        "tokens": 9,
        "projector_parameters": 1234,
        "trained_parameters": 1234,
        "cpu_seconds": 10.0,
        "seconds": 20.0,
        **values,
    }


@pytest.fixture
def demo(tmp_path):
    """A demo's folder whose parents and data count as made."""
    (tmp_path / "out").mkdir()
    done = {"vlm": 1.0, "llm": 1.0, ablation.DATA: 1.0}
    (tmp_path / "out/steps.json").write_text(json.dumps({"seed": 3, "seconds": done}))
    return Demo(tmp_path / "out", seed=3, resume=True)


def leave_results(made: ablation.Ablation) -> None:
    for place, variant in enumerate(made.plan.variants):
        for seed in made.plan.seeds:
            file = result_file(made.folder, variant, seed)
            file.parent.mkdir(exist_ok=True)
            refused = {"refused": "this graft cannot be made:\n  - too narrow"}
            file.write_text(json.dumps(refused if variant.name == "own" else run_of(0.1 * place, 0.01 * seed)))


def test_an_unknown_ablation_leaves_with_2(capsys):
    with pytest.raises(SystemExit) as left:
        main(["demo", "--ablate", "colour"])
    assert left.value.code == 2
    assert "invalid choice: 'colour'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_plan_comes_back_from_its_file(name):
    plan = Plan(name, with_control(ABLATIONS[name][1]), BUDGET, 3, "a/vlm", "a/llm", "a/data")
    assert Plan.load(plan.dump()) == plan
    assert list(plan.seeds) == [3, 4]
    assert plan.variants[-1] == Variant(UNTRAINED, plan.variants[0].graft, None)


def test_of_all_grafts_only_the_towers_own_merger_is_refused(tmp_path):
    tower, llm = make_tower(tmp_path / "vlm", "qwen2_5_vl"), make_llm(tmp_path / "llm")
    refused = {}
    for name, (_, variants) in ABLATIONS.items():
        plan = Plan(name, variants, BUDGET, 0, str(tower), str(llm), "")
        for variant in variants:
            folder = tmp_path / name / variant.graft.name
            try:
                assert trial.make_graft(variant.graft, plan, folder, 0) == folder / "base"
            except UserError as refusal:
                refused[name, variant.name] = str(refusal)
    assert list(refused) == [("projector", "own")]
    assert "take extended, or patch_merger" in refused["projector", "own"]


def test_grafts_that_differ_in_positions_only_begin_with_the_same_weights(tmp_path):
    tower, llm = make_tower(tmp_path / "vlm", "qwen2_5_vl"), make_llm(tmp_path / "llm")
    plan = Plan("positions", ABLATIONS["positions"][1], BUDGET, 0, str(tower), str(llm), "")

    def weights(variant, seed):
        base = trial.make_graft(variant.graft, plan, tmp_path / f"{variant.name}{seed}", seed)
        return (base / "model.safetensors").read_bytes(), json.loads((base / "config.json").read_text())

    made = [weights(variant, 0) for variant in plan.variants]
    assert len({bytes_ for bytes_, _ in made}) == 1
    assert len({json.dumps([config["positions"], config["mrope_section"]]) for _, config in made}) == 3
    assert weights(plan.variants[0], 1)[0] != made[0][0]


def test_every_stage_has_the_same_budget_and_its_own_changes():
    plan = Plan("freeze", ABLATIONS["freeze"][1], BUDGET, 0, "vlm", "llm", "data")
    (stage, dataset), steps = trial.TRAINED[1], BUDGET.steps[1]
    values = trial.settings(stage, dataset, "model", plan, "out", 5, steps)
    assert (values["max_steps"], values["seed"], values["dataset"]) == (3, "5", trial.QUESTIONS)
    changed = {variant.name: dict(variant.changes) for variant in plan.variants}
    assert changed["projector"] == {"freeze_language_model": "true"}
    assert changed["projector+LLM"] == {}
    assert not any(
        {"max_steps", "learning_rate", "per_device_train_batch_size"} & change.keys() for change in changed.values()
    )


def test_parameters_are_counted_where_tensors_differ(tmp_path):
    tensors = {
        "projector.proj.weight": torch.zeros(3, 4),
        "model.norm.weight": torch.ones(5),
        "visual.x": torch.ones(2),
    }
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert trial.moved(tmp_path / "before", tmp_path / "after") == 0
    tensors["projector.proj.weight"][2, 3] = 1e-9
    save_file(tensors, tmp_path / "after/model.safetensors")
    assert trial.moved(tmp_path / "before", tmp_path / "after") == 12
    assert trial.parameters(tmp_path / "after", ("projector.", "visual.")) == 14
    assert trial.parameters(tmp_path / "after") == 19


def test_the_table_has_means_with_their_spread_and_reasons_of_refusals(demo):
    made = ablation.Ablation(demo, "projector", BUDGET)
    leave_results(made)
    lines = ablation_report.table(ablation_report.gathered(made.plan, made.folder)).splitlines()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert len({len(row) for row in rows.values()}) == 1
    figures = ["9", "1,234", "1,234", "0.250", "0.500", "10"]
    assert rows["linear"] == ["20.0", "3.5 (3.0 to 4.0)", *figures]
    assert rows["extended"][0] == "0.0"
    assert rows["own"][0] == "refused: this graft cannot be made: - too narrow"
    assert rows["chance"][:2] == ["16.7", "0.1"]
    assert rows["another question's picture, best of all"][:2] == ["16.7", "0.0"]


def test_what_is_finished_stays_and_the_rest_is_done(demo, capsys):
    made = ablation.Ablation(demo, "projector", BUDGET)
    leave_results(made)
    assert made.run() == 0
    assert {"table.md", "plot.png", "results.json"} <= {path.name for path in made.folder.iterdir()}
    assert "refused: this graft cannot be made: - too narrow" in capsys.readouterr().out
    assert not list((demo.output / "logs").iterdir())  # no process was started

    again = ablation.Ablation(demo, "projector", BUDGET)
    result_file(again.folder, again.plan.variants[0], 4).unlink()
    with pytest.raises(UserError, match=r"ablate-projector-seed4 failed(.|\n)*holds no config.json"):
        again.run()
    assert [path.name for path in (demo.output / "logs").iterdir()] == ["ablate-projector-seed4.log"]


def test_another_budget_does_not_go_on_in_the_same_folder(demo):
    ablation.Ablation(demo, "freeze", BUDGET)
    ablation.Ablation(demo, "freeze", BUDGET)
    with pytest.raises(UserError, match=r"another budget(.|\n)*another --output"):
        ablation.Ablation(demo, "freeze", Budget())


def test_answers_that_do_not_come_from_the_picture_are_told(demo):
    made = ablation.Ablation(demo, "freeze", BUDGET)
    leave_results(made)
    content = ablation_report.gathered(made.plan, made.folder)
    assert ablation.guessed_too_well(content) == []
    content["variants"][1]["runs"][0]["control"]["number"] = 0.5
    assert ablation.guessed_too_well(content) == [
        "control, projector+LoRA, number: 50.0% right with other questions' pictures, chance is 0.1%"
    ]


def test_the_plot_is_small_and_shows_the_figures(demo):
    made = ablation.Ablation(demo, "projector", BUDGET)
    leave_results(made)
    content = ablation_report.gathered(made.plan, made.folder)
    picture = ablation_report.draw(content)
    assert picture[:4] == b"\x89PNG"
    assert len(picture) < 60_000
    other = copy.deepcopy(content)
    other["variants"][0]["runs"][0]["accuracy"]["colour"] = 0.9
    assert ablation_report.draw(content) == picture != ablation_report.draw(other)
