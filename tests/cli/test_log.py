"""`rayclip log`: a folder's journal reaches an MLflow of any kind, and what cannot be logged is one sentence."""

import pytest
from mlflow import MlflowClient

from calling import call
from rayclip.store import Store
from rayclip.tracking.journal import Journal


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, experiment in (("a", "study"), ("b/part", "")):
        journal = Journal(Store(str(tmp_path / name)))
        journal.add("start", name, key=name, name=f"run {name}", parent=None, params={}, tags={}, experiment=experiment)
        journal.metrics(name, [("clean/digits", 50.0, 0)])
    return tmp_path


def test_folders_and_their_parts_are_logged_to_their_experiments(here, monkeypatch, capsys):
    for _ in range(2):
        code, out, err = call(monkeypatch, capsys, "log", "a", "b")
        assert (code, err) == (0, "") and out.count(": 1 run in experiment") == 2
    client = MlflowClient(f"sqlite:///{here}/mlflow.db")
    found = {
        run.info.run_name: (client.get_experiment(run.info.experiment_id).name, run.data.metrics)
        for run in client.search_runs([e.experiment_id for e in client.search_experiments()])
    }
    assert found == {"run a": ("study", {"clean/digits": 50.0}), "run b/part": ("part", {"clean/digits": 50.0})}
    code, out, _ = call(monkeypatch, capsys, "log", "a", "--experiment", "another", "--tracking-uri", "sqlite:///x.db")
    assert code == 0 and "'another'" in out and (here / "x.db").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "has no journal"),
        (["a", "--tracking-uri", "http://127.0.0.1:9"], "cannot be reached"),
        (["a", "--tracking-uri", "http://me:secret@host"], "holds a secret"),
    ],
)
def test_what_cannot_be_logged_is_said(here, monkeypatch, capsys, arguments, sentence):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, out, err = call(monkeypatch, capsys, "log", *arguments)
    assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1 and ":secret@" not in err
