"""A real MLflow store gets every run once and whole, wherever a command was cut off."""

import errno
import itertools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from mlflow import MlflowClient

from rayclip.api import fine_tune
from rayclip.api.checks import Opened, check_training
from rayclip.api.logbook import Logbook, attack_params, untouched_params
from rayclip.api.request import Tracking, Where
from rayclip.attacks import parse_attacks
from rayclip.distributed.trials import Trial
from rayclip.evaluation import Cell, Protocol
from rayclip.methods import make_method
from rayclip.models import load_model
from rayclip.models.checkpoint import save_checkpoint
from rayclip.store import Store
from rayclip.tracking.deliverer import Deliverer, deliver_results
from rayclip.tracking.experiment import Experiment
from rayclip.tracking.journal import Journal, waits
from rayclip.training import TrainConfig
from rayclip.types import Row

ROW = Row(
    model="m", dataset="digits", attack="clean", eps=None, steps=None, n=8, top1=50.0, ci_low=40.0, ci_high=60.0,
    protocol={"attack": "clean", "seed": 0, "template": "a photo of {}.", "resolution": 32, "precision": "fp32"},
    cell="c",
)  # fmt: skip
CELL = Cell(
    model="m", model_fingerprint="f", data="digits", dataset="digits", data_fingerprint="g", class_names=("a", "b"),
    attack=parse_attacks("clean", {})[0], protocol=Protocol(),
)  # fmt: skip


def log(experiment: Experiment | None, store: Store) -> None:
    journal = Journal(store)
    with Logbook(journal, experiment and Deliverer(journal, experiment), "study") as logbook:
        sweep = logbook.open("sweep")
        logbook.evaluation("eval m", sweep, [ROW], [CELL])
        logbook.summary(sweep, [ROW], {})


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.mark.ci
def test_a_disk_that_is_full_at_any_write_leaves_every_run_once_and_whole(mlflow, tmp_path, monkeypatch):
    """The same command, started again when there is room, goes on in the runs that it had begun."""
    write, append = Store.write, Store.append
    for room in itertools.count():
        experiment, store = Experiment(mlflow, f"room for {room}"), Store(str(tmp_path / str(room)))
        left = iter(range(room))

        def if_there_is_room(do, left=left):
            def tried(self, name, data):
                if next(left, None) is None:
                    if do is append:
                        append(self, name, data[:9])
                    raise OSError(errno.ENOSPC, "No space left on device", name)
                do(self, name, data)

            return tried

        monkeypatch.setattr(Store, "write", if_there_is_room(write))
        monkeypatch.setattr(Store, "append", if_there_is_room(append))
        try:
            log(experiment, store)
        except OSError as error:
            full = error.errno == errno.ENOSPC
        else:
            full = False
        monkeypatch.setattr(Store, "write", write)
        monkeypatch.setattr(Store, "append", append)
        for _ in range(2):
            log(experiment, store)
        assert not waits(store, experiment.address)
        client = MlflowClient(mlflow)
        runs = {run.info.run_name: run for run in client.search_runs([experiment.id])}
        assert len(client.search_runs([experiment.id])) == len(runs) == 2
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        evaluation = runs["eval m"].info.run_id
        assert runs["eval m"].data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
        assert [m.value for m in client.get_metric_history(evaluation, "clean/digits")] == [50.0]
        for run in runs.values():
            table = client.download_artifacts(run.info.run_id, "results_table.json", str(tmp_path))
            assert len(json.loads(Path(table).read_text())["data"]) == 1
        if not full:
            break
    assert room > 10, "every write was the last once"


def test_a_trial_that_was_finished_but_not_logged_is_logged_by_the_next_start(mlflow, tmp_path):
    """Its driver was lost, or its disk was full, after the checkpoint and before the run was closed."""
    config = TrainConfig(
        method=make_method("tecoa"),
        recipe=make_method("tecoa").small,
        model="digits",
        data="digits",
        shots=1,
        precision="fp32",
    )
    trial = Trial(name="m", config=check_training(config, 1, Opened(quiet=True)), out=str(tmp_path / "m"))
    save_checkpoint(load_model("digits"), tmp_path / "m", {"digest": trial.config.digest()})
    where = Where(out=trial.out, tracking=Tracking(uri=mlflow, experiment="late"), quiet=True)
    assert not fine_tune(trial, where) and not (tmp_path / "m" / ".rayclip").exists(), "nothing was begun"
    with where.logbook(Store(trial.out).child(".rayclip")) as logbook:
        logbook.open("m")
    client = MlflowClient(mlflow)
    for _ in range(2):
        assert not fine_tune(trial, where)
        (run,) = client.search_runs([client.get_experiment_by_name("late").experiment_id])
        assert run.info.status == "FINISHED" and run.info.run_name == "m"
        assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {"checkpoint", "data"}
        assert len(client.search_model_versions("name = 'late'")) == 1


