"""What happens to events while a real MLflow server is away, comes back, or was killed in the middle."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from conftest import tiny_clip
from rayclip.models.checkpoint import save_checkpoint
from rayclip.store import Store
from rayclip.tracking.deliverer import Deliverer, deliver_results
from rayclip.tracking.experiment import Experiment
from rayclip.tracking.journal import Journal, waits
from rayclip.types import UserError
from servers import MlflowServer
from tracking.test_journal import older


@pytest.fixture
def away(server, monkeypatch):
    """The server is away until it is called."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.kill()
    yield server.start
    if server.process is None:
        server.start()


def make(server: MlflowServer, journal: Journal, study: str) -> Deliverer:
    return Deliverer(Journal(journal.store), Experiment(server.uri, study))


@pytest.fixture
def journal(tmp_path):
    return Journal(Store(str(tmp_path / "out")))


def start(journal: Journal, run: str, name: str, parent: str | None = None, **content: object) -> None:
    content = {"params": {}, "tags": {}, "cells": [], "experiment": "", **content}
    journal.add("start", run, key=name, name=name, parent=parent, **content)


def log_everything(journal: Journal) -> str:
    parent, child = "key of the sweep", "key of the trial"
    start(journal, parent, "sweep")
    start(journal, child, "trial", parent, params={"shots": "None"}, tags={"kind": "trial"})
    journal.metrics(child, [("train/loss", 1.0, 0), ("train/loss", 0.5, 1), ("clean/digits", 99.0, 0)])
    journal.add("artifact", child, folder="files", files={"b/c.txt": journal.keep(b"content")})
    journal.add("table", child, rows=[{"model": "m", "top1": 5.0}], name="table.json")
    journal.add("finish", child, failed=False, complete=True)
    journal.add("finish", parent, failed=True, complete=False)
    return child


def made_runs(server: MlflowServer, study: str) -> dict[str, str]:
    """MLflow's ids by name; every name is there once."""
    client = MlflowClient(server.uri)
    runs = client.search_runs([client.get_experiment_by_name(study).experiment_id])
    assert len({r.info.run_name for r in runs}) == len(runs)
    return {r.info.run_name: r.info.run_id for r in runs}


