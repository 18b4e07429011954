"""What goes wrong in the middle of work, on a real Ray."""

import contextlib
import signal
import subprocess
import time

import pytest

from calling import run_here
from data.test_data import png, write
from e2e.test_commands import RAYCLIP, TRAIN
from servers import wait_for

pytestmark = pytest.mark.e2e


def one_damaged_image(folder):
    """A prepared data set of 40 images, of which the disk has damaged number 15 since."""
    images = [png((i, 2 * i, 7)) for i in range(40)]
    file = write(folder / "bad.parquet", [i % 3 for i in range(40)], images)
    run_here(folder, "data", "prepare", "bad", "--source", "parquet", file, "--root", folder / "root", "--quiet")
    shard = folder / "root" / "bad" / "test-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[content.index(images[15]) + 50] ^= 1
    shard.write_bytes(content)
    return shard.parent


@pytest.mark.slow
def test_a_damaged_image_ends_training_with_one_sentence(tmp_path):
    data = f"{one_damaged_image(tmp_path)}#holdout"
    options = ["--model", "digits", "--data", data, "--batch-size", 5, "--workers", 2, "--no-tracking", "--quiet"]
    began = time.monotonic()
    done = run_here(tmp_path, "train", "--method", "tecoa", *options, "--out", "m", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: training failed: image 15 of 'bad' is damaged on disk")
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - began < 240, "it is not tried again and again"
    assert not (tmp_path / "m" / "rayclip.json").exists(), "an unfinished model is not handed out as finished"


def test_a_damaged_image_ends_an_evaluation_with_one_sentence(tmp_path):
    data = one_damaged_image(tmp_path)
    options = ["--model", "digits", "--data", data, "--attacks", "clean", "--workers", 1, "--no-tracking", "--quiet"]
    done = run_here(tmp_path, "eval", *options, "--out", "r", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: image 15 of 'bad' is damaged on disk") and done.stderr.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [*RAYCLIP, *TRAIN, "--epochs", "500", "--out", "model", "--no-tracking"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    unfinished = tmp_path / "model" / ".rayclip" / "unfinished"
    wait_for(lambda: any(unfinished.glob("train-*/checkpoint_*/training_state.pt")))
    for _ in range(2):  # as a person would: an interrupt that meets a callback of a library is lost
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, stderr = process.communicate(timeout=120)
            break
    assert process.returncode == 130
    assert stderr.rstrip().endswith("the same command goes on from here.") and "Traceback" not in stderr
