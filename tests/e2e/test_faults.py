"""A head and three nodes, tokens on, MLflow on PostgreSQL: work that is broken in the middle.

`tests/benchmarks/faults.py` does the same for many rounds.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.faults import KINDS, NETWORK_KINDS, Faults
from e2e.hosts import can_have_hosts
from e2e.local_cluster import local_cluster
from e2e.mlflow_server import mlflow_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
# Every kind once, several in one run where the run can go on; one by one they are in the benchmark. Lost clients are
# nightly: test_commands.py loses them with all their Ray, test_cluster.py that of a sweep.
ROUNDS = ("actor+raylet+mlflow", "disk", "train-worker+tune-driver+train-raylet", "train-disk")
NIGHTLY = ("client", "train-client")


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
        # Early, for a round may be shorter than the undisturbed run was while other tests took the cores
        yield Faults(cluster, server, tmp_path_factory.mktemp("work"), until=0.5)


def test_every_kind_has_a_round():
    assert sorted("+".join((*ROUNDS, *NIGHTLY)).split("+")) == sorted(KINDS)


@pytest.mark.parametrize("kind", [*ROUNDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in NIGHTLY)])
def test_nothing_is_lost_or_counted_twice(faults, kind):
    if kind.endswith("disk") and os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    outcome = faults.round(kind)
    again = kind.endswith(("client", "disk", "mlflow"))
    assert outcome.again <= again and (outcome.again or not again or outcome.after is None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_is_lost_when_hosts_networks_memory_or_clocks_fail(tmp_path):
    """Each kind once, on two nodes with hosts of their own."""
    if not can_have_hosts():
        pytest.skip("only root can make network namespaces, with iproute2")
    program = Path(__file__).parents[1] / "benchmarks" / "faults.py"
    options = ["--kinds", "network", "--rounds", len(NETWORK_KINDS), "--nodes", 2]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, program, *map(str, options)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "| train-clock | 1 |" in done.stdout, done.stdout[-5000:] + done.stderr[-3000:]
