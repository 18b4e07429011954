"""Every file in `sweeps/` at the papers' scale on miniatures: to its table, its report and its runs in MLflow.

    pytest -m slow tests/rehearsal                           # all of them; some minutes
    RAYCLIP_REHEARSAL=1 pytest -m today tests/rehearsal      # a third of them: 0, 1 or 2, by default the day's

Only model, shots, epochs and the number of tested images are small, and by options that users have.
"""

import datetime
import importlib.util
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from calling import run_here
from rayclip.data.registry import MMCOA_15, ZERO_SHOT_16
from rayclip.distributed.connect import ray_cluster
from rayclip.methods import METHODS
from rehearsal import miniatures

SWEEPS = sorted((Path(__file__).resolve().parents[2] / "sweeps").glob("*.py"))
KNOWN = {
    *("joint_search", "mmcoa_co_attack", "mmcoa_eps", "mmcoa_in_distribution", "mmcoa_interpolation"),
    *("mmcoa_iterations", "mmcoa_losses", "mmcoa_partial", "mmcoa_prompts", "mmcoa_retrieval", "mmcoa_shots"),
    *("saft_captions", "saft_methods", "saft_scorers", "saft_sources", "ttc_defenses", "ttc_settings"),
}
TODAY = int(os.environ.get("RAYCLIP_REHEARSAL") or datetime.date.today().timetuple().tm_yday) % 3
LIMIT = 1
# Shots that the miniatures have where the papers' scale has more, and fewer models and crops. A new file in sweeps/ is
# rehearsed without an entry here; one that is known below is checked in more detail.
SMALL = {
    "joint_search": ["--shots", "1,full", "--samples", "3"],
    "mmcoa_co_attack": ["--shots", "1", "--methods", "tecoa,mmcoa"],
    "mmcoa_interpolation": ["--a", "0.5,1"],
    "mmcoa_iterations": ["--shots", "2"],
    "mmcoa_partial": ["--shots", "1", "--methods", "mmcoa"],
    "mmcoa_shots": ["--shots", "1,2,full", "--methods", "tecoa,mmcoa"],
    "referee": ["--methods", "tecoa", "--defenses", "none,ttc", "--draws", "1"],
    "saft_scorers": ["--crops", "4"],
    "ttc_defenses": ["--methods", "tecoa"],
}
OWN = {"cifar10", "cifar100", "tiny_imagenet", "imagenet"}
SEVERAL = {"clean", "pgd-100_eps1", "bert", "sep_pgd-100_eps1"}
# Of the sweeps that are there: data sets and attacks of the papers' scale
DATA = {
    "mmcoa_co_attack": set(MMCOA_15),  # its own data sets are among them
    "mmcoa_in_distribution": OWN,
    "mmcoa_losses": OWN,
    "mmcoa_prompts": {"cifar10", "cifar100"},
}
ATTACKS = {
    "mmcoa_co_attack": {"clean", "co-attack-100_eps1"},
    "mmcoa_eps": {"clean", *(f"{a}pgd-100_eps{e}" for a in ("", "sep_") for e in (1, 2, 4))},
    "mmcoa_retrieval": {"clean"},
    "saft_methods": {"clean", "pgd-100_eps1", "cw-100_eps1", "autoattack-seeds_eps1"},
    "saft_scorers": {"clean", "pgd-100_eps1"},
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


def options(sweep: Path, made: miniatures.Miniatures, mlflow_uri: str) -> list[object]:
    """The options that make a sweep small, and those without which it cannot begin at the papers' scale."""
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
    found: list[object] = [text for name, value in given.items() if name in has for text in (f"--{name}", value)]
    found += ["--scale", "paper", "--model", made.model, "--limit", LIMIT, "--out", made.folder / sweep.stem]
    found += ["--models", made.folder / "models", "--tracking-uri", mlflow_uri, "--quiet"]
    return found + list(SMALL.get(sweep.stem, []))


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
    few = ["--methods", "mmcoa", "--models", made.folder / "none", "--out", out, "--plan"]
    said = run_here(made.folder, *options(sweep, made, mlflow_uri), *few, program=sweep).stdout
    assert said.count("first milestone, ") == parts and said.count("MLflow's store") == parts + (parts > 1)
    assert said.count("h on A100") == said.count("h on H100") == said.count("h on RTX 4090") == 2 * parts + (parts > 1)
    assert ("at most" in said, "all 2 parts" in said) == (stem == "joint_search", parts == 2)
    assert not list(out.rglob("*.parquet")), "what was measured does not count"


def _check_cells(name: str, rows: list[dict[str, Any]]) -> None:
    """What the scale decides, as results say it."""
    untouched = [row["top1"] for row in rows if row["attack"] == "clean" and row["defense"] == "none"]
    assert sum(untouched) / len(untouched) > 50, "there is something to attack"
    assert {row["n"] for row in rows} == {LIMIT}
    if name not in KNOWN:
        return
    mmcoa = name.startswith("mmcoa") or name == "joint_search"
    assert {row["dataset"] for row in rows} == DATA.get(name, set(MMCOA_15 if mmcoa else ZERO_SHOT_16))
    assert {row["attack"] for row in rows} == ATTACKS.get(name, SEVERAL)
    for row in rows:
        protocol, data = row["protocol"], row["dataset"]
        native = mmcoa and data in miniatures.NATIVE
        if "resolution" in protocol:
            expected = ("native", "plain") if native else ("model", "antialias")
            assert (protocol["resolution"], protocol["resize"]) == expected, row
        assert protocol["class_names"] == "raw"
        if "stop" in protocol:
            assert protocol["stop"] == "final" and row["steps"] == (10 if "pgd-10_" in row["attack"] else 100)
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
        assert params["recipe.epochs"] == "1" and params["recipe.warmup_whole"] == "True"
        if name in KNOWN and name != "joint_search":
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
