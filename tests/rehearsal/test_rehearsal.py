"""Every file in `sweeps/` at the papers' scale on miniatures: to its table, its report and its runs in MLflow.

    pytest -m slow tests/rehearsal                           # all of them; 20 minutes on two cores
    RAYCLIP_REHEARSAL=1 pytest -m today tests/rehearsal      # a third of them: 0, 1 or 2, by default the day's

Only model, shots, epochs and the number of tested images are small, and by options that users have.
"""

import datetime
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from calling import run_here
from rayclip.data.registry import MMCOA_15, ZERO_SHOT_16
from rayclip.distributed.connect import ray_cluster
from rayclip.distributed.trials import Workers
from rayclip.evaluation import Store
from rayclip.evaluation.forecast import read_recorded
from rayclip.methods import METHODS
from rayclip.names import protocols
from rehearsal import miniatures

SWEEPS = sorted((Path(__file__).resolve().parents[2] / "sweeps").glob("*.py"))
KNOWN = {
    *("joint_search", "mmcoa_co_attack", "mmcoa_eps", "mmcoa_in_distribution", "mmcoa_interpolation"),
    *("mmcoa_iterations", "mmcoa_losses", "mmcoa_partial", "mmcoa_prompts", "mmcoa_retrieval", "mmcoa_shots"),
    *("saft_captions", "saft_methods", "saft_scorers", "saft_sources", "ttc_defenses", "ttc_settings"),
    *("methods_board", "referee"),
}
TODAY = int(os.environ.get("RAYCLIP_REHEARSAL") or datetime.date.today().timetuple().tm_yday) % 3
LIMIT = 1
PROTOCOL = protocols()["robustvlm"]
# Shots that the miniatures have where the papers' scale has more, and fewer models and crops. A new file in sweeps/ is
# rehearsed without an entry here; one that is known below is checked in more detail.
SMALL: dict[str, dict[str, object]] = {
    "joint_search": {"shots": "1,full", "samples": 3},
    "methods_board": {"passes": 25_000},  # a step of LEAF takes 20,000
    "mmcoa_co_attack": {"shots": 1, "methods": "tecoa,mmcoa"},
    "mmcoa_interpolation": {"a": "0.5,1"},
    "mmcoa_iterations": {"shots": 2},
    "mmcoa_partial": {"shots": 1, "methods": "mmcoa"},
    "mmcoa_shots": {"shots": "1,2,full", "methods": "tecoa,mmcoa"},
    "referee": {"methods": "tecoa", "defenses": "none,ttc", "draws": 1},
    "saft_scorers": {"crops": 4},
    "ttc_defenses": {"methods": "tecoa"},
}
OWN = {"cifar10", "cifar100", "tiny_imagenet", "imagenet"}
SEVERAL = {"clean", "pgd-100_eps1", "bert", "sep_pgd-100_eps1"}
# Of the sweeps that are there: data sets and attacks of the papers' scale
DATA = {
    "mmcoa_co_attack": set(MMCOA_15),  # its own data sets are among them
    "mmcoa_in_distribution": OWN,
    "mmcoa_losses": OWN,
    "mmcoa_prompts": {"cifar10", "cifar100"},
    "referee": set(PROTOCOL["data"][0].split(",")),
}
ATTACKS = {
    "mmcoa_co_attack": {"clean", "co-attack-100_eps1"},
    "mmcoa_eps": {"clean", *(f"{a}pgd-100_eps{e}" for a in ("", "sep_") for e in (1, 2, 4))},
    "mmcoa_retrieval": {"clean"},
    "methods_board": {"clean", "pgd-10_eps1", "autoattack-seeds_eps1"},
    "referee": {"clean", *(f"apgd-ce_apgd-t_eps4{through}" for through in ("", "_gate", "_from-rn"))},
    "saft_methods": {"clean", "pgd-100_eps1", "cw-100_eps1", "autoattack-seeds_eps1"},
    "saft_scorers": {"clean", "pgd-100_eps1", "pgd-100_eps1_on-template"},
    "saft_captions": {"clean", "pgd-100_eps1", "cw-100_eps1"},
    "saft_sources": {"clean", "pgd-100_eps1", "cw-100_eps1"},
    "ttc_defenses": {"clean", "pgd-10_eps1", "pgd-10_eps1_bpda"},
    "ttc_settings": {"clean", "pgd-10_eps1", "pgd-10_eps1_bpda"},
}

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[miniatures.Miniatures]:
    """The miniatures, and a Ray that all sweeps share, as they do their checkpoints."""
    made = miniatures.make(tmp_path_factory.mktemp("miniatures"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYCLIP_DATA", str(made.data))
        patch.setenv("RAYCLIP_MODELS", str(made.folder))  # which learned prompts name; workers get what is set now
        with ray_cluster():
            yield made


def options(sweep: Path, made: miniatures.Miniatures, mlflow_uri: str, **others: object) -> list[object]:
    """The options that make a sweep small, and those without which it cannot begin at the papers' scale.

    `others` stand in place of these, by name.
    """
    spec = importlib.util.spec_from_file_location(sweep.stem, sweep)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = {
        "captions": made.captions,
        "sources": f"{made.captions}/tiny_imagenet.parquet,templates",
        "epochs": 1,
        "substitutes": made.language_model,
    }
    has = inspect.signature(module.main).parameters
    found: dict[str, object] = {name: value for name, value in given.items() if name in has}
    found |= {"scale": "paper", "model": made.model, "limit": LIMIT, "out": made.folder / sweep.stem}
    found |= {"models": made.folder / "models", "tracking-uri": mlflow_uri}
    found |= SMALL.get(sweep.stem, {}) | others
    return ["--quiet", *(text for name, value in found.items() for text in (f"--{name}", value))]


@pytest.mark.parametrize(
    "sweep",
    [pytest.param(f, marks=[pytest.mark.today] * (i % 3 == TODAY), id=f.stem) for i, f in enumerate(SWEEPS)],
)
def test_a_sweep_of_the_papers_scale_reaches_its_end(sweep: Path, made: miniatures.Miniatures, mlflow_uri: str) -> None:
    out, name = made.folder / sweep.stem, sweep.stem
    done = run_here(made.folder, *options(sweep, made, mlflow_uri), program=sweep)
    assert "untouched" in done.stdout and f"results: {out}" in done.stdout and "failed" not in done.stderr
    rows = [row for file in out.rglob("results.json") for row in json.loads(file.read_text())]
    attacked = [row for row in rows if "worst_of" not in row["protocol"]]
    _check_cells(name, attacked)
    _check_verdicts(out)
    trained = _check_runs(name, mlflow_uri, {row["dataset"] for row in rows})
    run_here(made.folder, "report", out, "--out", out / "report.html", "--quiet")
    page = (out / "report.html").read_text()
    assert [label for label in trained if label not in page] == []


@pytest.mark.parametrize(("stem", "parts"), [("joint_search", 1), ("mmcoa_prompts", 2)])
def test_a_plan_says_what_the_papers_scale_takes(
    stem: str, parts: int, made: miniatures.Miniatures, mlflow_uri: str
) -> None:
    (sweep,) = (file for file in SWEEPS if file.stem == stem)
    out = made.folder / f"planned-{stem}"
    few = options(sweep, made, mlflow_uri, methods="mmcoa", models=made.folder / "none", out=out)
    said = run_here(made.folder, *few, "--plan", program=sweep).stdout
    assert said.count("first milestone, ") == parts and said.count("MLflow's store") == parts + (parts > 1)
    assert said.count("h on A100") == said.count("h on H100") == said.count("h on RTX 4090") == 2 * parts + (parts > 1)
    assert ("at most" in said, "all 2 parts" in said) == (stem == "joint_search", parts == 2)
    assert not list(out.rglob("*.parquet")), "what was measured does not count"


@pytest.mark.parametrize("stem", ["mmcoa_shots", "saft_methods"])
def test_planned_and_actual_time_are_near(stem: str, made: miniatures.Miniatures, mlflow_uri: str) -> None:
    """Core hours of a training that has all cores, and of all tests, each on one."""
    (sweep,) = (file for file in SWEEPS if file.stem == stem)
    out, models = made.folder / f"timed-{stem}", made.folder / f"timed-{stem}-models"
    longer = {"mmcoa_shots": {"shots": "full", "epochs": 20}, "saft_methods": {"epochs": 80}}
    more = {"methods": "tecoa", "limit": miniatures.TESTED, "models": models, "out": out}
    command = options(sweep, made, mlflow_uri, **more, **longer[stem])
    said = run_here(made.folder, *command, "--plan", program=sweep).stdout
    planned = re.search(r"core hours on cpu, (\d+) threads?: ([<.\d]+) of training, ([<.\d]+) of tests", said)
    run_here(made.folder, *command, program=sweep)
    trained = sum(json.loads(file.read_text())["seconds"] for file in models.rglob("rayclip.json"))
    tested = sum(read_recorded(file.parent.name, Store(str(out)))[1] for file in out.glob("cells/*/cell.json"))
    assert planned is not None
    threads, training, testing = planned.groups()
    assert int(threads) == Workers.for_cluster().threads(1), "as the training had"
    print(f"{stem}: planned {training} + {testing} h, took {int(threads) * trained / 3600:.4f} + {tested / 3600:.4f} h")
    assert int(threads) * trained / 3600 == pytest.approx(float(training), rel=0.25)
    assert tested / 3600 == pytest.approx(float(testing), rel=0.25)


def _check_cells(name: str, rows: list[dict[str, Any]]) -> None:
    """What the scale decides, as results say it."""
    clean = [row for row in rows if row["attack"] == "clean" and row["defense"] == "none"]
    plain = [row["top1"] for row in clean if row["scorer"] == "template"]  # as the miniatures' labels were found
    assert sum(plain) >= 50 * len(plain) and any(row["top1"] for row in clean), "there is something to attack"
    assert {row["n"] for row in rows} == {LIMIT}
    if name not in KNOWN:
        return
    mmcoa = name.startswith("mmcoa") or name == "joint_search"
    assert {row["dataset"] for row in rows} == DATA.get(name, set(MMCOA_15 if mmcoa else ZERO_SHOT_16))
    assert {row["attack"] for row in rows} == ATTACKS.get(name, SEVERAL)
    for row in rows:
        protocol, data = row["protocol"], row["dataset"]
        elsewhere, names, native = "model", "raw", mmcoa and data in miniatures.NATIVE
        if name == "referee":
            elsewhere, names, native = "clip", "curated", data in ("cifar10", "stl10", "cifar100")
            assert row["scorer"] == "ensemble:templates=clip"
        expected = ("native", "plain") if native else (elsewhere, "antialias")
        assert (protocol["resolution"], protocol["resize"], protocol["class_names"]) == (*expected, names), row
        if "stop" in protocol:
            steps = row["steps"] or protocol["iterations"]
            assert protocol["stop"] == "final" and steps == (10 if "pgd-10_" in row["attack"] else 100), row
        if row["attack"] == "bert":
            assert protocol["offset"] == "reference" and protocol["substitutes"].endswith("/bert")


def _check_verdicts(out: Path) -> None:
    """Attacks that are judged by their last iterate have taken all their steps."""
    taken = set()
    for file in out.rglob("cell.json"):
        cell = json.loads(file.read_text())
        steps = cell["protocol"].get("steps")
        if cell["protocol"].get("stop") == "final" and cell["protocol"]["attack"] in ("pgd", "cw"):
            for verdicts in file.parent.glob("*.parquet"):
                read = pq.read_table(verdicts, columns=["label", "clean_pred", "steps"]).to_pylist()
                taken |= {row["steps"] == steps for row in read if row["label"] == row["clean_pred"]}
    assert taken <= {True}


def _check_runs(name: str, mlflow_uri: str, data: set[str]) -> set[str]:
    """The runs in MLflow; return the names of the trainings that were tested."""
    client = MlflowClient(mlflow_uri)
    experiment = client.get_experiment_by_name(name.replace("_", "-"))
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {run.info.status for run in runs} == {"FINISHED"}
    kinds = {kind: [run for run in runs if run.data.tags["rayclip.kind"] == kind] for kind in ("train", "eval")}
    measured = {key.partition("/")[2] for run in kinds["eval"] for key in run.data.metrics if key.startswith("clean/")}
    assert measured == data
    trained = [run for run in kinds["train"] if run.data.params["method.name"] != "untouched"]
    for run in trained:
        params = run.data.params
        method = METHODS.find(params["method.name"])
        assert (params["recipe.epochs"] == "1" or name == "methods_board") and params["recipe.warmup_whole"] == "True"
        if name == "referee":
            assert (params["method.eps"], params["names"], params["resolution"]) == ("4/255", "curated", "model")
        elif name in KNOWN and name not in ("joint_search", "methods_board"):
            assert params["names"] == "raw"
            by_paper = ("advpt", "vp") if name.startswith("mmcoa") else ("ft-standard",)  # CLIP-FT there
            recipe = None if method.name in by_paper else method.recipe
            assert params["method.eps"] == ("8/255" if method.name == "advpt" else "1/255"), params
            assert params["method.steps"] == ("10" if name.startswith("mmcoa") else "2")
            assert recipe is None or (params["recipe.lr"], params["recipe.batch_size"]) == (
                str(recipe.lr),
                str(recipe.batch_size),
            )
            assert params["data"].split("/")[-1] in (OWN if name.startswith("mmcoa") else {"tiny_imagenet"})
    tested = {run.info.run_name.removeprefix("eval ") for run in kinds["eval"]}  # of a search, the front
    return {run.info.run_name for run in trained} & tested
