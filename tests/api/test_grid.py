"""Grids of trainings: what is read, which trials come of it, how they are named, and what a plan says."""

import dataclasses
import math

import pytest
import torch
import typer

import rayclip
from calling import call
from rayclip.api.grid import OPTIONS, Grid, Range, SweepSettings, name_points
from rayclip.api.needs import SHARE_BF16, SHARE_FP32, Needs
from rayclip.api.planning import PlannedTrial, StudyPlan
from rayclip.api.sweeping import GridSweep, prepare
from rayclip.cli.app import app
from rayclip.cli.grid import show_plan
from rayclip.evaluation.costs import Hardware
from rayclip.evaluation.front import Score
from rayclip.reports.rows import search_grid
from rayclip.training.rate import measure_rate
from rayclip.types import UserError

DIGITS = {"model": "digits", "data": "digits"}
WHOLE = ["tecoa", "mmcoa:lambda_img=0.1|0.5|0.9"]


def names(grid, **options):
    return name_points(grid.points(), **options)


def test_all_combinations_are_named_by_what_differs():
    grid = Grid.read(WHOLE, DIGITS | {"eps": ["1/255,2/255", "4/255"], "shots": [1, "5,full"]}, seeds=3)
    points = grid.points()
    assert len(points) == grid.size == 4 * 3 * 3 * 3
    assert points[0].options == DIGITS | {"eps": 1 / 255, "shots": 1, "seed": 0}
    found = names(grid)
    assert len(set(found)) == len(found) and found[0] == "tecoa, eps 1/255, 1 shot, seed 0"
    assert "mmcoa λ_img 0.1, eps 2/255, 5 shots, seed 1" in found and found[-1].endswith("all images, seed 2")
    assert len(set(names(grid, without=["seed"]))) == 36


