"""An experiment against a real MLflow store."""

import io
import json
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from rayclip.tracking.experiment import Experiment
from rayclip.types import UserError


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    return Experiment(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db", "study")


def test_runs_nest_and_hold_params_metrics_tags_and_files(experiment, tmp_path):
    parent = experiment.start("sweep")
    child = experiment.start("trial", parent=parent, params={"method.eps": 1 / 255, "shots": None}, tags={"x": "y"})
    experiment.metrics(child, [("train/loss", 1 / (step + 1), step) for step in range(2500)], 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    experiment.artifact(child, tmp_path / "folder", "checkpoint")
    experiment.table(child, [{"model": "m", "top1": 5.0}, {"model": "n", "top1": 6.0}], "results_table.json")
    experiment.finish(child)
    experiment.finish(parent, failed=True)

    client = MlflowClient(experiment.uri)
    run = client.get_run(child)
    assert run.info.run_name == "trial" and run.info.status == "FINISHED"
    assert client.get_run(parent).info.status == "FAILED"
    assert run.data.tags["mlflow.parentRunId"] == parent and run.data.tags["x"] == "y"
    assert run.data.params == {"method.eps": str(1 / 255), "shots": "None"}
    assert len(client.get_metric_history(child, "train/loss")) == 2500
    assert {f.path for f in client.list_artifacts(child)} == {"checkpoint", "results_table.json"}
    assert "mlruns" in client.get_experiment(experiment.id).artifact_location


def test_a_run_is_known_by_its_id_and_by_its_key(experiment):
    run = experiment.start("elsewhere", key="key-1")
    assert experiment.exists(run) and not experiment.exists("0" * 32)
    assert experiment.find("key-1") == run and experiment.find("key-2") is None


def test_a_table_takes_the_place_of_the_one_before(experiment, tmp_path):
    run = experiment.start("sweep that went on")
    for rows in ([{"model": "m", "top1": 5.0}], [{"model": "m", "top1": 5.0}, {"model": "n", "top1": 6.0}]):
        experiment.table(run, rows, "results_table.json")
        client = MlflowClient(experiment.uri)
        table = json.loads(Path(client.download_artifacts(run, "results_table.json", str(tmp_path))).read_text())
        assert table == {"columns": ["model", "top1"], "data": [list(row.values()) for row in rows]}
        assert "results_table.json" in client.get_run(run).data.tags["mlflow.loggedArtifacts"], "the UI shows it"


def test_a_picture_is_there_once_whoever_logs_it_again(experiment, monkeypatch):
    run, png = experiment.start("pictures"), io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    for mine in (experiment, experiment, Experiment(experiment.uri, "study")):
        for key in ("digits-pgd", "digits-sep"):
            mine.image(run, key, png.getvalue())
    client = MlflowClient(experiment.uri)
    once = [f.path for f in client.list_artifacts(run, "images")]
    assert {re.split("[+%]", path)[0] for path in once} == {"images/digits-pgd", "images/digits-sep"}

    def arrives_and_fails(self, *args, log=MlflowClient.log_image, **options):
        log(self, *args, **options)
        raise ConnectionError

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(MlflowClient, "log_image", arrives_and_fails)
        experiment.image(run, "late", png.getvalue())
    experiment.image(run, "late", png.getvalue())
    assert len(client.list_artifacts(run, "images")) == len(once) * 3 // 2, "what had arrived is not sent again"


def test_a_relative_store_means_the_same_in_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment("sqlite:///here.db", "x")
    experiment.contact()
    assert experiment.uri == f"sqlite:///{tmp_path / 'here.db'}"
    assert (tmp_path / "here.db").is_file()


def test_a_store_out_of_reach_is_explained(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="cannot be reached"):
        Experiment("http://127.0.0.1:9", "study").contact()
    with pytest.raises(UserError, match=r"cannot write '/proc/none/x\.db'"):
        Experiment(f"sqlite:///{Path('/proc/none/x.db')}", "study").contact()
