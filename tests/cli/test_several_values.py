"""An option that takes several values takes them repeated and with commas, in every command and every sweep."""

import inspect
import runpy
import sys
from pathlib import Path

import pytest
import typer

from rayclip import cli
from rayclip.api.request import Evaluation
from rayclip.cli.app import app
from rayclip.cli.options import refuse_repeats, split_models
from rayclip.cli.request import Request
from rayclip.cli.sweep import Options, Run
from rayclip.evaluation.cell import at_budgets
from rayclip.types import UserError

SWEEPS = {path.stem: path for path in sorted((Path(__file__).resolve().parents[2] / "sweeps").glob("*.py"))}


class Asked(BaseException):
    """What a command would have done."""


def asked(monkeypatch, function, *words):
    """The arguments that a command would have called `api.FUNCTION` with."""

    def stop(*args, **kwargs):
        raise Asked(args, kwargs)

    monkeypatch.setattr(f"rayclip.api.{function}", stop)
    for module in ("request", "evaluate"):  # what is named here is nowhere
        for check in ("check_models", "check_data"):
            monkeypatch.setattr(f"rayclip.cli.{module}.{check}", lambda specs, **_: None)
    with pytest.raises(Asked) as found:
        typer.main.get_command(app)(list(words), standalone_mode=False)
    return found.value.args


COMMON = ("--data", "A", "--data", "B,C", "--no-tracking", "--eps", "1/255", "--eps", "2/255,4/255")


@pytest.mark.parametrize(("command", "function"), [("eval", "evaluate_models"), ("plan", "plan_evaluation")])
def test_an_evaluation(monkeypatch, tmp_path, command, function):
    (models, evaluation, *_), _ = asked(
        monkeypatch, function, command, "--out", str(tmp_path), *COMMON,
        "--model", "digits", "--model", "ViT-B-32:openai,local-dir:x",
        "--attacks", "clean,pgd", "--attacks", "cw:steps=3,pgd-l2:eps=128/255",
        "--defense", "none", "--defense", "rn,tte", "--aim", "ignore", "--aim", "bpda",
        "--scorer", "template", "--scorer", "ensemble", "--made-against", "own", "--made-against", "template",
    )  # fmt: skip
    assert models == ["digits", "ViT-B-32:openai", "local-dir:x"]
    assert list(evaluation.data) == ["A", "B", "C"]
    attacks = at_budgets(evaluation.attacks, evaluation.protocol.budgets)
    assert [(a.name, a.eps and round(a.eps * 255)) for a in attacks] == [
        ("clean", None), *((name, eps) for name in ("pgd", "cw") for eps in (1, 2, 4)), ("pgd-l2", 128),
    ]  # fmt: skip
    assert [tuple(d.name for d in chain) for chain in evaluation.defenses] == [(), ("rn",), ("tte",)]
    assert [aim.gradient for aim in evaluation.aims] == ["ignore", "bpda"]
    assert [s.name for s in evaluation.scorers] == ["template", "ensemble"]
    assert list(evaluation.made_against) == ["own", "template"]


def test_plan_of_several_numbers_of_workers(monkeypatch, tmp_path):
    words = ("plan", "--model", "digits", "--out", str(tmp_path), *COMMON, "--workers", "1", "--workers", "8,64")
    _, options = asked(monkeypatch, "plan_evaluation", *words)
    assert options["workers"] == [1, 8, 64]


def test_interpolation(monkeypatch, tmp_path):
    words = ("interpolate", "--from", "digits", "--to", "local-dir:x", "--out", str(tmp_path), *COMMON, "--a", "0")
    (_, models, (evaluation,), _), _ = asked(monkeypatch, "compare", *words, "--a", "0.5,1", "--attacks", "clean,pgd")
    assert list(models.values()) == ["a = 0", "a = 0.5", "a = 1"]
    assert list(evaluation.data) == ["A", "B", "C"] and len(evaluation.protocol.budgets) == 3