@pytest.mark.parametrize(
    ("methods", "options", "expected"),
    [
        ("tecoa", {}, ["tecoa"]),
        (["mmcoa", "mmcoa:lambda_img=0.3"], {}, ["mmcoa", "mmcoa λ_img 0.3"]),
        (["mmcoa:lambda_img=0.3,k=2|4", "tecoa"], {"lr": 1e-5}, ["mmcoa k 2", "mmcoa k 4", "tecoa"]),
        (["fare:attack_momentum=0.9|0.9"], {"lr": "1e-5|1e-05", "batch_size": (64,)}, ["fare"]),
        ("tecoa", {"betas": "0.9,0.98|0.9,0.999"}, ["tecoa, betas 0.9 and 0.98", "tecoa, betas 0.9 and 0.999"]),
        ("tecoa", {"betas": (0.9, 0.98), "optimizer": "sgd,adam"}, ["tecoa, optimizer sgd", "tecoa, optimizer adam"]),
        ("tecoa", {"trains": "image,last-2"}, ["tecoa, trains image", "tecoa, trains last-2"]),
        ("tecoa", {"data": "digits,a/x.parquet"}, ["tecoa, data digits", "tecoa, data x"]),
        ("tecoa", {"data": ["a,b.parquet", "c.parquet"]}, ["tecoa, data a,b", "tecoa, data c"]),
        ("tecoa", {"data": "a/x.parquet,b/x.parquet"}, ["tecoa, data a/x.parquet", "tecoa, data b/x.parquet"]),
    ],
)
def test_values_as_people_write_them(methods, options, expected):
    assert names(Grid.read(methods, DIGITS | options)) == expected


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--method", "tecoo"], "did you mean tecoa"),
        (["--method", "mmcoa:lambda_im=1"], "did you mean lambda_img"),
        (["--method", "tecoa:lambda_img=0.1|0.2"], "which mmcoa has"),
        (["--method", "mmcoa:lambda_img=0.1|many"], "mmcoa:lambda_img=many is no number"),
        (["--method", "mmcoa:lambda_img=0.1||0.2"], "empty alternative"),
        (["--method", ","], "empty name"),
        (["--method", " "], "grid is empty"),
        (["--method", "tecoa", "--eps", "1/255,8"], "write 8/255"),
        (["--method", "tecoa", "--shots", "1,some"], "write 1, 5 or full"),
        (["--method", "tecoa", "--lr", "1e-5,0"], "--lr 0 must be"),
        (["--method", "tecoa", "--epochs", "1,two"], "--epochs two is no whole number"),
        (["--method", "tecoa", "--schedule", "cosin"], "cosine"),
        (["--method", "tecoa", "--betas", "0.9"], "write 0.9,0.98"),
        (["--method", "tecoa", "--lr", ","], "empty value"),
        (["--method", "tecoa", "--lr", "1e-6..1e-4"], "--search random"),
        (["--method", "tecoa", "--lr", "1e-4..1e-6", "--search", "asha"], "lower number first"),
        (["--method", "tecoa", "--lr", "1e-6..1e-4,1", "--search", "asha"], "one range, or values"),
        (["--method", "tecoa", "--search", "random", "--seeds", "3"], "leave --seeds away"),
        (["--method", "tecoa", "--seeds", "2", "--seed", "1,2"], "counts from one --seed"),
        (["--method", "tecoa", "--seeds", "101"], "--yes"),
        (["--method", "tecoa", "--seeds", "20000", "--yes"], "--search random"),
        (["--method", "tecoa", "--attacks", "pdg"], "did you mean pgd"),
        (["--method", "tecoa", "--data", "nowhere.parquet"], "no such data file"),
        (["--method", "tecoa", "--search", "asha", "--data", "digits,digits#holdout"], "one --data"),
        (["--method", "mmcoa:lambda_img=0|0.5,lambda_txt=0"], "no loss"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(monkeypatch, capsys, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayclip.api.training.ray_cluster", lambda **_: pytest.fail("it is refused before"))
    args = [*args, *(() if "--data" in args else ("--data", "digits"))]
    code, out, err = call(monkeypatch, capsys, "sweep", "--model", "digits", *args)
    assert code == 2 and says in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_options_are_those_of_rayclip_train():
    known = {option.name for option in typer.main.get_command(app).commands["train"].params}
    assert set(OPTIONS) <= known


def test_an_option_that_no_training_has():
    with pytest.raises(UserError, match="did you mean epochs"):
        Grid.read("tecoa", DIGITS | {"epoch": 3})


def test_a_search_draws_within_ranges_and_a_longer_one_begins_with_a_shorter():
    grid = Grid.read("mmcoa:lambda_img=0.1..0.9", DIGITS | {"lr": "1e-6..1e-4", "epochs": "1..3", "shots": "1,5"})
    drawn = grid.draw(40, 0)
    assert grid.size == math.inf and drawn[:10] == grid.draw(10, 0) != grid.draw(10, 1)
    assert len({repr(point) for point in drawn}) == 40
    assert all(0.1 <= float(p.settings["lambda_img"]) <= 0.9 and 1e-6 <= p.options["lr"] <= 1e-4 for p in drawn)
    assert {p.options["epochs"] for p in drawn} == {1, 2, 3} and {p.options["shots"] for p in drawn} == {1, 5}
    assert 12 < sum(p.options["lr"] < 1e-5 for p in drawn) < 28, "as many in each decade"
    assert Range(1e-6, 1e-4).at(0.5) == pytest.approx(1e-5) and Range(0.1, 0.9).at(0.5) == pytest.approx(0.5)
    few = Grid.read("tecoa,fare", DIGITS | {"lr": "1e-6,1e-5"})
    assert few.draw(99, 0) == few.points() and len({repr(point) for point in few.draw(3, 0)}) == 3


def test_equal_trainings_run_once_and_a_grid_that_grows_keeps_them(tmp_path, capsys):
    """Clean fine-tuning does not depend on the budget, and 0.5 is MMCoA's own weight."""
    options = DIGITS | {"eps": "16/255,32/255", "shots": 1}
    small = prepare(Grid.read(["ft-standard", "mmcoa:lambda_img=0.5"], options), SweepSettings(), str(tmp_path))
    assert [t.name for t in small.trials] == ["ft-standard", "mmcoa, eps 16/255", "mmcoa, eps 32/255"]
    assert small.evaluations[0].protocol.budgets == (16 / 255, 32 / 255) and small.groups.keys() == {
        t.model for t in small.trials
    }
    more = prepare(Grid.read(["ft-standard,mmcoa"], options, seeds=2), SweepSettings(), str(tmp_path))
    assert len(more.trials) == 6 and len(set(more.groups.values())) == 3
    assert {(t.out, t.run_key) for t in small.trials} < {(t.out, t.run_key) for t in more.trials}
    assert "combinations are the same training" in capsys.readouterr().err


def test_a_trial_is_what_rayclip_train_would_run(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr("rayclip.api.fine_tune", lambda trial, where: seen.append(trial) or True)
    given = {
        "eps": "16/255", "steps": "4", "step_size": "3/255", "norm": "linf", "start": "zero", "attack": "cw",
        "shots": "5", "trains": "image", "recipe": "paper", "epochs": "3", "lr": "0.002", "batch_size": "32",
        "optimizer": "adam", "betas": "0.8,0.9", "weight_decay": "0.1", "schedule": "linear", "warmup_steps": "2",
        "eps_warmup": "1", "ema": "0.9", "accumulate": "2", "precision": "fp32", "seed": "7", "momentum": "0.5",
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    method = "tecoa"
    args = ("train", "--method", method, "--model", "digits", "--data", "digits", "--out", tmp_path / "m", *words)
    assert call(monkeypatch, capsys, *args)[0] == 0
    (trial,) = prepare(Grid.read(method, DIGITS | given), SweepSettings(), str(tmp_path)).trials
    assert trial.config == seen[0].config


def test_the_library_takes_numbers_texts_and_lists(monkeypatch, tmp_path):
    monkeypatch.setattr(GridSweep, "run", lambda sweep, where: (sweep, where))
    values = {"eps": [8 / 255, "16/255"], "shots": [1, None], "lr": 1e-3, "limit": 9}
    made, where = rayclip.sweep("tecoa", model="digits", data="digits", out=str(tmp_path / "o"), seeds=2, **values)
    assert [t.name for t in made.trials][:3] == [
        f"tecoa, eps 8/255, {n}" for n in ("1 shot, seed 0", "1 shot, seed 1", "all images, seed 0")
    ]
    assert len(made.trials) == 8 and {t.config.recipe.lr for t in made.trials} == {1e-3}
    assert made.evaluations[0].limit == 9 and where.out == str(tmp_path / "o") and where.tracking is None


def test_a_search_holds_a_part_of_the_training_data_out(tmp_path):
    asked = SweepSettings(search="asha", samples=3, by="clean", test_eps=["32/255"])
    made = prepare(Grid.read("tecoa", DIGITS | {"lr": "1e-4..1e-2"}), asked, str(tmp_path))
    assert len(made.trials) == 3 and {t.config.data for t in made.trials} == {"digits#validation"}
    assert made.validation.data == "digits#validation" and made.validation.by == "clean" and made.reduction == 3
    assert made.evaluations[0].data == ["digits"]
    random = prepare(Grid.read("tecoa", DIGITS), dataclasses.replace(asked, search="random"), str(tmp_path))
    assert (
        random.reduction is None and random.trials[0].config.save_every_epochs == random.trials[0].config.recipe.epochs
    )


def test_trials_of_a_search_are_ranked_by_what_is_asked_for():
    scores = {"a": Score(epoch=2, clean=90, robust=10), "b": Score(epoch=2, clean=60, robust=35)}

    def ranked(by):
        return [name for name, _ in search_grid(scores, [], "pgd", by).rows]

    assert (ranked("clean"), ranked("worst case"), ranked("mean")) == (["a", "b"], ["b", "a"], ["a", "b"])


def test_a_plan_says_trials_and_hours(capsys):
    trials = [PlannedTrial("tecoa", 2, 100, 1800.0, False)] * 3 + [PlannedTrial("fare", 2, 100, 0.0, True)]
    hour = 3600e12  # operations at 10¹² in a second
    plan = StudyPlan(
        trials=trials,
        models=5,
        cells=2,
        testing=7200.0,
        hardware=Hardware(name="H100", gpus=1.0, cores=1),
        needs=Needs(training=SHARE_BF16 * 312 * hour, testing=SHARE_FP32 * 19.5 * 2 * hour, disk=3e9, files=1200),
        few=0.5,
    )
    show_plan(plan)
    said = capsys.readouterr().out
    assert "4 trials, 1 of them finished; 5 models to test, 2 cells each" in said
    assert "about 3.5 GPU hours on H100: 1.5 of training, 2 of tests" in said
    assert said.count("tecoa") == 2 and "finished" in said
    assert "about 3 h on A100, " in said and "3 GB of results and checkpoints in 1,200 files" in said
    assert "tecoa and the untouched model on 500 images of each data set (--limit): about 0.9 GPU hours here" in said


def test_a_training_is_measured_by_its_first_seconds(saved_clip, tmp_path, monkeypatch):
    monkeypatch.setattr("rayclip.training.loop._REPORT_SECONDS", 0.2)
    options = {"model": saved_clip, "data": "digits", "shots": 1, "steps": 1}
    (trial,) = prepare(Grid.read("tecoa", options), SweepSettings(), str(tmp_path / "out")).trials
    assert measure_rate(trial.config, torch.device("cpu")) > 1
    assert not (tmp_path / "out").exists()
