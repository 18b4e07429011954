"""What is said of training that failed, by the exceptions that Ray hands over."""

import errno

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError

from rayclip.distributed.train_faults import explain_failure
from rayclip.distributed.trials import Notes
from rayclip.store import Store
from rayclip.types import UserError
from training.test_loop import config


def task_error(cause):
    return RayTaskError(
        "train", "Traceback ...", cause, proctitle="ray::x", pid=1, ip="127.0.0.1"
    ).as_instanceof_cause()


def worker_error(cause):
    return WorkerGroupError("rank 0 failed", {0: cause})


@pytest.mark.parametrize("wrap", [worker_error, ControllerError, task_error, lambda e: worker_error(task_error(e))])
@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (UserError("image 3 is damaged"), "image 3 is damaged"),
        (FloatingPointError("the loss is nan at step 3"), "the loss is nan at step 3"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room or mend the rights; run again"),
        (OSError(errno.ENOENT, "no such file"), "no such file"),
        (OSError("When uploading: AWS Error SLOW_DOWN"), "(When uploading: AWS Error SLOW_DOWN): mend that; run again"),
        (KeyError(), "KeyError"),
        (OutOfMemoryError("50 lines"), "a node has too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "a GPU of a node has too little memory"),
    ],
)
def test_the_cause_is_found_however_ray_wraps_it(tmp_path, wrap, cause, said):
    notes = Notes(storage=Store(str(tmp_path)), run="train-x")
    found = explain_failure(wrap(cause), notes, config("tecoa"), 1)
    assert said in found and "\n" not in found and "Traceback" not in found


def test_what_the_user_can_mend_comes_first(tmp_path):
    notes = Notes(storage=Store(str(tmp_path)), run="train-x")
    failed = WorkerGroupError("two ranks", {0: RuntimeError("the other rank is gone"), 1: UserError("image 3")})
    assert explain_failure(failed, notes, config("tecoa"), 2) == "image 3"
    assert explain_failure(None, notes, config("tecoa"), 2)
