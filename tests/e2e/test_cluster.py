"""Work that is sent from elsewhere to a cluster of two nodes, of three, and of none that grows.

Tokens on, MLflow with users on PostgreSQL, data, checkpoints and results on an object store. What breaks in the middle
is in test_faults.py.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from e2e.alone import evaluate_alone
from e2e.faults import TRAIN
from e2e.local_cluster import local_cluster
from e2e.mlflow_server import mlflow_server
from e2e.test_commands import RAYCLIP, curve, run, verdicts
from e2e.test_data import save_digits
from e2e.test_models import changed_digits
from e2e.three_protocols import evaluate as evaluate_protocols
from rayclip.models.checkpoint import save_checkpoint
from rayclip.store import Store
from servers import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
SUITE = (
    "clean,fgsm,pgd,pgd-l2,cw,apgd-ce:iterations=3,apgd-dlr:iterations=3,apgd-t:iterations=2,targets=2,"
    "fab-t:iterations=2,targets=2,square:queries=9,autoattack:iterations=2,queries=5,autoattack-seeds:iterations=2,"
    "feature,semantic,transfer:source=digits,bert,sep,co-attack:steps=3,sga"
)
TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
DATA, LIMIT, IMAGES = ("digits", "own"), 3, 60


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    before = dict(os.environ)
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        os.environ.update(server.client_env)
        yield server
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def two_nodes(server, object_store):
    """They hold the passwords, which never come with a job, and know where the data are."""
    known = {k: v for k, v in server.client_env.items() if k != "MLFLOW_TRACKING_URI"} | object_store.env
    known["RAYCLIP_DATA"] = object_store.place("data")
    with local_cluster(2, known) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three_nodes(two_nodes):
    """Three others, each with files of its own: what they share is on the object store."""
    while two_nodes.nodes:
        two_nodes.kill_node(0)
    two_nodes.add_nodes(3, apart=True)
    return two_nodes


def submit(cluster, server, *sweep):
    """`ray job submit` from a machine that has only the dashboard's address and the token."""
    ours = {*server.client_env, "RAY_ADDRESS", "RAYCLIP_DATA", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    env = {k: v for k, v in cluster.env.items() if k not in ours}
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster.dashboard]
    job = ["--working-dir", ".", "--", "python", "sweeps/mmcoa_shots.py", *map(str, sweep), "--quiet"]
    command = [*ray, *job, "--tracking-uri", server.uri]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, start_new_session=True)


def finished(process, server):
    """What a job has printed."""
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stdout[-3000:] + stderr[-3000:]
    assert server.password not in stdout + stderr
    return stdout


def runs_of(sweep):
    """All runs of a sweep, the last of this name, by name."""
    client = MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("mmcoa-shots").experiment_id])
    root = max((run for run in found if run.info.run_name == sweep), key=lambda run: run.info.start_time)
    family, more = {root.info.run_id}, True
    while more:
        more = {r.info.run_id for r in found if r.data.tags.get("mlflow.parentRunId") in family} - family
        family |= more
    mine = [run for run in found if run.info.run_id in family]
    assert {run.info.status for run in mine} == {"FINISHED"}
    return {run.info.run_name: run for run in mine}


def test_three_protocols_are_one_plan(two_nodes, tmp_path):
    script = Path(__file__).with_name("three_protocols.py")
    subprocess.run([sys.executable, script, tmp_path / "there", "cluster"], env=two_nodes.env, check=True)
    (ran,) = json.loads((tmp_path / "there" / "evaluations.json").read_text())
    assert ran["workers"] == 2
    evaluate_protocols(str(tmp_path / "here"), None)
    mine = verdicts(tmp_path / "here")
    cells = [json.loads(file.read_text()) for file in (tmp_path / "here").glob("cells/*/cell.json")]
    assert {cell["scorer_label"] for cell in cells} == {
        "template",
        *(f"ensemble:templates={t}" for t in ("clip", "coop")),
    }
    assert len(mine) == 12 * len(cells) and verdicts(tmp_path / "there") == mine


