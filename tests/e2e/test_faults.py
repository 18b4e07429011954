"""A head and three nodes, tokens on, MLflow on PostgreSQL: work from elsewhere, and work that is broken in the middle.

`tests/benchmarks/faults.py` does the same for many rounds.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from e2e.faults import KINDS, TRAIN, Faults
from e2e.local_cluster import local_cluster
from e2e.mlflow_server import mlflow_server
from e2e.test_commands import RAYCLIP, curve
from servers import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
# Every kind once, several in one run where the run can go on; one by one they are in the benchmark
ROUNDS = ("actor+raylet+mlflow", "client", "disk", "train-worker+train-raylet", "tune-driver", "train-client")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    before = dict(os.environ)
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def faults(server, tmp_path_factory):
    with local_cluster(3) as cluster:
        yield Faults(cluster, server, tmp_path_factory.mktemp("work"))


def test_every_kind_has_a_round():
    assert sorted("+".join(ROUNDS).split("+")) == sorted(KINDS)


@pytest.mark.parametrize("kind", ROUNDS)
def test_nothing_is_lost_or_counted_twice(faults, kind):
    if kind == "disk" and os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    outcome = faults.round(kind)
    again = kind.endswith(("client", "disk", "mlflow"))
    assert outcome.again <= again and (outcome.again or not again or outcome.after is None)


@pytest.fixture(scope="module")
def two_nodes(server):
    os.environ.update(server.client_env)
    with local_cluster(2, {k: v for k, v in server.client_env.items() if k != "MLFLOW_TRACKING_URI"}) as cluster:
        yield cluster


def test_a_sweep_is_submitted_as_a_job(server, two_nodes, tmp_path):
    """From a machine that has only the dashboard's address and the token."""
    env = {k: v for k, v in two_nodes.env.items() if k != "RAY_ADDRESS" and k not in server.client_env}
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", two_nodes.dashboard]
    sweep = ["--working-dir", str(ROOT), "--", "python", "sweeps/mmcoa_shots.py", "--methods", "tecoa"]
    sweep += ["--shots", "1", "--epochs", "1", "--limit", "40", "--out", str(tmp_path / "out"), "--quiet"]
    sweep += ["--tracking-uri", server.uri]
    done = subprocess.run([*ray, *sweep], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "untouched digits" in done.stdout, done.stdout[-3000:]
    assert server.password not in done.stdout + done.stderr
    client = MlflowClient()
    found = client.get_experiment_by_name("mmcoa-shots")
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"} and len(runs) == 5


def test_training_goes_on_with_fewer_workers(two_nodes, tmp_path):
    """One of two nodes is lost for good: the run ends all the same, with every step once."""
    command = [*RAYCLIP, *TRAIN, "--min-workers", "1", "--epochs", "20", "--tracking-uri", "sqlite:///mlflow.db"]
    command += ["--out", "m", "--json-logs"]
    process = subprocess.Popen(command, cwd=tmp_path, env=two_nodes.env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(tmp_path.glob("m/.rayclip/unfinished/train-*/checkpoint_*")))
    two_nodes.kill_node(1)
    said = process.communicate(timeout=400)[1]
    assert process.returncode == 0, said[-3000:]
    assert "1 of 2 workers" in said
    lost, losses = curve(tmp_path, "m")
    assert lost.info.status == "FINISHED" and sorted(losses) == list(range(1, 101))
    assert two_nodes.workers("ray::RayTrainWorker") == [], "and nothing is left of it"
