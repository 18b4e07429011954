"""Every file in `sweeps/`: what it opens with, its plan at each scale, its help, and what it says to wrong input."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
import typer

from calling import call
from cli.test_cli import here  # noqa: F401  (a fixture)
from rayclip.api import Found, SweepResult
from rayclip.cli.sweep import Run, start, sweep
from rayclip.types import Row

FILES = {f.stem: f for f in sorted((Path(__file__).resolve().parents[2] / "sweeps").glob("*.py"))}


def load(name):
    spec = importlib.util.spec_from_file_location(name, FILES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_sweep(monkeypatch, capsys, name, *args):
    app = typer.Typer(add_completion=False)
    app.command()(load(name).main)
    return call(monkeypatch, capsys, *args, app=app, program=f"{name}.py")


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """What a sweep would train and evaluate, part by part: (trials, attacks with their budgets, data, models, the first
    evaluation, the resolution of each data set)."""
    monkeypatch.chdir(tmp_path)

    def planned(name, *args):
        parts = []

        def note(run, trials, evaluations, *, results=None, others=None, part="", show=True):
            attacks = [
                f"{a.label} {round(b * 255)}" for e in evaluations for b in e.protocol.budgets for a in e.attacks
            ]
            data = {spec: e.protocol.resolution for e in evaluations for spec in e.data}
            models = [label for t in trials for label in (results(t).values() if results else [t.name])]
            parts.append((trials, [*dict.fromkeys(attacks)], [*data], models, evaluations[0], data))
            return SweepResult(rows=[], labels={}, errors={})

        monkeypatch.setattr(Run, "go", note)
        monkeypatch.setattr("rayclip.cli.sweep_run.check_data", lambda specs: None)  # nobody has the papers' here
        code, _, err = run_sweep(monkeypatch, capsys, name, *args)
        assert code == 0, err
        return parts

    return planned


@pytest.mark.parametrize("name", FILES)
def test_it_opens_with_command_cost_and_numbers(name):
    text = FILES[name].read_text()
    head = text.split('"""')[1]
    for needed in (
        f"python sweeps/{name}.py ",
        "--scale paper",
        "\nCost: ",
        "`paper` has not been",
        "o expect at the",
    ):
        assert needed in head, needed
    assert re.search(r"Cost: `digits` (at most |about )?\d", head), "its cost at the bundled scale"
    assert len(text.splitlines()) < 120


