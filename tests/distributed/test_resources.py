"""How many actors and trials a cluster holds, or grows to hold, and what an actor wants to see first; on a real one in
e2e."""

import pytest
import ray

from rayclip.distributed import resources
from rayclip.distributed.evaluating import EvaluationActor
from rayclip.distributed.resources import PoolSize, Share, within_reach
from rayclip.distributed.trials import Workers
from rayclip.distributed.tuning import run_trials
from rayclip.evaluation import Store
from rayclip.progress import Display
from rayclip.types import UserError

HEAD = {"Alive": True, "Resources": {"memory": 1e9}, "Labels": {"ray.io/node-id": "x"}}
GROWS = HEAD | {"Labels": {"autoscales-to-GPU": "8", "autoscales-to-CPU": "56"}}


def node(cpus, gpus=0.0, **more):
    return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}, "Labels": {}, **more}


@pytest.fixture
def cluster(monkeypatch):
    """Makes Ray see these nodes."""

    def make(*nodes):
        monkeypatch.setattr(ray, "nodes", lambda: list(nodes))

    return make


def share(**size):
    found = Share.of(PoolSize(**size))
    return found.wanted, found.cpus, found.gpus


def test_an_actor_a_core_or_a_gpu_or_what_was_asked_for(cluster):
    cluster(HEAD, node(4.0), node(2.0))
    assert share() == (6, 1.0, 0.0) and share(workers=2) == (2, 3.0, 0.0) and share(workers=12) == (12, 0.5, 0.0)
    cluster(HEAD, node(16.0, 2.0), node(8.0, 1.0), node(8.0, 1.0, Alive=False))
    assert share() == (3, 8.0, 1.0)
    assert share(gpus=0.5) == (6, 4.0, 0.5) and share(gpus=1 / 3) == (9, 2.0, 1 / 3)
    assert share(gpus=0) == (24, 1.0, 0.0)


def test_a_cluster_that_has_scaled_to_nothing_is_asked_for_all_it_may_have(cluster):
    cluster(GROWS)
    assert share() == (8, 7.0, 1.0) and share(gpus=0.5) == (16, 3.0, 0.5) and share(workers=2) == (2, 7.0, 1.0)
    assert within_reach() == {"GPU": 8.0, "CPU": 56.0}
    cluster(GROWS, node(7.0, 1.0))
    assert share() == (8, 7.0, 1.0)


def test_trials_are_sized_to_what_the_cluster_has_or_may_have(cluster):
    cluster(HEAD, node(2.0))
    assert Workers.for_cluster() == Workers(gpus=0.0) and Workers.for_cluster().trials_at_once() == 2
    cluster(HEAD)
    assert Workers.for_cluster().trials_at_once() == 1, "it may come yet"
    cluster(GROWS)
    assert Workers.for_cluster() == Workers(gpus=1.0) and Workers.for_cluster(2).trials_at_once() == 4
    assert Workers.for_cluster(9).trials_at_once() == 1


def test_what_no_node_has_is_refused(cluster):
    cluster(HEAD, node(2.0))
    with pytest.raises(UserError, match=r"wants 0\.5 GPUs but the cluster has 0"):
        share(gpus=0.5)
    cluster(HEAD | {"Labels": {"autoscales-to-GPU": "eight"}})
    with pytest.raises(UserError, match="autoscales-to-GPU=eight"):
        share()


def test_a_node_that_does_not_see_the_results_says_so_before_anything_is_spent(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "_SEEN_S", 0.0)
    store = Store(str(tmp_path))
    actor = EvaluationActor(store, PoolSize(), Share(None, 1.0, 0.0))
    with pytest.raises(UserError, match=f"{tmp_path} is another folder on node .*: give as --out one that"):
        actor.hello("cells/x/cell.json")
    store.write_json("cells/x/cell.json", {})
    assert actor.hello("cells/x/cell.json")[1].name == "cpu"


def test_training_is_not_driven_from_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    with pytest.raises(UserError, match="submit it there"):
        run_trials([], workers=Workers(), storage=Store(str(tmp_path)), log=None, display=Display(quiet=True))
    assert list(tmp_path.iterdir()) == []
