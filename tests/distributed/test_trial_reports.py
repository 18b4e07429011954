"""Reports of Train's workers on their way to Tune, and what lost ones have reserved, on a real Ray."""

import os
import threading
import time

import psutil
import pytest
import ray
from ray import tune
from ray.util.placement_group import placement_group, placement_group_table

from rayclip.distributed.tuning import distinct_cpus, release, report_to_tune
from servers import wait_for

TRIALS = 3


@pytest.fixture(scope="module")
def a_ray():
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_every_report_arrives_before_its_trial_ends(a_ray, tmp_path):
    """Also one that comes with the very end, which Tune's own queue would let the end overtake."""

    def drive(params):
        def fit(reports):
            for step in range(3):
                reports.after_report(None, [{"step": step}, {"step": -1}], None)
            return "fitted"

        assert report_to_tune(fit) == "fitted"

    tuner = tune.Tuner(
        tune.with_resources(drive, {"CPU": 1}),
        param_space={"index": tune.grid_search(list(range(TRIALS)))},
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    found = tuner.fit()
    assert not found.errors and [r.metrics["step"] for r in found] == [2] * TRIALS
    assert [r.metrics["training_iteration"] for r in found] == [3] * TRIALS


@pytest.mark.e2e
def test_the_error_of_a_train_run_ends_its_trial(a_ray, tmp_path):
    def drive(params):
        def fit(reports):
            reports.after_report(None, [{"step": 7}], None)
            raise FloatingPointError("the loss is nan")

        report_to_tune(fit)

    run_config = tune.RunConfig(storage_path=str(tmp_path), verbose=0)
    (result,) = tune.Tuner(tune.with_resources(drive, {"CPU": 1}), run_config=run_config).fit()
    assert result.metrics["step"] == 7 and "the loss is nan" in str(result.error)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8, 32])
def test_amounts_of_cpu_differ_and_can_be_counted(workers):
    amounts = distinct_cpus(0.9, workers)
    assert len(set(amounts)) == len(amounts) >= 50 and min(amounts) > 0.8 and max(amounts) < 0.9
    for amount in amounts:
        held = 0.0
        for count in range(1, workers + 1):
            held += amount
            assert held // amount == count, "as elastic training counts the workers that fit"


@pytest.mark.e2e
def test_what_a_lost_controller_has_reserved_is_given_back(a_ray):
    """No worker had started yet. What another trial holds, and another kind of work, stays."""

    @ray.remote(num_cpus=0)
    class Controller:
        def reserve(self, *bundles):
            self.group = placement_group([{"CPU": cpus} for cpus in bundles])
            assert self.group.wait(60)
            return self.group.id.hex()

    mine, other = distinct_cpus(0.9, 2)[:2]
    lost, living = Controller.remote(), Controller.remote()
    held = {cpus: ray.get(lost.reserve.remote(*cpus)) for cpus in [(mine,), (mine, mine)]}
    kept = {cpus: ray.get(living.reserve.remote(*cpus)) for cpus in [(other,), (mine, other), (0.1,)]}
    ray.kill(lost)
    release(mine)
    states = {group: record["state"] for group, record in placement_group_table().items()}
    assert {states[group] for group in held.values()} == {"REMOVED"}
    assert {states[group] for group in kept.values()} == {"CREATED"}
    ray.kill(living)


@pytest.mark.e2e
def test_what_another_job_holds_stays(a_ray):
    """Of the same amount: the group's id ends with its job's."""
    mine = distinct_cpus(0.9, 1)[0]
    group = placement_group([{"CPU": mine}])
    assert group.wait(60)

    class Elsewhere:
        def get_job_id(self):
            return "ffffffff"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get_runtime_context", Elsewhere)
        release(mine)
    assert placement_group_table(group)["state"] == "CREATED"
    release(mine)
    assert placement_group_table(group)["state"] == "REMOVED"


@pytest.mark.e2e
def test_what_a_controller_has_reserved_after_its_death_was_noticed_is_given_back(a_ray):
    """As on a node that is lost: for a moment its processes go on."""
    mine = distinct_cpus(0.9, 1)[5]

    @ray.remote(num_cpus=0)
    class Controller:
        def begin(self):
            threading.Thread(target=self._reserve, daemon=True).start()
            return os.getpid()

        def _reserve(self):
            while True:
                placement_group([{"CPU": mine}])

    def held():
        groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
        return [group for group in groups if group["bundles"] == {0: {"CPU": mine}}]

    lost = Controller.remote()
    process = psutil.Process(ray.get(lost.begin.remote()))
    wait_for(lambda: len(held()) > 3, 60)
    process.suspend()
    ray.kill(lost)
    time.sleep(1)  # its death is noticed
    process.resume()
    process.wait(60)
    release(mine)
    wait_for(lambda: not held(), 60)
