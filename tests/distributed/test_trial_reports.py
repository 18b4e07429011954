"""Reports of Train's workers on their way to Tune, and what lost ones have reserved, on a real Ray."""

import pytest
import ray
from ray import tune
from ray.util.placement_group import placement_group, placement_group_table

from rayclip.distributed.trials import Reports, _Notes, _release
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
        _release(_Notes(storage=Store(str(tmp_path)), run="train-x"))
        return states() == ["REMOVED", "CREATED"]

    assert states() == ["CREATED", "CREATED"]
    wait_for(given_back, 60)
    ray.kill(living)