def test_training_goes_on_with_fewer_workers(server, two_nodes, tmp_path):
    """One of two nodes is lost for good: the run ends all the same, with every step once."""
    train = [
        "10" if part == "5" and before == "--epochs" else part
        for before, part in zip(["", *TRAIN], TRAIN, strict=False)
    ]
    command = [*RAYCLIP, *train, "--min-workers", "1", "--tracking-uri", "sqlite:///mlflow.db"]
    command += ["--out", "m", "--json-logs"]
    process = subprocess.Popen(command, cwd=tmp_path, env=two_nodes.env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(tmp_path.glob("m/.rayclip/unfinished/train-*/checkpoint_*")))
    two_nodes.kill_node(1)
    said = process.communicate(timeout=400)[1]
    assert process.returncode == 0, said[-3000:]
    assert "1 of 2 workers" in said
    lost, losses = curve(tmp_path, "m")
    assert lost.info.status == "FINISHED" and sorted(losses) == list(range(1, 51))
    assert two_nodes.workers("ray::RayTrainWorker") == [], "and nothing is left of it"


@pytest.fixture(scope="module")
def data(object_store, tmp_path_factory):
    """A data set below `RAYCLIP_DATA`."""
    place = tmp_path_factory.mktemp("laptop")
    save_digits(place / "images", every=8)
    prepare = ["data", "prepare", "own", "--source", "folder", place / "images", "--quiet"]
    run(place, *prepare, "--root", object_store.place("data"))


@pytest.fixture
def swept(server, object_store, three_nodes, data, request):
    """Where a sweep has left everything that lost the client that submitted it, and later, if wanted, its driver."""
    out = Store(object_store.place(f"sweep-{request.param}"))
    sweep = ["--scale", "pocket", "--model", "digits", "--data", "own", "--test", "own", "--shots", 1]
    methods = ["tecoa"] if request.param == "client" else ["ft-standard", "tecoa"]
    sweep += ["--methods", ",".join(methods), "--epochs", 12, "--workers", 2, "--limit", 10, "--eps", "32/255"]
    sweep += ["--substitutes", "clip-table", "--out", out.root]
    trials = [out.child("models").child(name) for name in methods]

    def finished_trials():
        return [trial for trial in trials if trial.size("rayclip.json")]

    client = submit(three_nodes, server, *sweep)
    wait_for(lambda: any(name.startswith("train-") for name in out.child("unfinished").folders()), every=0.3)
    os.killpg(client.pid, signal.SIGKILL)
    assert not finished_trials(), "it is in the middle of training"
    wait_for(finished_trials, every=0.3)
    if request.param == "client":  # the job goes on without it
        wait_for(lambda: not three_nodes.workers("python sweeps/mmcoa_shots.py"), every=0.3)
        return out, methods, None, True
    (driver,) = three_nodes.workers("python sweeps/mmcoa_shots.py")
    driver.kill()
    (done,) = finished_trials()  # there is a trial left
    before = written(done)
    said = finished(submit(three_nodes, server, *sweep), server)
    return out, methods, said, written(done) == before


def written(store):
    """When each file was written."""
    system, place = store.filesystem()
    names = store.names("", "")
    return {info.base_name: info.mtime_ns for info in system.get_file_info([f"{place}/{name}" for name in names])}


@pytest.mark.parametrize("swept", ["client", pytest.param("driver", marks=pytest.mark.slow)], indirect=True)
def test_a_sweep_whose_client_or_driver_was_lost_repeats_no_finished_trial(server, swept):
    out, methods, said, untouched = swept
    assert untouched, "the first trial's checkpoint is the one of before"
    assert said is None or all(name in said for name in ("untouched digits", *methods))
    assert not out.child("unfinished").folders(), "emptied"
    runs = runs_of("mmcoa-shots pocket")
    assert len(runs) == 3 + 2 * len(methods), "of the sweep, its trials, the untouched model, and an evaluation of each"
    for name in methods:
        steps = [m.step for m in MlflowClient().get_metric_history(runs[name].info.run_id, "train/loss")]
        assert sorted(steps) == list(range(1, max(steps) + 1)) and len(steps) == 12, "every step once"


@pytest.fixture
def models(object_store, tmp_path):
    """The bundled one, and another on the object store."""
    place = Store(object_store.place("models/other"))
    save_checkpoint(changed_digits(), tmp_path / "other", {})
    for file in (tmp_path / "other").iterdir():
        place.copy_in(file, file.name)
    return ["digits", f"local-dir:{place.root}"]


