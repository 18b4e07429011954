"""Names of people's files, models and studies on their way into a real MLflow: nothing is refused, and two stay two."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from mlflow import MlflowClient

from conftest import tiny_clip
from data.test_data import png, write
from rayclip.api.checks import Opened, plan_cells
from rayclip.api.logbook import Logbook
from rayclip.api.request import Evaluation
from rayclip.attacks import parse_attacks
from rayclip.evaluation import Protocol, Store
from rayclip.models.checkpoint import save_checkpoint
from rayclip.tracking.deliverer import Deliverer
from rayclip.tracking.experiment import Experiment
from rayclip.tracking.journal import Journal
from rayclip.tracking.registered import rank, register
from rayclip.types import Row, UserError

DATA = ["té st", "tè st", "te_st", "te|st[b]", "模型", "a%2e b#1?"]


def logged(uri, tmp_path, capsys, study="study"):
    """An evaluation of one model on data sets of these names, logged as `rayclip eval` does it; its run."""
    save_checkpoint(tiny_clip(), tmp_path / "m[x]'y", {})
    for i, name in enumerate(DATA):
        write(tmp_path / f"{name}.parquet", [0, 1, 2], [png(c, (8, 8)) for c in ("red", "blue", (i, i, i))])
    store = Store(str(tmp_path / "out"))
    evaluation = Evaluation(
        data=[str(tmp_path / f"{name}.parquet") for name in DATA],
        attacks=parse_attacks("clean,pgd", {"steps": 1, "step": 1 / 255, "substitutes": "clip-table"}),
        protocol=Protocol(eps=1 / 255),
    )
    model = f"local-dir:{tmp_path}/m[x]'y"
    cells, _ = plan_cells([model], evaluation, Opened(quiet=True))
    rows = [
        Row(
            model=c.model,
            dataset=c.dataset,
            attack=c.attack_label,
            eps=c.eps,
            steps=None,
            n=3,
            top1=10.0 * i,
            ci_low=0.0,
            ci_high=100.0,
            protocol=c.describe(),
            cell=c.id,
        )
        for i, c in enumerate(cells)
    ]
    for cell in cells:
        if cell.attack.name == "pgd":
            picture = png("green", (8, 8))
            columns = dict.fromkeys(("label", "clean_pred", "adv_pred"), np.zeros(1, int))
            columns |= {key: [picture] for key in ("clean", "difference", "adversarial")}
            store.write_table(f"cells/{cell.id}/examples/images.parquet", pa.table(columns))
    journal = Journal(store)
    deliverer = Deliverer(journal, Experiment(uri, study))
    with Logbook(journal, deliverer) as logbook:
        logbook.evaluation(f"eval {model}", None, rows, cells)
    assert capsys.readouterr().err == "" and deliverer.refused == []
    (run,) = journal.delivered(deliverer.experiment.address)["runs"].values()
    return run, rows


@pytest.mark.parametrize("kind", ["file", "server"])
def test_numbers_pictures_and_settings_of_every_name_arrive(request, mlflow_uri, tmp_path, capsys, kind):
    uri = mlflow_uri if kind == "file" else request.getfixturevalue("server").uri
    run, rows = logged(uri, tmp_path, capsys, study=f"a [study] of 'mine' / {kind}")
    client = MlflowClient(uri)
    data = client.get_run(run).data
    clean = {name: value for name, value in data.metrics.items() if name.startswith("clean/")}
    assert sorted(clean.values()) == sorted(r.top1 for r in rows if r.attack == "clean"), "each data set has its own"
    assert clean["clean/té st"] == rows[0].top1 and clean["clean/模型"] == rows[8].top1
    assert len([name for name in data.metrics if name.startswith("robust/")]) == len(DATA)
    assert len([name for name in data.tags if name.startswith("rayclip.data.")]) == len(DATA)
    pictures = [f.path for f in client.list_artifacts(run, "images") if f.path.endswith(".png")]
    assert len(pictures) >= len(DATA)
    assert all(client.download_artifacts(run, path, str(tmp_path)) for path in pictures)
    table = json.loads(Path(client.download_artifacts(run, "results_table.json", str(tmp_path))).read_text())
    assert {row[table["columns"].index("dataset")] for row in table["data"]} == set(DATA)


def test_metrics_that_are_sent_again_count_once_whatever_they_are_called(mlflow_uri):
    experiment = Experiment(mlflow_uri, "s")
    run = experiment.start("run")
    for _ in range(2):
        experiment.metrics(run, [("train/loss[x]", 0.5, 1)], 5)
    (name,) = experiment.client.get_run(run).data.metrics
    assert len(experiment.client.get_metric_history(run, name)) == 1


@pytest.mark.parametrize("study", ["bob's study", 'a "quoted" one', "a/b:c", "plain"])
def test_studies_of_every_name_have_their_own_registered_model(mlflow_uri, tmp_path, study):
    experiment = Experiment(mlflow_uri, study)
    other = Experiment(experiment.uri, study.replace("/", ":").replace("'", '"') + "2")
    save_checkpoint(tiny_clip(), tmp_path / "model", {})
    for each, fingerprint in ((experiment, "f1"), (other, "f2")):
        content = {
            "class_names": ["a"],
            "template": "a {}",
            "description": "",
            "tags": {"rayclip.model": fingerprint},
        }
        run = each.start("trial")
        register(each, run, tmp_path / "model", "checkpoint", content)
    rank(experiment, "protocol", {"f1": 50.0})
    models = MlflowClient(experiment.uri).search_registered_models()
    assert len(models) == 2 and sorted(len(m.aliases) for m in models) == [0, 1]


def test_a_run_with_a_long_name_keeps_both_ends(mlflow_uri):
    experiment = Experiment(mlflow_uri, "s")
    run = experiment.start("start " + 400 * "x" + " end", params={"k" * 400: 1})
    found = MlflowClient(experiment.uri).get_run(run)
    assert len(found.info.run_name) == 250 and found.info.run_name.startswith("start x")
    assert found.info.run_name.endswith("x end") and len(*found.data.params) <= 250


def test_a_study_that_was_deleted_is_told(mlflow_uri):
    experiment = Experiment(mlflow_uri, "gone")
    client = MlflowClient(experiment.uri)
    client.delete_experiment(experiment.id)
    with pytest.raises(UserError, match="'gone' was deleted: give another name, or run `mlflow experiments restore"):
        Experiment(experiment.uri, "gone").contact()
