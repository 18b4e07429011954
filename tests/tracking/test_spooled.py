"""What happens to entries while a real MLflow server is away, comes back, or was killed in the middle."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rayclip.store import Store
from rayclip.tracking import MlflowTracker, SpooledTracker
from rayclip.tracking.spool import Spool
from rayclip.types import UserError
from servers import MlflowServer


@pytest.fixture
def away(server, monkeypatch):
    """The server is away until it is called."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.kill()

    def back() -> None:
        server.start()

    yield back
    if server.process is None:
        server.start()


def make(server: MlflowServer, store: Store, study: str, *, known: bool = False) -> SpooledTracker:
    return SpooledTracker(MlflowTracker(server.uri, study), Spool(store), known=known)


def log_everything(tracker: SpooledTracker, folder: Path) -> str:
    parent, child = "key of the sweep", "key of the trial"
    tracker.start(parent, "sweep")
    tracker.start(child, "trial", parent=parent, params={"shots": None}, tags={"kind": "trial"})
    tracker.metrics(child, [("train/loss", 1.0, 0), ("train/loss", 0.5, 1), ("clean/digits", 99.0, 0)])
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "c.txt").write_text("content")
    tracker.artifact(child, folder / "a", "files")
    tracker.table(child, [{"model": "m", "top1": 5.0}], "table.json")
    tracker.finish(child)
    tracker.finish(parent, failed=True)
    return child


def made_runs(server: MlflowServer, study: str) -> dict[str, str]:
    """MLflow's ids by name; every name is there once."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(study)
    runs = client.search_runs([experiment.experiment_id])
    assert len({r.info.run_name for r in runs}) == len(runs)
    return {r.info.run_name: r.info.run_id for r in runs}


def what_is_there(server: MlflowServer, study: str, folder: Path) -> dict[str, object]:
    client = MlflowClient(server.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == study]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(r.info.run_name for r in runs) == ["sweep", "trial"]
    (child,) = [r for r in runs if r.info.run_name == "trial"]
    (parent,) = [r for r in runs if r.info.run_name == "sweep"]
    id_ = child.info.run_id
    return {
        "nested": child.data.tags["mlflow.parentRunId"] == parent.info.run_id,
        "status": (parent.info.status, child.info.status),
        "params": child.data.params,
        "loss": [(m.step, m.value) for m in client.get_metric_history(id_, "train/loss")],
        "clean": [m.value for m in client.get_metric_history(id_, "clean/digits")],
        "files": [f.path for f in client.list_artifacts(id_, "files/b")],
        "table": json.loads(Path(client.download_artifacts(id_, "table.json", str(folder))).read_text()),
    }


WHOLE = {
    "nested": True,
    "status": ("FAILED", "FINISHED"),
    "params": {"shots": "None"},
    "loss": [(0, 1.0), (1, 0.5)],
    "clean": [99.0],
    "files": ["files/b/c.txt"],
    "table": {"columns": ["model", "top1"], "data": [["m", 5.0]]},
}


def test_nothing_waits_while_the_server_answers(server, tmp_path):
    store = Store(str(tmp_path / "out"))
    tracker = make(server, store, "direct")
    child = log_everything(tracker, tmp_path)
    assert what_is_there(server, "direct", tmp_path) == WHOLE
    assert tracker.spool.names() == [] and tracker.close() == 0
    assert tracker.exists(child) and not tracker.exists("another key")


def test_what_is_logged_while_it_is_away_arrives_once_and_in_order(server, tmp_path, away):
    store = Store(str(tmp_path / "out"))
    with pytest.raises(UserError, match="cannot be reached"):
        make(server, store, "late")
    tracker = make(server, store, "late", known=True)
    child = log_everything(tracker, tmp_path)
    assert tracker.deliver() == 7 and tracker.exists(child)
    away()
    copies = {name: store.read(name) for name in tracker.spool.names()}
    again = make(server, store, "late", known=True)  # the next command delivers
    assert again.spool.names() == [] and store.names("spool/files", "") == []
    assert what_is_there(server, "late", tmp_path) == WHOLE
    assert again.exists(child), "known by its key, too"
    for name, content in copies.items():  # a driver that was killed before it could note what had arrived
        if b'"artifact"' not in content:
            store.write(name, content)
    (tmp_path / "out" / "mlflow_ids.json").unlink()
    assert make(server, store, "late").spool.names() == []
    assert what_is_there(server, "late", tmp_path) == WHOLE


def test_a_server_that_dies_in_the_middle_loses_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = make(server, Store(str(tmp_path)), "interrupted")
    run = "key"
    tracker.start(run, "trial")
    workers = Spool(Store(str(tmp_path)))
    for step in range(30):
        workers.metrics(run, [("train/loss", float(step), step)])
        if step == 10:
            server.kill()
        tracker.deliver()
    assert len(workers.names()) == 30 - 10
    server.start()
    assert tracker.close() == 0
    client = MlflowClient(server.uri)
    history = client.get_metric_history(made_runs(server, "interrupted")["trial"], "train/loss")
    assert [(m.step, m.value) for m in history] == [(i, float(i)) for i in range(30)]


def test_steps_that_are_trained_again_after_a_crash_count_once(server, tmp_path):
    tracker = make(server, Store(str(tmp_path)), "again")
    run = "key"
    tracker.start(run, "trial")
    for steps in (range(5), range(3, 8)):
        tracker.metrics(run, [("train/loss", float(s), s) for s in steps])
    other = make(server, Store(str(tmp_path)), "again")
    other.metrics(run, [("train/loss", float(s), s) for s in range(6, 10)])
    history = MlflowClient(server.uri).get_metric_history(made_runs(server, "again")["trial"], "train/loss")
    assert [m.step for m in history] == list(range(10))


def test_what_mlflow_will_never_take_is_set_aside_and_said(server, tmp_path, capsys):
    tracker = make(server, Store(str(tmp_path)), "refused")
    tracker.start("key", "trial")
    tracker.metrics("key", [("bad", "no number", 0)])
    tracker.metrics("key", [("good", 1.0, 0)])
    assert "MLflow refuses" in capsys.readouterr().err
    assert tracker.spool.names() == [] and len(list((tmp_path / "spool" / "refused").iterdir())) == 1
    run = made_runs(server, "refused")["trial"]
    assert [m.value for m in MlflowClient(server.uri).get_metric_history(run, "good")] == [1.0]


def test_what_belongs_to_a_run_that_was_refused_does_not_wait_for_ever(server, tmp_path, capsys):
    tracker = make(server, Store(str(tmp_path)), "never")
    client = MlflowClient(server.uri)
    client.delete_experiment(client.get_experiment_by_name("never").experiment_id)  # by somebody, meanwhile
    tracker.start("key", "trial")
    tracker.metrics("key", [("clean/digits", 1.0, 0)])
    tracker.finish("key")
    assert tracker.close() == 0 and not tracker.exists("key")
    assert len(list((tmp_path / "spool" / "refused").iterdir())) == 3
    assert capsys.readouterr().err.count("MLflow refuses") == 3
