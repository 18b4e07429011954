"""A run that waits for its images says so, once, and after a minute."""

from types import SimpleNamespace

import pytest

from rayclip.distributed.trials import Trial, Workers
from rayclip.distributed.tuning import _Watcher
from rayclip.evaluation.waiting import DataWait
from rayclip.progress import Display, listening
from training.test_loop import config


def test_a_run_that_waits_for_images_says_so_once():
    waits = DataWait("evaluation")
    with listening() as said:
        waits.add(30.0, 59.0, on_gpu=True)
        assert not said, "what starts up waits, too"
        waits.add(2.0, 2.0, on_gpu=True)
        waits.add(50.0, 50.0, on_gpu=True)
    assert [level for level, _ in said] == ["warning"]
    assert "GPU waits 52 %" in said[0][1] and "--data-workers" in said[0][1]


def test_a_run_that_does_not_wait_says_nothing():
    waits = DataWait("evaluation")
    with listening() as said:
        for _ in range(10):
            waits.add(1.0, 20.0, on_gpu=True)
    assert not said


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_trials_report_what_they_wait(gpus, tmp_path):
    watcher = _Watcher(
        trials=[Trial(name=name, config=config("tecoa"), out=str(tmp_path / name)) for name in "ab"],
        workers=Workers(gpus=gpus),
        storage=None,
        display=Display(quiet=True),
        on_finish=lambda trial, error: None,
        on_report=lambda: None,
        on_measure=lambda trial, result: None,
        may_stop=False,
    )
    report = {"epoch": 1, "epochs": 2, "loss": 1.0, "workers": 1, "step": 1, "total_steps": 2, "seconds": 35.0}
    with listening() as said:
        for trial in (0, 1, 0):
            here = SimpleNamespace(config={"index": trial})
            watcher.on_trial_result(0, None, here, report | {"data_wait": 0.4})
    assert watcher.failure is None and len(said) == 1
    assert ("GPU" if gpus else "training") + " waits 40 %" in said[0][1]
