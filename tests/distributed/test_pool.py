"""The pool of evaluation actors on a real Ray: what it is sized by, what is lost in the middle, who comes late."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.distributed.evaluating import evaluate
from rayclip.distributed.resources import PoolSize
from rayclip.evaluation import Evaluator, Protocol, Store, chosen_positions, make_cells, outstanding
from rayclip.evaluation.costs import read_timings
from rayclip.models import load_model
from rayclip.progress import Display

pytestmark = pytest.mark.e2e

POSITIONS = {"digits": chosen_positions(445, 240)}


@pytest.fixture(scope="module")
def cells():
    return make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", open_data("digits", "test"))],
        parse_attacks("clean,pgd:steps=80,stop=final,sep", {"steps": 10, "step": 8 / 255, "substitutes": "clip-table"}),
        Protocol(eps=32 / 255),
    )


@pytest.fixture(scope="module")
def expected(cells, tmp_path_factory):
    """Every verdict, by an evaluator in this process, in large shards."""
    store = Store(str(tmp_path_factory.mktemp("expected")))
    evaluator = Evaluator(store)
    for shards in outstanding(cells, POSITIONS, store, 256):
        for shard in shards:
            evaluator.run(shard)
    return store


@pytest.fixture
def cluster():
    """A head without CPUs, where nothing of ours runs; it notices within seconds that a node is gone."""
    head = {
        "num_cpus": 0,
        "object_store_memory": 100 << 20,
        "include_dashboard": False,
        "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 3},
    }
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=100 << 20)


def same_verdicts(cells, store, expected):
    for cell in cells:
        a, b = (s.read_tables(s.names(f"cells/{cell.id}", ".parquet")).sort_by("position") for s in (expected, store))
        assert a["position"].to_pylist() == b["position"].to_pylist(), "each sample once"
        for exact in ("sample_id", "label", "clean_pred", "adv_pred", "steps", "queries"):
            assert a[exact].to_pylist() == b[exact].to_pylist(), exact
        assert np.allclose(a["adv_margin"].to_numpy(), b["adv_margin"].to_numpy(), atol=1e-3)
        assert all(t.seconds > 0 for t in read_timings(cell.id, store, None))


def files(store):
    return list(Path(store.root).glob("cells/*/*.parquet"))


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def actors():
    """Process ids of this test's evaluation actors."""
    mine, parents = set(), {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(lines["Pid"])] = int(lines["PPid"])
        if command.startswith(b"ray::EvaluationActor"):
            mine.add(int(lines["Pid"]))

    def ours(pid):
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = parents.get(pid, 0)
        return False

    return sorted(pid for pid in mine if ours(pid))


class Going(threading.Thread):
    """An evaluation in the background, in small shards."""

    def __init__(self, cells, store, **size):
        super().__init__(daemon=True)
        self.cells, self.store, self.size, self.ran = cells, store, PoolSize(**size), None
        self.start()

    def run(self):
        work = outstanding(self.cells, POSITIONS, self.store, 8)
        total = len(self.cells) * len(POSITIONS["digits"])
        self.ran = evaluate(work, self.store, size=self.size, display=Display(quiet=True), total=total)

    def result(self):
        self.join(500)
        return self.ran


def test_nothing_is_lost_or_counted_twice_when_one_actor_is_killed_and_one_hangs(cells, expected, tmp_path):
    """Two actors share what Ray takes for a GPU."""
    store = Store(str(tmp_path))
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=100 << 20)
    try:
        going = Going(cells, store, gpus=0.5)
        wait_for(lambda: len(files(store)) > 5)
        os.kill(actors()[0], signal.SIGKILL)
        wait_for(lambda: len(files(store)) > 15)
        hanging = actors()[0]
        os.kill(hanging, signal.SIGSTOP)
        ran = going.result()
        with contextlib.suppress(ProcessLookupError):  # Ray may have ended it
            os.kill(hanging, signal.SIGKILL)
    finally:
        ray.shutdown()
    assert ran.lost <= 1 and ran.workers == 2
    assert ran.copies >= 1, "what hangs is late: another worker has done it"
    assert ran.wall > ran.waited > 0 and 2 * ran.wall > ran.busy > 0
    same_verdicts(cells, store, expected)


def test_a_pool_grows_with_its_cluster_and_survives_a_lost_node(cells, expected, tmp_path, cluster):
    store, first = Store(str(tmp_path)), add_node(cluster)
    going = Going(cells, store)
    wait_for(lambda: len(files(store)) > 3)
    os.kill(actors()[0], signal.SIGSTOP)  # or all is done before a second one is up
    add_node(cluster)
    wait_for(lambda: len(actors()) == 2)
    cluster.remove_node(first, allow_graceful=False)
    assert going.is_alive(), "it was lost in the middle"
    ran = going.result()
    assert ran.workers == 2 and ran.lost <= 1, "it may have been between two shards"
    same_verdicts(cells, store, expected)