def what_is_there(server: MlflowServer, study: str, folder: Path) -> dict[str, object]:
    client, ids = MlflowClient(server.uri), made_runs(server, study)
    assert sorted(ids) == ["sweep", "trial"]
    parent, child = client.get_run(ids["sweep"]), client.get_run(ids["trial"])
    id_ = ids["trial"]
    return {
        "nested": child.data.tags["mlflow.parentRunId"] == ids["sweep"],
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


def test_nothing_waits_while_the_server_answers(server, journal, tmp_path):
    deliverer = make(server, journal, "direct")
    child = log_everything(journal)
    assert waits(journal.store, deliverer.experiment.address)
    assert deliverer.deliver() == 0 == deliverer.close()
    assert what_is_there(server, "direct", tmp_path) == WHOLE
    assert not waits(journal.store, deliverer.experiment.address)
    assert deliverer.has(child) and not deliverer.has("another run")


@pytest.mark.ci
def test_what_is_logged_while_it_is_away_arrives_once_and_in_order(server, journal, tmp_path, away):
    with pytest.raises(UserError, match="cannot be reached"):
        make(server, journal, "late")
    journal.note_delivered(f"{server.uri} late", {})  # it has been reached before
    deliverer = make(server, journal, "late")
    child = log_everything(journal)
    assert deliverer.deliver() == 7 and deliverer.has(child)
    away()
    again = make(server, journal, "late")  # the next command delivers
    assert again.deliver() == 0 and what_is_there(server, "late", tmp_path) == WHOLE
    assert again.has(child)
    for note in (tmp_path / "out" / "journal").glob("delivered-*"):  # a driver that was killed before it could note
        note.unlink()
    assert make(server, journal, "late").deliver() == 0
    assert what_is_there(server, "late", tmp_path) == WHOLE


def test_a_folder_is_delivered_to_a_server_that_has_never_seen_it_and_twice_is_once(server, journal, tmp_path):
    log_everything(journal)
    clip = tiny_clip()
    save_checkpoint(clip, tmp_path / "out" / "models" / "m", {})
    about = {"class_names": ["a"], "template": "a {}", "description": "", "tags": {"rayclip.model": clip.fingerprint()}}
    place = journal.relative(str(tmp_path / "out" / "models" / "m"))
    journal.add("checkpoint", "key of the trial", place=place, folder="checkpoint", about=about)
    (tmp_path / "out").rename(tmp_path / "moved")
    for _ in range(2):
        (done,) = deliver_results(str(tmp_path / "moved"), server.uri, "replayed")
        assert (done.experiment, done.runs, done.refused) == ("replayed", 2, 0)
        assert what_is_there(server, "replayed", tmp_path) == WHOLE
        assert len(MlflowClient(server.uri).search_model_versions("name = 'replayed'")) == 1
    client = MlflowClient(server.uri)
    for run in made_runs(server, "replayed").values():  # somebody deletes them there
        client.delete_run(run)
    deliver_results(str(tmp_path / "moved"), server.uri, "replayed")
    assert what_is_there(server, "replayed", tmp_path) == WHOLE
    with pytest.raises(UserError, match="no journal"):
        deliver_results(str(tmp_path / "nothing"), server.uri, None)


def test_a_journal_on_an_object_store_is_delivered(server, s3, tmp_path):
    place = Store(s3).child("replayed")
    log_everything(Journal(place))
    for _ in range(2):
        (done,) = deliver_results(place.root, server.uri, "from an object store")
        assert (done.runs, done.refused) == (2, 0)
        assert what_is_there(server, "from an object store", tmp_path) == WHOLE


@pytest.mark.ci
def test_a_server_that_dies_in_the_middle_loses_nothing(server, journal, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    deliverer, worker = make(server, journal, "interrupted"), Journal(journal.store)
    start(journal, "key", "trial")
    for step in range(30):
        worker.metrics("key", [("train/loss", float(step), step)])
        if step == 10:
            server.kill()
        left = deliverer.deliver()
    assert left == 30 - 10
    server.start()
    assert deliverer.close() == 0
    history = MlflowClient(server.uri).get_metric_history(made_runs(server, "interrupted")["trial"], "train/loss")
    assert [(m.step, m.value) for m in history] == [(i, float(i)) for i in range(30)]


def test_steps_that_are_trained_again_after_a_crash_count_once(server, journal):
    make(server, journal, "again")
    start(journal, "key", "trial")
    for steps in (range(5), range(3, 8)):
        Journal(journal.store).metrics("key", [("train/loss", s + 0.1 * len(steps), s) for s in steps])
    journal.metrics("key", [("clean/digits", 1.0, 0)])
    make(server, journal, "again").deliver()
    Journal(journal.store).metrics("key", [("train/loss", s + 0.2, s) for s in range(6, 10)])
    for value in (1.0, 2.0):
        journal.metrics("key", [("clean/digits", value, 0)])
    make(server, journal, "again").deliver()
    client, run = MlflowClient(server.uri), made_runs(server, "again")["trial"]
    assert [m.step for m in client.get_metric_history(run, "train/loss")] == list(range(10))
    assert [m.value for m in client.get_metric_history(run, "clean/digits")] == [1.0, 2.0], "what changes is logged"


def test_a_worker_whose_clock_is_ahead_of_the_drivers_is_heard(server, journal):
    deliverer = make(server, journal, "clocks")
    Journal(journal.store).add("metrics", "key", time_ms=5, values=[["train/loss", 1.0, 0]])
    start(journal, "key", "trial")
    assert deliverer.deliver() == 0 and deliverer.refused == []
    run = MlflowClient(server.uri).get_run(made_runs(server, "clocks")["trial"])
    assert run.data.metrics == {"train/loss": 1.0}


def test_what_mlflow_will_never_take_is_noted_and_said(server, journal, capsys):
    start(journal, "key", "trial")
    for name, value in (("bad", "no number"), ("good", 1.0)):
        journal.metrics("key", [(name, value, 0)])
    journal.add("never heard of", "key")
    journal.add("checkpoint", "key", place="gone", folder="checkpoint", about={})
    assert make(server, journal, "refused").deliver() == 0
    assert capsys.readouterr().err.count("MLflow refuses") == 3
    again = make(server, journal, "refused")
    assert [refused["event"] for refused in again.refused] == ["metrics", "never heard of", "checkpoint"]
    run = made_runs(server, "refused")["trial"]
    assert [m.value for m in MlflowClient(server.uri).get_metric_history(run, "good")] == [1.0]
    assert capsys.readouterr().err == ""


def test_what_belongs_to_a_run_that_was_refused_does_not_wait_for_ever(server, journal, capsys):
    deliverer = make(server, journal, "never")
    client = MlflowClient(server.uri)
    client.delete_experiment(client.get_experiment_by_name("never").experiment_id)  # by somebody, meanwhile
    start(journal, "key", "trial")
    journal.metrics("key", [("clean/digits", 1.0, 0)])
    journal.add("finish", "key", failed=False, complete=True)
    assert deliverer.close() == 0 and not deliverer.has("key") and len(deliverer.refused) == 3
    assert capsys.readouterr().err.count("MLflow refuses") == 3


def test_an_earlier_versions_queue_is_delivered_where_its_runs_are(server, journal, capsys):
    experiment = Experiment(server.uri, "study")
    begun = experiment.start("eval m")
    older(journal.store, entries=[("metrics", "a" * 32, [["clean/digits", 7.0, 0]])])
    saved = journal.store.read_json("runs.json") | {"tracker": experiment.address}
    journal.store.write_json("runs.json", saved)
    journal.store.write_json("mlflow_ids.json", {"a" * 32: begun})
    (done,) = deliver_results(journal.store.root, server.uri, None)
    assert (done.experiment, done.runs, done.refused) == ("study", 1, 0)
    assert MlflowClient(server.uri).get_run(begun).data.metrics == {"clean/digits": 7.0}
    (elsewhere,) = deliver_results(journal.store.root, server.uri, "elsewhere")
    assert (elsewhere.runs, elsewhere.refused) == (0, 1), "they do not say how they began"


def test_a_journal_that_somebody_wrote_reaches_no_file_outside(mlflow_uri, tmp_path, journal):
    (tmp_path / "secret").write_text("x")
    start(journal, "key", "run")
    kept = journal.keep(b"x")
    for files in ({f"{tmp_path}/planted": kept}, {"../planted": kept}, {"taken": "../secret"}):
        journal.add("artifact", "key", folder="", files=files)
    journal.add("image", "key", key="k", file="../secret")
    journal.add("checkpoint", "key", place=str(tmp_path), folder="checkpoint", about={})
    journal.add("checkpoint", "key", place="../..", folder="checkpoint", about={})
    deliverer = Deliverer(journal, Experiment(mlflow_uri, "study"))
    assert len(deliverer.refused) == 6 and not (tmp_path / "planted").exists()


def deliver_and_be_killed(server, store, study, calls):
    """Deliver in a process that is killed right after MLflow has taken so many calls: they arrived, nobody noted it."""
    left = iter(range(calls))

    def counted(call):
        def made(*args, **options):
            found = call(*args, **options)
            if next(left, None) is None:
                os._exit(9)
            return found

        return made

    for name in ("create_run", "log_batch", "log_artifacts", "log_table", "log_dict", "set_terminated"):
        setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    assert Deliverer(Journal(store), Experiment(server.uri, study)).deliver() == 0


@pytest.mark.ci
def test_a_command_that_is_killed_after_any_call_leaves_everything_once(server, journal, tmp_path):
    log_everything(journal)
    context, codes = multiprocessing.get_context("fork"), []
    while not codes or codes[-1] != 0:
        arguments = (server, journal.store, "killed", len(codes) // 2)
        process = context.Process(target=deliver_and_be_killed, args=arguments)
        process.start()
        process.join()
        codes.append(process.exitcode)
        for note in (tmp_path / "out" / "journal").glob("delivered-*"):
            note.unlink()
    assert len(codes) > 4 and set(codes[:-1]) == {9}
    assert what_is_there(server, "killed", tmp_path) == WHOLE
