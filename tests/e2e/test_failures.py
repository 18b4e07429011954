"""What goes wrong in the middle of work, on a real Ray."""

import signal
import subprocess
import time

import pytest

from data.test_data import png, write
from e2e.test_commands import RAYCLIP, TRAIN, run, wait_for

pytestmark = pytest.mark.e2e


def one_bad_image(folder):
    """Of 40 rows number 14 is no image; it is not among the few that are looked at before work begins."""
    images = [png((i, 2 * i, 7)) for i in range(40)]
    images[14] = b"broken"
    return write(folder / "bad.parquet", [i % 3 for i in range(40)], images)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_ends_training_with_one_sentence(tmp_path, workers):
    data = one_bad_image(tmp_path)
    options = ["--model", "digits", "--data", data, "--batch-size", 5, "--workers", workers, "--no-tracking", "--quiet"]
    began = time.monotonic()
    done = run(tmp_path, "train", "--method", "tecoa", *options, "--out", "m", check=False)
    assert done.returncode == 2
    assert done.stderr == "error: training failed: row 14 of 'bad' is no readable image: mend or drop it.\n"
    assert time.monotonic() - began < 120, "it is not tried again and again"
    assert not (tmp_path / "m" / "rayclip.json").exists(), "an unfinished model is not handed out as finished"


def test_an_unreadable_image_ends_an_evaluation_with_one_sentence(tmp_path):
    data = one_bad_image(tmp_path)
    options = ["--model", "digits", "--data", data, "--attacks", "clean", "--no-tracking", "--quiet"]
    done = run(tmp_path, "eval", *options, "--out", "r", check=False)
    assert done.returncode == 2
    assert done.stderr == "error: row 14 of 'bad' is no readable image: mend or drop it.\n"


def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [*RAYCLIP, *TRAIN, "--epochs", "500", "--out", "model", "--no-tracking"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    unfinished = tmp_path / "model" / ".rayclip" / "unfinished"
    wait_for(lambda: any(unfinished.glob("train-*/checkpoint_*/training_state.pt")))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.rstrip().endswith("the same command goes on from here.") and "Traceback" not in stderr