@pytest.mark.slow
def test_one_plan_of_all_models_data_sets_and_attacks(object_store, three_nodes, data, models, tmp_path):
    out = Store(object_store.place("results")).root
    what = [part for model in models for part in ("--model", model)]
    what += ["--data", ",".join(DATA), "--attacks", SUITE, "--eps", "32/255", "--steps", 2, "--limit", LIMIT]
    what += ["--substitutes", "clip-table", "--cluster", "--out", out, "--quiet"]
    env = {name: three_nodes.env[name] for name in (*TOKEN, "RAY_ADDRESS", "RAYCLIP_DATA")}
    env["RAYCLIP_CACHE"] = str(tmp_path / "cache")

    run(tmp_path, "plan", *what, "--workers", "1,3", "--price", 2, "--calibrate", 5, "--json", "plan.json", **env)
    planned = json.loads((tmp_path / "plan.json").read_text())
    attacks = len(SUITE.replace(",queries", "").replace(",targets", "").split(","))
    cells = len(models) * len(DATA) * attacks
    assert attacks == 19 and len(planned["cells"]) == cells
    one, three = planned["workers"]
    assert three["wall"] < one["wall"] and three["cost"] == pytest.approx(2 * three["hours"])

    said = run(tmp_path, "eval", *what, "--no-tracking", "--json", "rows.json", **env).stdout
    assert "planned: " in said and "on 3 workers (planned: " in said
    found = verdicts_of(out)
    assert len(found) == cells * LIMIT
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len({(row["model"], row["dataset"]) for row in rows}) == len(models) * len(DATA)
    evaluate_alone(tmp_path / "alone", models[1], "digits", SUITE, limit=LIMIT, steps=2, substitutes="clip-table")
    mine = verdicts(tmp_path / "alone")
    assert len(mine) == attacks * LIMIT and mine.items() <= found.items(), "what one process finds by itself"


def test_an_evaluation_from_a_machine_that_is_not_of_the_cluster(
    object_store, three_nodes, data, tmp_path, monkeypatch
):
    """It has the cluster's address and token, and those of data and results."""
    out = Store(object_store.place("elsewhere")).root
    what = ["--model", "digits", "--data", "own", "--attacks", "clean,pgd", "--eps", "32/255", "--limit", 20]
    what += ["--no-tracking", "--quiet"]
    env = {name: three_nodes.env[name] for name in (*TOKEN, "RAYCLIP_DATA")}
    env |= {"RAY_ADDRESS": three_nodes.elsewhere, "RAYCLIP_CACHE": str(tmp_path / "cache")}
    run(tmp_path, "eval", *what, "--cluster", "--out", out, **env)
    monkeypatch.setenv("RAYCLIP_DATA", env["RAYCLIP_DATA"])
    evaluate_alone(tmp_path / "alone", "digits", "own", "clean,pgd", limit=20)
    assert verdicts_of(out) == verdicts(tmp_path / "alone") != {}
    wrong = env | {"RAY_AUTH_TOKEN": "0" * 64}
    refused = run(tmp_path, "eval", *what, "--cluster", "--out", "refused", check=False, **wrong)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "RAY_AUTH_TOKEN" in refused.stderr
    assert not (tmp_path / "refused" / "cells").exists()


def verdicts_of(root):
    """As `verdicts`, on an object store."""
    store, found = Store(root), {}
    for cell in store.child("cells").folders():
        for r in store.read_tables(store.names(f"cells/{cell}", ".parquet")).to_pylist():
            assert (cell, r["sample_id"]) not in found, "no sample is counted twice"
            found[cell, r["sample_id"]] = r["clean_pred"], r["adv_pred"], r["steps"]
    return found


@pytest.mark.slow
def test_a_cluster_grows_for_the_work_and_shrinks_after_it(tmp_path):
    """It has scaled to nothing; its autoscaler is Ray's own, with processes for machines and a GPU in name each."""
    attack = "pgd:steps=200,stop=final"  # in many shards, so that there is work left when the second has come
    what = ["--model", "digits", "--data", "digits", "--attacks", attack, "--eps", "32/255"]
    what += ["--limit", IMAGES, "--shard-size", 1, "--no-tracking", "--quiet"]
    with local_cluster(0, grows_to=2) as cluster:
        command = [*RAYCLIP, "eval", *map(str, what), "--cluster", "--out", "there"]
        process = subprocess.Popen(command, cwd=tmp_path, env=cluster.env)
        wait_for(lambda: cluster.raylets() == 3 or process.poll() is not None, every=0.5)
        assert process.wait(timeout=600) == 0
        (ran,) = json.loads((tmp_path / "there" / "evaluations.json").read_text())
        assert ran["workers"] == 2, "a GPU each: without the head's labels none would have been asked for"
        wait_for(lambda: cluster.raylets() == 1, every=0.5)
    evaluate_alone(tmp_path / "here", "digits", "digits", attack, limit=IMAGES)
    assert verdicts(tmp_path / "there") == verdicts(tmp_path / "here")
