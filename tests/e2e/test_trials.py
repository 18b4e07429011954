"""Trials with one worker, which run in Tune's own process: one is killed, the process is used again, and what several
workers have left goes on in it."""

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import ray.cloudpickle

from rayclip.distributed.trials import Trial, Workers
from rayclip.distributed.tuning import run_trials
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage
from rayclip.progress import Display
from rayclip.store import Store
from rayclip.types import UserError
from training.test_loop import config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def a_ray():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Once:
    """A measurement that notes its process, and breaks off the first trial once, before its second checkpoint."""

    place: Path
    kill: bool

    def __call__(self, folder, device):
        with (self.place / "measured").open("a") as file:
            print(os.getpid(), read_lineage(folder)["step"], file=file)
        if len(self.measured()) == 2:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("broken off")
        return {}

    def measured(self):
        return [tuple(map(int, line.split())) for line in (self.place / "measured").read_text().splitlines()]


def run(trials, place, *, count, measure=None):
    return run_trials(
        trials,
        workers=Workers(count=count, cpus=0.9 if count > 1 else 1.9),  # one trial at a time
        storage=Store(str(place / "unfinished")),
        log=None,
        display=Display(quiet=True),
        measure=measure,
    )


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_used_again(a_ray, tmp_path):
    """The first trial resumes in another process, in which the second one follows; both end with the same weights."""
    whole = config("tecoa", precision="fp32")  # 3 epochs of 2 steps
    trials = [Trial(name=name, config=whole, out=str(tmp_path / name), keep_epochs=(2, 3)) for name in ("a", "b")]
    measure = Once(tmp_path, kill=True)
    assert run(trials, tmp_path, count=1, measure=measure) == {}
    (killed, one), (same, two), *rest = measure.measured()
    assert killed == same and [step for _, step in rest] == [two, 3 * one, one, two, 3 * one]
    assert len({pid for pid, _ in rest} - {killed}) == 1
    first, second = (load_model(trial.model).fingerprint() for trial in trials)
    assert first == second == load_model(trials[0].model_at(3)).fingerprint()
    assert read_lineage(trials[0].at_epoch(2).root)["step"] == two
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.slow
def test_what_several_workers_have_begun_goes_on(a_ray, tmp_path):
    whole = config("tecoa", precision="fp32")
    trial = Trial(name="t", config=replace(whole, model_fingerprint=""), out=str(tmp_path / "t"))
    measure = Once(tmp_path, kill=False)
    assert "broken off" in run([trial], tmp_path, count=2, measure=measure)["t"]
    begun = measure.measured()
    assert run([trial], tmp_path, count=1, measure=measure) == {}
    assert [step for _, step in measure.measured()[len(begun) :]] == [4, 6], "not again from the start"