def test_the_same_again_adds_nothing_to_the_journal_and_a_baseline_stands_beside_its_trials(mlflow, tmp_path):
    experiment, store = Experiment(mlflow, "again"), Store(str(tmp_path))
    log(experiment, store)
    before = [event[:4] for event in Journal(store).read({})]
    log(experiment, store)
    assert [event[:4] for event in Journal(store).read({})] == before
    configs = [
        TrainConfig(
            method=make_method(name), recipe=make_method(name).small, model="digits", data="digits", shots=shots
        )
        for name, shots in (("tecoa", 1), ("mmcoa", 5))
    ]
    params = untouched_params("digits", configs)
    assert params.items() >= {"method.name": "untouched", "method.eps": "0/255", "shots": 0, "data": "digits"}.items()
    assert not [key for key in params if key.startswith("recipe.")] and "method.steps" not in params


def test_commands_that_log_the_same_at_once_leave_it_once(mlflow, tmp_path):
    store, steps = Store(str(tmp_path)), 20
    with ThreadPoolExecutor(3) as pool:
        alone = Barrier(3)

        def command():
            experiment = Experiment(mlflow, "at once")  # which does not exist yet
            alone.wait()
            log(experiment, store)
            with Logbook(Journal(store), Deliverer(Journal(store), experiment), "study") as logbook:
                trial, worker = logbook.open("trial"), Journal(store)
                for step in range(steps):
                    worker.metrics(trial, [("train/loss", 1.0 / (1 + step), step)])
                    logbook.deliver()
                logbook.end("trial")

        for done in [pool.submit(command) for _ in range(3)]:
            done.result()
    experiment = Experiment(mlflow, "at once")
    assert not waits(store, experiment.address) and not list(tmp_path.glob(".lease-*"))
    assert Counter(event.kind for event in Journal(store).read({}))["start"] == 3
    runs = {run.info.run_name: run for run in experiment.client.search_runs([experiment.id])}
    assert len(experiment.client.search_runs([experiment.id])) == len(runs) == 3
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    loss = experiment.client.get_metric_history(runs["trial"].info.run_id, "train/loss")
    assert sorted(m.step for m in loss) == list(range(steps))
    clean = experiment.client.get_metric_history(runs["eval m"].info.run_id, "clean/digits")
    assert [m.value for m in clean] == [50.0]


def test_what_was_not_tracked_can_be_logged_later(mlflow, tmp_path):
    log(None, Store(str(tmp_path)))
    for _ in range(2):
        (done,) = deliver_results(str(tmp_path), mlflow, None)
        assert (done.experiment, done.runs, done.refused) == ("study", 2, 0)
    experiment = Experiment(mlflow, "study")
    runs = {run.info.run_name: run.data for run in experiment.client.search_runs([experiment.id])}
    assert runs.keys() == {"sweep", "eval m"} and runs["eval m"].metrics == {"clean/digits": 50.0}


def test_an_evaluations_settings_are_said_once():
    attacked = replace(
        ROW, attack="pgd-1_eps32", protocol={**ROW.protocol, "attack": "pgd", "eps": "32/255", "steps": 1}
    )
    other = replace(
        attacked, attack="pgd-1_eps16", protocol={**attacked.protocol, "eps": "16/255", "precision": "bf16"}
    )
    params = attack_params([ROW, attacked, other])
    shared = {key: ROW.protocol[key] for key in ("seed", "template", "resolution")}
    assert {key: params[f"protocol.{key}"] for key in shared} == shared and "protocol.precision" not in params
    assert params["attack.pgd-1_eps32.eps"] == "32/255" and params["attack.pgd-1_eps16.precision"] == "bf16"
    assert "attack.pgd-1_eps32.seed" not in params