def test_retrieval(monkeypatch, tmp_path):
    words = ("retrieval", "--model", "digits", "--model", "local-dir:x", "--data", "P.parquet", "--out", str(tmp_path))
    more = ("--attacks", "clean", "--attacks", "pgd,co-attack:eps=2/255", "--eps", "1/255,4/255", "--no-tracking")
    (models, data, _), options = asked(monkeypatch, "evaluate_retrieval", *words, *more)
    assert models == ["digits", "local-dir:x"] and data == "P.parquet"
    attacks = at_budgets(options["attacks"], options["eps"])
    assert [(a.name, a.eps and round(a.eps * 255)) for a in attacks] == [
        ("clean", None), ("pgd", 1), ("pgd", 4), ("co-attack", 2),
    ]  # fmt: skip


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """What a sweep was asked for: its `Run`, and its own options."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        def stop(run, *args, **kwargs):
            raise Asked(run)

        for method in ("trials", "evaluations", "trial", "grid", "pairs"):
            monkeypatch.setattr(Run, method, stop)
        for check in ("check_models", "check_data"):
            monkeypatch.setattr(f"rayclip.cli.sweep_run.{check}", lambda specs: None)
        monkeypatch.setattr("rayclip.cli.sweep.run_app", lambda app, name: typer.main.get_command(app)(
            list(words), standalone_mode=False))  # fmt: skip
        with pytest.raises(Asked) as found:
            runpy.run_path(str(SWEEPS[name]), run_name="__main__")
        return found.value.args[0]

    return run


@pytest.mark.parametrize("words", [("tecoa,mmcoa",), ("tecoa", "mmcoa")])
def test_sweeps(sweep, words):
    options = [word for value in words for word in ("--methods", value)]
    shots = [word for value in ("1", "5,full") for word in ("--shots", value)]
    data = ["--data", "a.parquet", "--data", "b.parquet", "--test", "c.parquet", "--test", "d.parquet,e.parquet"]
    run = sweep("mmcoa_shots", *options, *shots, *data)
    assert run.methods == ("tecoa", "mmcoa") and run.shots == [1, 5, None]
    assert run.data == ("a.parquet", "b.parquet") and run.tests == ("c.parquet", "d.parquet", "e.parquet")


def test_a_sweeps_defaults_stay(sweep):
    run = sweep("mmcoa_eps")
    assert run.methods == ("mmcoa",) and run.shots == [None] and run.data == ("digits",)


@pytest.mark.parametrize("name", SWEEPS)
def test_whatever_a_sweep_takes_with_commas_may_be_repeated(name, monkeypatch):
    started = []
    monkeypatch.setattr("rayclip.cli.sweep.run_app", lambda command, name: started.append(command))
    runpy.run_path(str(SWEEPS[name]), run_name="__main__")
    for option in typer.main.get_command(started[0]).params:
        if "ommas between" in (option.help or ""):
            assert option.multiple, option.name


def test_whatever_a_command_takes_with_commas_may_be_repeated():
    several, commands = set(), [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        for option in command.params:
            if "ommas between" in (getattr(option, "help", "") or ""):
                several.add(f"{command.name} {option.opts[0]}")
                assert option.multiple, f"{command.name} {option.name}"
    assert several >= {"eval --data", "plan --eps", "retrieval --eps", "interpolate --a", "prepare --splits"}


def test_a_path_that_exists_stays_whole(tmp_path, monkeypatch):
    (tmp_path / "my, own").mkdir()
    (tmp_path / "a,b.parquet").touch()
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    found = Request(model=["local-dir:my, own,digits"], data=["a,b.parquet,digits"], out="o", eps=["1/255"])
    evaluation: Evaluation = found.evaluation
    assert list(evaluation.data) == ["a,b.parquet", "digits"]
    assert split_models(["local-dir:my, own,digits"]) == ["local-dir:my, own", "digits"]
    assert split_models(["digits,local-dir:m"]) == ["digits", "local-dir:m"]
    assert split_models(["digits,local-dir:my, own"]) == ["digits", "local-dir:my, own"]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["eval", "--out", "a", "--model", "digits", "--out", "b"], "--out"),
        (["train", "--data=A", "--method", "tecoa", "--data", "B"], "--data"),
        (["data", "prepare", "x", "--root", "a", "--root=b"], "--root"),
    ],
)
def test_an_option_that_takes_one_value_is_refused_twice(monkeypatch, capsys, words, option):
    """Before, the last one won in silence."""
    monkeypatch.setattr(sys, "argv", ["rayclip", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.strip() == f"error: {option} is given twice and takes one value: leave one."


def test_values_that_look_like_options_are_values():
    command = typer.main.get_command(app)
    refuse_repeats(command, ["eval", "--out", "--out", "--quiet", "--quiet", "--model", "a", "--model", "b"])
    with pytest.raises(UserError, match="--limit"):
        refuse_repeats(command, ["eval", "--limit", "3", "--limit", "4"])


def test_the_options_of_sweeps_are_what_they_say():
    lists = {
        name for name, field in inspect.signature(Options).parameters.items() if "Sequence" in str(field.annotation)
    }
    assert lists == {"data", "test", "methods", "shots"}
