"""What the driver does while Ray Tune runs: an error there ends the run as itself, not as a text of Tune's."""

import errno
import os

import pytest
import ray

from rayclip.distributed import Trial, Workers, run_trials
from rayclip.progress import Display
from rayclip.store import Store
from training.test_loop import config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_full_disk_in_the_driver_is_told_as_itself(tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trial = Trial(name="t", config=config("tecoa", precision="fp32"), out=str(tmp_path / "m"))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for callback in ("on_report", "on_finish"):
            with Display(quiet=True) as display, pytest.raises(OSError, match="No space left") as found:
                run_trials(
                    [trial],
                    workers=Workers(count=1),
                    storage=Store(str(tmp_path / "unfinished")),
                    log=None,
                    display=display,
                    **{callback: full},
                )
            assert found.value.errno == errno.ENOSPC
            assert trial.is_finished() == (callback == "on_finish")  # goes on from what is there
    finally:
        ray.shutdown()
