"""Reports of Train's workers on their way to Tune, on a real Ray."""

import pytest
import ray
from ray import tune

from rayclip.distributed.trials import Reports

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
