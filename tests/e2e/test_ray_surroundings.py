"""Commands in surroundings that Ray does not bear by itself: folders, modules, signals, nodes that do not come up."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import tiny_generators
from data.test_data import png, write
from e2e.test_commands import RAYCLIP, TRAIN, run, verdicts
from servers import free_port, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
INSTALLED = BIN / "rayclip"  # which imports nothing from the working directory
LONG = "slurm_jobdir/1355700/tmp.t0016/a_rather_long_directory_name_of_a_cluster_job/scratch"
SMALL = ["--model", "digits", "--data", "digits", "--attacks", "clean", "--limit", "4"]
SMALL += ["--workers", "1", "--no-tracking", "--quiet"]
MANY = ["--model", "digits", "--data", "digits", "--attacks", "clean,pgd,bert,sep", "--eps", "32/255", "--steps", "20"]
MANY += ["--shard-size", "5", "--no-tracking"]


def installed(cwd, *args, **env):
    """The command as it is installed."""
    if not INSTALLED.exists():
        pytest.skip("rayclip is not installed as a command")
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | env
    return subprocess.run([str(INSTALLED), *map(str, args)], cwd=cwd, capture_output=True, text=True, env=env)


def given(shared, folder, name):
    """Run a case of the inputs in a copy of its folder, every line of it; what it wrote to both streams."""
    case = shared / "inputs" / name
    if not case.is_dir():
        pytest.skip(f"no folder {case}")
    shutil.copytree(case, folder / name)
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    command = ["bash", "-e", str(folder / name / "cmd")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


def private_folders():
    return {place for root in ("/tmp", "/var/tmp", "/dev/shm") for place in Path(root).glob("rc-*")}


def in_use(place):
    """Whether a process was started with it, as those of a Ray are: tests beside this one have some, too."""
    return any(str(place) in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


def test_the_given_long_temporary_folder(shared, tmp_path):
    before = private_folders()
    done = given(shared, tmp_path, "long_tmpdir")
    assert "a private one starts" in done.stdout, "doctor too"
    assert (tmp_path / "long_tmpdir" / "o" / "results.json").exists()
    wait_for(lambda: not {place for place in private_folders() - before if place.exists() and not in_use(place)})


def test_the_given_module_that_shadows_ours(shared, tmp_path):
    given(shared, tmp_path, "cwd_shadows_workers")
    assert (tmp_path / "cwd_shadows_workers" / "o" / "results.json").exists()


@pytest.mark.slow
def test_modules_beside_the_data_are_imported_by_no_worker(tmp_path):
    """Of training and captioning, under a long temporary folder; the names are packages of ours, of others, and of
    Python itself."""
    for name in ("pyarrow", "rayclip", "torch", "safetensors", "random", "wandb"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported from the working directory')")
    long = tmp_path / LONG
    long.mkdir(parents=True)
    generator = tiny_generators.text_model(tmp_path / "generator")
    options = ["--data", "digits", "--per-class", "1", "--max-new-tokens", "20", "--quiet", "--out", "c.json"]
    for command in (
        (*TRAIN, "--epochs", "1", "--out", "m", "--no-tracking", "--quiet"),
        ("captions", "generate", "--generator", generator, *options),
    ):
        done = installed(tmp_path, *command, TMPDIR=str(long))
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "m" / "rayclip.json").exists()


def test_a_plugin_in_the_working_directory_that_the_driver_imports_is_there_for_workers(tmp_path):
    """By PYTHONPATH, as `ray job submit --working-dir` sets it."""
    (tmp_path / "mine.py").write_text(
        "from rayclip.attacks.pgd import PGD\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(PGD):\n"
        "    '''PGD by another name.'''\n"
        "    name: ClassVar[str] = 'mine'\n"
    )
    about = tmp_path / "mine-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[rayclip.attacks]\nmine = mine:Mine\n")
    options = ["--attacks", "mine:steps=1", "--eps", "1/255", "--out", "r"]
    done = installed(tmp_path, "eval", *SMALL, *options, PYTHONPATH=".")
    assert done.returncode == 0, done.stderr[-3000:]


# --------------------------------------------------------------------------------------------------------- SIGTERM


def shards(out):
    return len(list(out.glob("cells/*/*.parquet")))


class Started:
    """A command that runs; ended with all that it has started."""

    def __init__(self, cwd, *args, program=RAYCLIP, **env):
        command = [*program, *map(str, args)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=cwd, env=os.environ | env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        self.family = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.look()
        for member in self.family:
            if member.is_running():
                member.kill()
        self.process.kill()
        self.process.communicate()

    def look(self):
        """Remember what it has started."""
        if self.process.poll() is None:
            self.family = psutil.Process(self.process.pid).children(recursive=True)

    def left(self):
        return [member.name() for member in self.family if member.is_running() and member.status() != "zombie"]


def terminated(started, *, everyone=False):
    """What SIGTERM makes of a command: its standard error, after what has to hold of it."""
    started.look()
    if everyone:
        os.killpg(started.process.pid, signal.SIGTERM)
    else:
        started.process.terminate()
    _, stderr = started.process.communicate(timeout=90)
    assert started.process.returncode == 143, stderr[-3000:]
    assert stderr.endswith("note: stopped; the same command goes on from here.\n"), stderr[-3000:]
    assert "SIGTERM" not in stderr and "Traceback" not in stderr and stderr.count("\n") <= 3, stderr[-3000:]
    wait_for(lambda: not started.left(), 90)  # on cores that two other Rays keep busy
    return stderr


@pytest.mark.parametrize("everyone", [False, pytest.param(True, marks=pytest.mark.slow)])  # training gets the other
def test_sigterm_stops_an_evaluation_and_the_same_command_goes_on(tmp_path, everyone):
    """Of the command alone, as Kubernetes sends it, or of all its processes at once, as Slurm does."""
    command = ["eval", *MANY, "--limit", "20", "--quiet", "--out", "r"]
    with Started(tmp_path, *command) as started:
        wait_for(lambda: shards(tmp_path / "r") > 2 or started.process.poll() is not None)
        terminated(started, everyone=everyone)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "r").glob("cells/*/*.parquet")}
    assert before and not (tmp_path / "r" / "results.json").exists()
    if everyone:
        return
    run(tmp_path, *command)
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "r").glob("cells/*/*.parquet")}
    assert before.items() <= after.items() and len(verdicts(tmp_path / "r")) == 80


@pytest.mark.slow
def test_sigterm_stops_training(tmp_path):
    command = [*TRAIN, "--epochs", "500", "--out", "m", "--no-tracking", "--quiet"]
    with Started(tmp_path, *command) as started:
        unfinished = tmp_path / "m" / ".rayclip" / "unfinished"
        wait_for(lambda: any(unfinished.glob("train-*/checkpoint_*/training_state.pt")))
        terminated(started, everyone=True)
    assert any(unfinished.glob("train-*/checkpoint_*/training_state.pt"))


@pytest.mark.slow
def test_sigterm_stops_a_sweep(tmp_path):
    program = [sys.executable, str(Path(__file__).parents[2] / "sweeps" / "mmcoa_shots.py")]
    options = ["--quiet", "--out", "s", "--epochs", "500", "--methods", "tecoa"]
    with Started(tmp_path, *options, program=program) as started:
        wait_for(lambda: any((tmp_path / "s").glob("**/train-*/checkpoint_*")) or started.process.poll() is not None)
        terminated(started)


def test_sigterm_while_ray_starts(tmp_path):
    with Started(tmp_path, "eval", *SMALL, "--out", "r") as started:
        wait_for(lambda: started.look() or "gcs_server" in started.left())
        terminated(started)


def test_sigterm_stops_preparing_data(tmp_path):
    images = [png((i % 251, i // 251, 7)) for i in range(8000)]
    file = write(tmp_path / "many.parquet", [i % 3 for i in range(8000)], images)
    command = ["data", "prepare", "many", "--source", "parquet", file, "--root", tmp_path / "root", "--quiet"]
    with Started(tmp_path, *command) as started:
        wait_for(lambda: (tmp_path / "root").exists() or started.process.poll() is not None)
        terminated(started)


AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # which outlive a raylet that was suspended, Ray's own fault


def test_a_second_signal_ends_the_command_at_once_and_what_computes_with_it(tmp_path):
    with Started(tmp_path, "eval", *MANY, "--quiet", "--out", "r") as started:
        wait_for(lambda: shards(tmp_path / "r") > 2)
        started.look()
        raylet = next(member for member in started.family if member.name() == "raylet")
        raylet.suspend()  # so that there is something to wait for
        started.process.terminate()
        time.sleep(1)
        started.process.terminate()
        began = time.monotonic()
        assert started.process.wait(30) == -signal.SIGTERM and time.monotonic() - began < 3
        raylet.resume()
        wait_for(lambda: set(started.left()) <= AGENTS, 30)


# ------------------------------------------------------------------------------------------ nodes that do not come up


def suspend(started, part):
    """Make a part of the command's Ray hang as soon as it is there."""
    began = time.monotonic()
    while True:
        assert started.process.poll() is None and time.monotonic() - began < 120
        for member in psutil.Process(started.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if member.name() == part:
                    return member.suspend()
        time.sleep(0.01)


def test_a_node_that_does_not_come_up_is_one_sentence(tmp_path):
    """Two commands, each with another part that hangs."""
    with Started(tmp_path, "eval", *SMALL, "--out", "r") as one, Started(tmp_path, "eval", *SMALL, "--out", "s") as two:
        with ThreadPoolExecutor() as pool:
            list(pool.map(suspend, (one, two), ("raylet", "gcs_server")))
        began = time.monotonic()
        for started in (one, two):
            started.look()
        for started in (one, two):
            _, stderr = started.process.communicate(timeout=180)
            assert started.process.returncode == 2, stderr[-3000:]
            assert stderr.startswith("error: Ray does not start on this machine (") and stderr.count("\n") == 1
            assert time.monotonic() - began < 150
            wait_for(lambda family=started: not family.left(), 30)


# What every command with --cluster does, and how it ends: alone it needs neither models nor data
JOIN = """
import sys
from rayclip.cli.running import run

def join(prog_name, standalone_mode):
    from rayclip.distributed.connect import ray_cluster
    with ray_cluster(cluster=True):
        print("joined")

run(join, "rayclip")
"""


def refused(cwd, address, *command, program=(sys.executable, "-c", JOIN), **env):
    began = time.monotonic()
    done = run(cwd, *command, program=program, check=False, RAY_ADDRESS=address, **env)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr[-3000:]
    assert time.monotonic() - began < 300
    return done.stderr


@contextlib.contextmanager
def something_else(talks):
    """The address where nothing at all comes back, as from a stopped head or through a firewall, or a web page does."""
    held = []
    with socket.create_server(("", 0)) as server:  # Ray itself looks for 127.0.0.1 at this machine's own address

        def accept():
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return
                if talks:
                    held[-1].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    held[-1].close()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_where_no_ray_answers_is_one_sentence(tmp_path):
    """Asked at the same time: most of it is waiting."""
    command = ["eval", "--cluster", *SMALL, "--out", "r"]
    with something_else(talks=False) as silent, something_else(talks=True) as page, ThreadPoolExecutor() as pool:
        places = {"no Ray cluster answers": f"127.0.0.1:{free_port()}", "says nothing": silent, "something else": page}
        whole = pool.submit(refused, tmp_path, "127.0.0.1:9", *command, program=RAYCLIP)
        said = {
            (expected, scheme): pool.submit(refused, tmp_path, scheme + address)
            for expected, address in places.items()
            for scheme in ("", "ray://")
        }
        for (expected, _), sentence in said.items():
            assert "no Ray cluster answers" in sentence.result() and expected in sentence.result()
        assert "no Ray cluster answers" in whole.result() and not (tmp_path / "r" / "cells").exists()


def test_a_cluster_of_another_version_is_one_sentence_that_says_so(tmp_path):
    head = "import ray, sys; ray.__version__ = '2.0.1'; from ray.scripts.scripts import main; sys.exit(main())"
    port, folder = free_port(), Path("/tmp") / f"rv-{os.getpid()}"
    command = [sys.executable, "-c", head, "start", "--head", "--block", "--port", str(port), "--num-cpus", "1"]
    command += ["--include-dashboard=false", "--temp-dir", str(folder), "--object-store-memory", str(80 << 20)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while "Ray runtime started" not in (line := process.stdout.readline()):
            assert line, "the head did not start"
        said = refused(tmp_path, f"127.0.0.1:{port}", RAY_AUTH_MODE="disabled")
        assert "cannot be joined from here" in said and "2.0.1" in said, said
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