@pytest.mark.parametrize("name", FILES)
def test_help_lists_the_common_options(monkeypatch, capsys, name):
    code, out, _ = run_sweep(monkeypatch, capsys, name, "--help")
    assert code == 0
    assert all(option in out for option in ("--scale", "--model", "--data", "--eps", "--out", "--cluster", "--seed"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--scale", "paper"], "is not prepared"),
        (["--scale", "pocket"], "needs --model"),
        (["--scale", "huge"], "'huge' is not one of"),
        (["--eps", "32"], "32/255"),
        (["--data", "nowhere.parquet"], "no such data file"),
        (["--model", "resnet50"], "unknown model 'resnet50'"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(here, monkeypatch, capsys, name, args, says):  # noqa: F811
    monkeypatch.setenv("RAYCLIP_DATA", str(here / "no-data"))
    if name == "saft_sources":
        args = [*args, "--sources", "templates"]
    code, out, err = run_sweep(monkeypatch, capsys, name, *args)
    assert code == 2 and says in err and err.count("\n") == 1 and out == ""
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("mmcoa_shots", ["--methods", "tecoa,foo"], "unknown method 'foo'"),
        ("mmcoa_shots", ["--shots", "1,5000"], "--shots 5000 is more than class"),
        ("mmcoa_shots", ["--out", __file__], "is a file"),
        ("joint_search", ["--out", f"{__file__}/below"], "is a file"),
        ("mmcoa_shots", ["--test", "nowhere.parquet"], "no such data file"),
        ("mmcoa_in_distribution", ["--test", "digits,digits"], "--data names 1 data sets and --test 2"),
        ("mmcoa_interpolation", ["--a", "0,2"], "from 0 to 1"),
        ("mmcoa_eps", ["--test-eps", "1/255,2"], "2/255"),
        ("mmcoa_iterations", ["--every", "0"], "Invalid value for '--every'"),
        ("mmcoa_retrieval", ["--pairs", "nowhere.parquet"], "nowhere.parquet"),
        ("joint_search", ["--reduction", "1"], "--reduction 1 must be more than 1"),
        ("mmcoa_partial", ["--parts", "words"], "all, image, text, or last-N"),
        ("saft_captions", ["--sets", "1,0"], "--sets 1,0 holds something else"),
        ("saft_captions", ["--captions", "templates", "--sets", "99"], "fewer sets"),
        ("saft_captions", ["--sets", "99"], "has 8 of 99 captions"),
        ("saft_sources", ["--sources", "nowhere.csv"], "nowhere.csv"),
        ("saft_sources", ["--data", "digits#holdout"], "--sources is missing"),
        ("saft_methods", ["--captions", "nowhere.parquet"], "nowhere.parquet"),
        ("saft_scorers", ["--crops", "0"], "Invalid value for '--crops'"),
        ("ttc_defenses", ["--defense-eps", "4"], "4/255"),
        ("ttc_settings", ["--tau", "low"], "tau"),
        ("referee", ["--defenses", "none,ttcc"], "unknown defence 'ttcc'"),
        ("joint_search", ["--samples", "1"], "Invalid value for '--samples'"),
    ],
)
def test_wrong_values_of_its_own_options(here, monkeypatch, capsys, name, args, says):  # noqa: F811
    code, out, err = run_sweep(monkeypatch, capsys, name, *args)
    assert code == 2 and says in err and err.count("\n") == 1 and out == ""
    assert list(Path.cwd().iterdir()) == []


USUAL = ["clean 32", "pgd-10 32", "bert 32", "sep_pgd-10 32"]
PAPER = ["clean 1", "pgd-100 1", "bert 1", "sep_pgd-100 1"]


def names(part):
    return [t.name for t in part[0]]


def test_shots(plan):
    (part,) = plan("mmcoa_shots")
    assert names(part) == [f"{m} {s}" for s in ("1-shot", "5-shot", "full") for m in ("ft-standard", "tecoa", "mmcoa")]
    assert part[1:3] == (USUAL, ["digits"])
    assert {t.config.recipe.epochs for t in part[0]} == {5, 15}
    (part,) = plan("mmcoa_shots", "--scale", "paper")
    assert [t.config.shots for t in part[0]] == [s for s in (1, 5, 50, None) for _ in range(3)]
    assert part[1] == PAPER and len(part[2]) == 15
    native = {data for data, resolution in part[5].items() if resolution == "native"}
    assert native == {"cifar10", "cifar100", "tiny_imagenet", "stl10", "eurosat"}, "MMCoA perturbs small images as such"
    assert {(t.config.model, t.config.data, t.config.resolution) for t in part[0]} == {
        ("ViT-B-32:openai", "imagenet", "model")
    }
    assert part[4].protocol.resize == ("plain" if part[4].protocol.resolution == "native" else "antialias")
    assert {(t.config.method.steps, t.config.method.eps) for t in part[0]} == {(10, 1 / 255)}
    whole = {t.name.split()[0]: dataclasses.replace(t.config.method.recipe, warmup_whole=True) for t in part[0]}
    assert part[0][1].config.recipe == whole["tecoa"], "the paper's own, its warm-up as long as written"
    assert part[0][2].config.recipe == dataclasses.replace(whole["mmcoa"], epochs=28)
    assert part[0][0].config.recipe == dataclasses.replace(whole["ft-standard"], epochs=10)
    assert part[0][2].config.recipe.schedule == "constant" == part[0][0].config.recipe.schedule
    assert [t.config.method.against for t in part[0][:3]] == ["own", "own", "pgd"]
    assert part[4].protocol.names == "raw" == part[0][0].config.names, "class names as the papers' code spells them"
    bert = next(attack for attack in part[4].attacks if attack.name == "bert")
    assert bert.offset == "reference" == part[0][2].config.method.text.offset


def test_in_distribution(plan):
    (part,) = plan("mmcoa_in_distribution")
    assert names(part) == ["ft-standard", "tecoa", "mmcoa"] and part[1:3] == (USUAL, ["digits"])
    parts = plan("mmcoa_in_distribution", "--scale", "paper")
    assert [p[2] for p in parts] == [[d] for d in ("cifar10", "cifar100", "tiny_imagenet", "imagenet")]
    assert [t.config.data for p in parts for t in p[0]] == [d for p in parts for d in p[2] * 3]
    assert len({t.out for p in parts for t in p[0]}) == 12
    recipes = [(t.config.recipe, t.config.method.recipe) for p in parts for t in p[0]]
    assert all(found == dataclasses.replace(own, warmup_whole=True) for found, own in recipes)
    assert [found.epochs for found, _ in recipes[:3]] == [30, 10, 30]
    (part,) = plan("mmcoa_in_distribution", "--data", "own.parquet")
    assert part[2] == ["own.parquet#holdout"] and part[0][0].config.data == "own.parquet#holdout"


def test_prompts(plan):
    (part,) = plan("mmcoa_prompts")
    assert names(part) == ["advpt", "vp", "tecoa", "mmcoa"] and part[1:3] == (USUAL, ["digits"])
    assert [t.model.split(":")[0] for t in part[0]] == ["prompted", "prompted", "local-dir", "local-dir"]
    assert part[0][0].config.recipe.optimizer == part[0][0].config.method.small.optimizer
    assert (part[0][0].config.method.context, part[0][1].config.method.frame) == (16, "empty")
    parts = plan("mmcoa_prompts", "--scale", "paper")
    assert [p[2] for p in parts] == [["cifar10"], ["cifar100"]]
    advpt, vp = (t.config for t in parts[0][0][:2])
    assert (advpt.method.context, advpt.method.eps, advpt.recipe.epochs) == (32, 8 / 255, 200)
    assert advpt.method.step_length == pytest.approx(1 / 255) and advpt.method.steps == 10
    assert (vp.method.frame, vp.method.tokens, vp.method.eps, vp.recipe.lr) == ("normal", 10, 1 / 255, 40)
    (large, _) = plan("mmcoa_prompts", "--scale", "paper", "--model", "ViT-B-16:openai")
    assert large[0][0].config.recipe.epochs == 100


def test_losses(plan):
    (part,) = plan("mmcoa_losses")
    weights = {t.name: (t.config.method.lambda_img, t.config.method.lambda_txt) for t in part[0]}
    assert weights == {"mmcoa image loss only": (0.5, 0), "mmcoa text loss only": (0, 0.5), "mmcoa": (0.5, 0.5)}
    assert len(plan("mmcoa_losses", "--scale", "paper")) == 4


def test_co_attack(plan):
    (part,) = plan("mmcoa_co_attack")
    assert part[1] == ["clean 32", "co-attack-10 32"] and len(part[0]) == 9
    parts = plan("mmcoa_co_attack", "--scale", "paper")
    assert [len(p[0]) for p in parts] == [3, 3, 3, 9] and [len(p[2]) for p in parts] == [1, 1, 1, 15]
    assert [p[0][0].config.resolution for p in parts] == ["native", "native", "native", "model"]
    assert [p[0][0].config.resize for p in parts] == ["plain", "plain", "plain", "antialias"]
    assert [p[4].protocol.resize for p in parts[:3]] == ["plain"] * 3
    assert parts[0][1] == ["clean 1", "co-attack-100 1"]


def test_partial(plan):
    (part,) = plan("mmcoa_partial")
    assert [t.config.method.trains for t in part[0]] == ["image", "all"] * 4
    assert names(part)[:2] == ["tecoa 5-shot image", "tecoa 5-shot whole"]
    (part,) = plan("mmcoa_partial", "--parts", "last-1", "--shots", "5")
    assert names(part) == ["tecoa last-1", "mmcoa last-1"]


def test_eps(plan):
    (part,) = plan("mmcoa_eps")
    assert names(part) == ["mmcoa"] and part[0][0].config.method.eps == 32 / 255
    assert part[1] == [f"{a} {e}" for e in (32, 64, 128) for a in ("clean", "pgd-10", "sep_pgd-10")]
    (part,) = plan("mmcoa_eps", "--scale", "paper", "--test-eps", "1/255,4/255")
    assert part[1] == [f"{a} {e}" for e in (1, 4) for a in ("clean", "pgd-100", "sep_pgd-100")]


def test_each_budget_is_a_row():
    by_budget = load("mmcoa_eps").by_budget
    clean = Row(
        model="m",
        dataset="d",
        attack="clean",
        eps=None,
        steps=None,
        n=1,
        top1=1,
        ci_low=0,
        ci_high=9,
        protocol={},
        cell="",
    )
    robust = dataclasses.replace(clean, attack="sep_pgd-10_eps64", eps=64 / 255, protocol={"step": 1, "norm": "linf"})
    assert by_budget(clean, "mmcoa").model == "mmcoa"
    row = by_budget(robust, "mmcoa")
    assert (row.model, row.attack, row.protocol) == ("mmcoa 64/255", "sep_pgd-10", {"norm": "linf"})


def test_interpolation(plan):
    (part,) = plan("mmcoa_interpolation", "--methods", "mmcoa")
    assert part[3] == [f"mmcoa a = {a}" for a in ("0.25", "0.5", "0.75", "1")]


def test_iterations(plan):
    (part,) = plan("mmcoa_iterations")
    assert part[3] == [f"{m} epoch {e}" for m in ("tecoa", "mmcoa") for e in (3, 6, 9, 12, 15)]
    assert {t.config.save_every_epochs for t in part[0]} == {3}
    (part,) = plan("mmcoa_iterations", "--scale", "paper")
    assert [t.keep_epochs for t in part[0]] == [tuple(range(1, 11)), tuple(range(4, 29, 4))]
    assert [t.config.shots for t in part[0]] == [50, 50]
    (part,) = plan("mmcoa_iterations", "--epochs", "7", "--every", "3")
    assert part[0][0].keep_epochs == (3, 6, 7)
    trial = part[0][0]
    assert trial.at_epoch(3).root == f"{trial.out}/epoch-3" and trial.at_epoch(7).root == trial.out


def test_saft_methods(plan):
    (part,) = plan("saft_methods")
    assert names(part) == ["ft-standard", "tecoa", "pmg-aft", "fare", "tga-zsr", "saft"]
    assert part[1] == ["clean 32", "pgd-10 32", "cw-10 32", "autoattack-seeds 32"]
    (part,) = plan("saft_methods", "--scale", "paper", "--captions", "t.parquet")
    assert len(part[2]) == 16 and {t.config.data for t in part[0]} == {"tiny_imagenet"}
    assert set(part[5].values()) == {"model"} == {t.config.resolution for t in part[0]}, "SAFT and TTC resize first"
    assert {(t.config.method.trains, t.config.method.step) for t in part[0]} == {("image", 1 / 255)}
    assert part[0][-1].config.method.captions == "t.parquet" and part[0][-1].config.method.steps == 2
    recipes = {t.name: t.config.recipe for t in part[0]}
    assert (recipes["ft-standard"].optimizer, recipes["ft-standard"].lr) == ("sgd", 1e-4), "CLIP-FT's"
    assert recipes["pmg-aft"].batch_size == 256 and part[0][2].config.method.form == "published"
    assert all(r.warmup_whole for r in recipes.values()) and recipes["saft"].warmup_steps == 1000


def test_saft_captions(plan):
    (part,) = plan("saft_captions")
    assert [(t.name, t.config.method.sets) for t in part[0]] == [("saft M=1", 1), ("saft M=3", 3), ("saft M=5", 5)]
    (part,) = plan("saft_captions", "--scale", "paper", "--captions", "L.parquet", "--sets", "5")
    assert [(t.name, t.config.method.captions) for t in part[0]] == [("saft M=5", "L.parquet")] and len(part[2]) == 16


def test_saft_sources(plan):
    (part,) = plan("saft_sources")
    assert names(part) == ["saft digits", "saft templates"] and {t.config.method.sets for t in part[0]} == {5}
    (part,) = plan("saft_sources", "--scale", "paper", "--sources", "a/L.parquet,b/M.parquet")
    found = [(t.name, t.config.method.captions) for t in part[0]]
    assert found == [("saft L", "a/L.parquet"), ("saft M", "b/M.parquet")]


def test_saft_scorers(plan):
    (part,) = plan("saft_scorers")
    assert names(part) == ["tecoa", "saft"]
    assert [s.name for s in part[4].scorers] == ["template", "cupl", "wca"]
    assert part[4].made_against == ("template", "own")
    (part,) = plan("saft_scorers", "--scale", "paper", "--captions", "t.parquet")
    assert [getattr(s, "captions", "") for s in part[4].scorers] == ["", "t.parquet", "t.parquet"]
    assert part[4].scorers[2].crops == 60


def test_ttc_defenses(plan):
    (part,) = plan("ttc_defenses")
    chains = part[4].defenses
    assert [[d.name for d in c] for c in chains] == [[], ["rn"], ["tte"], ["anti-adversary"], ["hedge"], ["ttc"]]
    assert [(t.name, t.config.method.trains) for t in part[0]] == [
        (name, "image") for name in ("ft-standard", "tecoa", "pmg-aft", "fare")
    ]
    assert chains[5][0].original == "digits" and chains[5][0].eps == pytest.approx(32 / 255)
    (part,) = plan("ttc_defenses", "--scale", "paper")
    ttc = part[4].defenses[5][0]
    assert (ttc.eps, ttc.step) == (pytest.approx(4 / 255), pytest.approx(1 / 255))
    assert part[1] == ["clean 1", "pgd-10 1"] and len(part[2]) == 16


def test_ttc_settings(plan):
    (part,) = plan("ttc_settings")
    settings = [(c[0].tau, c[0].beta, c[0].steps) for c in part[4].defenses[1:]]
    assert part[0] == [] and part[4].defenses[0] == ()
    assert len(settings) == len(set(settings)) == 9 and (0.2, 2, 2) in settings and (0.2, 2, 4) in settings


def test_referee(plan):
    (part,) = plan("referee")
    assert [t.name for t in part[0]] == ["tecoa", "fare"]
    assert part[1] == ["clean 32", "apgd-ce-10 32", "apgd-t-5 32"] and part[4].limit == 120
    chains = {chain[0].name: chain[0] for chain in part[4].defenses[1:]}
    assert len(chains) == 11 and chains["ttc"].tau == 0.4 and chains["tte"].crop == 0.875
    blind, gate, noise = part[4].aims
    assert (blind.gradient, gate.gradient, gate.draws) == ("ignore", "gate", 2) and noise.source == (chains["rn"],)
    few = plan(
        "referee", "--seeds", "2", "--adaptive-limit", "40", "--defenses", "none,ttc,rn:eps=8/255", "--aim", "bpda"
    )
    assert [(p[4].protocol.seed, p[4].limit, [a.name for a in p[4].aims]) for p in few] == [
        *((0, 120, ["ignore"]), (0, 40, ["bpda"]), (1, 120, ["ignore"]), (1, 40, ["bpda"]))
    ]
    assert few[0][4].defenses[2][0].eps == pytest.approx(8 / 255), "settings that are given stay"
    (part,) = plan("referee", "--scale", "paper")
    assert part[1] == ["clean 4", "apgd-ce_apgd-t 4"] and len(part[2]) == 14 and part[4].limit == 1000
    assert part[4].scorers[0].templates == "clip" and part[4].defenses[1][0].tau == 0.2
    assert part[4].subset == "robustvlm" and {part[5][one] for one in ("cifar10", "cifar100", "stl10")} == {"native"}
    assert part[5]["imagenet"] == part[5]["pcam"] == "clip" and {t.config.resolution for t in part[0]} == {"model"}


def test_the_joint_search_draws_the_same_settings_for_the_same_seed(monkeypatch, capsys, tmp_path):
    seen = []

    def note(name, trials, validation, evaluations, base, where, *, reduction):
        seen.append((trials, validation))
        return Found(scores={}, front=[], robust="", rows=[], labels={}, errors={})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rayclip.api.search", note)
    monkeypatch.setattr("rayclip.reports.rows.show_rows", lambda rows, labels: None)
    for args in (["--samples", "6"], ["--samples", "12"], ["--samples", "6", "--seed", "1"]):
        assert run_sweep(monkeypatch, capsys, "joint_search", *args)[0] == 0
    (short, validation), (long, _), (other, _) = seen
    assert short == long[:6] and {t.name for t in short}.isdisjoint(t.name for t in other)
    assert len({t.out for t in long}) == 12 and all(t.config.data == "digits#validation" for t in long)
    assert validation.data == "digits#validation"
    for trial in long:
        method = trial.config.method
        assert 0.5 <= method.eps / (32 / 255) <= 2 and method.lambda_img + method.lambda_txt == pytest.approx(1)
        assert 3e-4 < trial.config.recipe.lr < 3.2e-3 and trial.config.shots in (1, 5, None)
        assert trial.config.save_every_epochs == 1, "ASHA sees every epoch"


def test_models_can_be_shared_by_sweeps(plan, tmp_path):
    """The same training is the same folder, another one is another."""
    paper = ["--scale", "paper", "--models", "m"]
    own = {t.out for p in plan("mmcoa_in_distribution", *paper) for t in p[0]}
    assert {t.out for p in plan("mmcoa_co_attack", *paper)[:3] for t in p[0]} < own
    both = [t.out for p in plan("mmcoa_losses", *paper) for t in p[0] if t.name == "mmcoa"]
    assert set(both) < own
    shots, eps = plan("mmcoa_shots", "--models", "m")[0], plan("mmcoa_eps", "--models", "m")[0]
    places = {t.name: t.out for t in shots[0]}
    assert places["mmcoa full"] == eps[0][0].out and places["mmcoa full"].startswith(f"{tmp_path}/m/")
    other = plan("mmcoa_eps", "--models", "m", "--eps", "16/255")[0]
    assert other[0][0].out not in places.values()


def test_retrieval_writes_pairs_that_can_be_opened(tmp_path):
    from rayclip.data import open_pairs

    pairs = open_pairs(str(load("mmcoa_retrieval").write_digits(tmp_path / "pairs.parquet")))
    pairs.check()
    assert len(pairs) == 10 and pairs.native_size == (8, 8)
    assert pairs.captions[7][1] == "a handwritten seven" and len(set(sum(pairs.captions, ()))) == 50


def test_a_sweep_of_another_package(monkeypatch, capsys, tmp_path):
    """A file with a question and options of its own gets the common ones, with its defaults."""
    seen = []

    @sweep("my-question", every={"shots": "2"}, methods="tecoa", omit=["shots"])
    def main(run, *, depth: int = 3) -> None:
        """How deep?"""
        seen.append((depth, run.methods, run.shots, run.out.root))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["x", "--depth", "5"])
    with pytest.raises(SystemExit) as stop:
        start(main)
    assert stop.value.code == 0
    assert seen == [(5, ("tecoa",), [2], f"{tmp_path}/runs/my_question-digits")]
    monkeypatch.setattr("sys.argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        start(main)
    out = capsys.readouterr().out
    assert "How deep?" in out and "--depth" in out and "--shots" not in out
