"""Reports of Train's workers on their way to Tune, and what lost ones have reserved, on a real Ray."""

import os
import threading

import psutil
import pytest
import ray
from ray import tune
from ray._private.state import state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import placement_group, placement_group_table

from rayclip.distributed.notes import Notes, release
from rayclip.distributed.trials import Reports
from rayclip.store import Store
from servers import wait_for

TRIALS = 6


@pytest.fixture(scope="module")
def a_ray():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.timeout(600)
def test_a_trial_that_ends_with_its_last_report_ends(a_ray, tmp_path):
    """Without `drain` the trials wait for ever: the end of the function overtakes the report."""

    def drive(params):
        reports = Reports()
        for step in range(3):
            reports.after_report(None, [{"step": step}], None)
        reports.drain()

    tuner = tune.Tuner(
        tune.with_resources(drive, {"CPU": 1}),
        param_space={"index": tune.grid_search(list(range(TRIALS)))},
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    found = tuner.fit()
    assert not found.errors and [r.metrics["step"] for r in found] == [2] * TRIALS


def test_what_a_lost_controller_has_reserved_is_given_back(a_ray, tmp_path):
    """No worker had started yet that could have noted it. What a living one holds stays."""

    @ray.remote(num_cpus=0)
    class Controller:
        def reserve(self):
            self.group = placement_group([{"CPU": 1}])
            assert self.group.wait(60)
            return self.group.id.hex()

    def states():
        return [placement_group_table()[group]["state"] for group in groups]

    lost, living = Controller.remote(), Controller.remote()
    groups = ray.get([lost.reserve.remote(), living.reserve.remote()])
    ray.kill(lost)

    def given_back():
        release(Notes(storage=Store(str(tmp_path)), run="train-x"))
        return states() == ["REMOVED", "CREATED"]

    assert states() == ["CREATED", "CREATED"]
    wait_for(given_back, 60)
    ray.kill(living)


def test_what_a_controller_has_reserved_after_its_death_was_noticed_is_given_back(a_ray, tmp_path):
    """As on a node that is lost: for a moment its processes go on."""

    @ray.remote(num_cpus=0)
    class Controller:
        def begin(self):
            threading.Thread(target=self._reserve, daemon=True).start()
            return os.getpid()

        def _reserve(self):
            while True:
                placement_group([{"CPU": 0.001}])

    def held():
        records = map(gcs_pb2.PlacementGroupTableData.FromString, accessor.get_placement_group_table())
        return [group for group in records if group.state != group.REMOVED]

    def lose_one():
        lost, before = Controller.remote(), len(held())
        process = psutil.Process(ray.get(lost.begin.remote()))
        wait_for(lambda: len(held()) > before + 3, 60)
        process.suspend()
        ray.kill(lost)
        record = gcs_pb2.ActorTableData.FromString
        wait_for(lambda: record(accessor.get_actor_info(lost._actor_id)).state == gcs_pb2.ActorTableData.DEAD, 60)
        process.resume()
        process.wait(60)

    accessor = state._connect_and_get_accessor()
    for _ in range(20):  # most get a word in before they end
        lose_one()
        if any(not group.creator_actor_dead for group in held()):
            break
    else:
        pytest.fail("none reserved anything after its death: this is not the case to be tested")
    release(Notes(storage=Store(str(tmp_path)), run="train-x"))
    wait_for(lambda: not held(), 60)
