"""A head and three nodes, tokens on, MLflow on PostgreSQL: work that is broken in the middle.

`tests/benchmarks/faults.py` does the same for many rounds.
"""

import os

import pytest

from e2e.faults import KINDS, Faults
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
