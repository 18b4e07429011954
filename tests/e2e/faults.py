"""What is killed in the middle of work, and what has to hold afterwards.

Every round starts a real command on a real cluster, breaks something at a random time, and compares the end with that
of an undisturbed run, sample by sample and step by step.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from e2e.local_cluster import Cluster
from e2e.mlflow_server import Server
from e2e.test_commands import RAYCLIP, verdicts
from rayclip.store import Store
from rayclip.tracking.address import join_address
from rayclip.tracking.journal import waits
from servers import wait_for

EVAL = ["eval", "--cluster", "--model", "digits", "--data", "digits", "--attacks", "clean,pgd,bert,sep", "--eps"]
EVAL += ["32/255", "--steps", "20", "--limit", "80", "--shard-size", "4"]
TRAIN = ["train", "--cluster", "--method", "tecoa", "--model", "digits", "--data", "digits", "--shots", "5", "--eps"]
TRAIN += ["32/255", "--batch-size", "10", "--epochs", "5", "--save-every-steps", "5", "--workers", "2"]
_LIMIT_S = 420

KINDS = ("actor", "raylet", "client", "mlflow", "disk")
KINDS += ("train-worker", "tune-driver", "train-raylet", "train-client", "train-disk")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a round went.

    Attributes:
        after: seconds into the round at which the (last) fault came; None if the work was over before.
        again: the command had to be given once more.
        said: what it said then, in one line.
        seconds: of the whole round.
    """

    kind: str
    after: float | None
    again: bool
    said: str
    seconds: float


class Faults:
    """Rounds on one cluster with one MLflow server; faults come within the first part `until` of the work."""

    def __init__(self, cluster: Cluster, server: Server, folder: Path, seed: int = 0, until: float = 0.8) -> None:
        self.cluster, self.server, self.folder, self._until = cluster, server, folder, until
        self._random = random.Random(seed)
        self._env = cluster.env | server.client_env
        os.environ.update(server.client_env)  # for the client that looks
        self._round = 0
        self.eval = self._finish(EVAL, folder / "eval")
        self.eval_s = self._worked
        self.train = self._finish(TRAIN, folder / "train")
        self.train_s = self._worked

    @contextmanager
    def _started(self, command: list[str], out: Path) -> Iterator[subprocess.Popen[str]]:
        """What still runs at the end is killed: a round that hangs must not take the next one's room."""
        whole = [*RAYCLIP, *command, "--out", str(out), "--experiment", out.name, "--quiet"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            whole, cwd=self.folder, env=self._env, stderr=pipe, stdout=pipe, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def _finish(self, command: list[str], out: Path) -> Path:
        """An undisturbed run; `_worked` is how long it was at work."""
        with self._started(command, out) as process:
            wait_for(lambda: self._at_work(command, out) or process.poll() is not None, _LIMIT_S)
            began = time.monotonic()
            _, stderr = process.communicate(timeout=_LIMIT_S)
            assert process.returncode == 0, stderr[-3000:]
            self._worked = time.monotonic() - began
        return out

    @staticmethod
    def _at_work(command: list[str], out: Path) -> bool:
        done = "cells/*/*.parquet" if command is EVAL else ".rayclip/unfinished/train-*/checkpoint_*"
        return any(out.glob(done))

    def round(self, kind: str) -> Outcome:
        """Break something of this kind at a random time; or of several kinds, with + between, one after the other.

        Raises:
            AssertionError: something is lost, counted twice, or another than in the undisturbed run.
        """
        self._round += 1
        began = time.monotonic()
        training = kind.startswith(("train", "tune"))
        command, work = (TRAIN, "train_s") if training else (EVAL, "eval_s")
        out = self.folder / f"{self._round:03d}-{kind}"
        small = self._small_disk(out, 200 if training else 8) if kind.endswith("disk") else contextlib.nullcontext()
        with small, self._started(command, out) as process:
            wait_for(lambda: self._at_work(command, out) or process.poll() is not None, _LIMIT_S)
            after, mends, at_work = None, [], time.monotonic()
            for each in kind.split("+"):
                time.sleep(self._random.random() * self._until * getattr(self, work) / len(kind.split("+")))
                after = time.monotonic() - began if process.poll() is None else None
                mends.append(self._break(each, process, out))
            _, stderr = process.communicate(timeout=_LIMIT_S)
            if process.returncode == 0:  # other work on this machine may have made it long before
                setattr(self, work, min(getattr(self, work), time.monotonic() - at_work))
            for mend in mends:
                mend()
            again = process.returncode != 0
            if again:
                if "client" not in kind:
                    assert process.returncode == 2 and stderr.count("\n") == 1, stderr[-3000:]
                    assert "run again" in stderr or "go on" in stderr, stderr
                self._finish(command, out)
            elif self._waiting(out):  # MLflow was away to the end: the next command with these results delivers
                assert "mlflow" in kind and "MLflow does not answer" in stderr, stderr[-3000:]
                again = True
                self._finish(command, out)
            self._check_training(out) if training else self._check_verdicts(out)
            self._check_runs(out, self.train if training else self.eval)
        return Outcome(kind=kind, after=after, again=again, said=stderr.strip()[:160], seconds=time.monotonic() - began)

    def _break(self, kind, process, out):
        """Do the damage; what has to be called to mend it."""
        match kind:
            case "actor":
                self._kill_one("ray::EvaluationActor")
            case "train-worker":
                self._kill_one("ray::RayTrainWorker")
            case "tune-driver":
                self._kill_one("ray::ImplicitFunc")
            case "raylet" | "train-raylet":
                self.cluster.kill_node(self._random.randrange(len(self.cluster.nodes)))
                self.cluster.add_nodes(1)
            case "client" | "train-client":
                with contextlib.suppress(ProcessLookupError):  # it may just have ended
                    os.killpg(process.pid, signal.SIGKILL)
            case "mlflow":
                self.server.kill()
                return self.server.start
            case "disk" | "train-disk":
                return self._fill(out)
        return lambda: None

    def _kill_one(self, title: str) -> None:
        found = self.cluster.workers(title)
        if found:
            with contextlib.suppress(psutil.Error):
                self._random.choice(found).send_signal(signal.SIGKILL)

    @contextmanager
    def _small_disk(self, out: Path, megabytes: int) -> Iterator[None]:
        """The results directory on a file system of so many MB."""
        out.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", out], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", out], check=True)

    @staticmethod
    def _fill(out: Path):
        ballast = out / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        return ballast.unlink

    def _check_verdicts(self, out: Path) -> None:
        assert verdicts(out) == verdicts(self.eval), "sample by sample what the undisturbed run gave"
        assert (out / "results.json").read_text() == (self.eval / "results.json").read_text()
        assert not list(out.rglob("*.partial")), "nothing half-written"

    def _check_training(self, out: Path) -> None:
        mine, reference = (load_file(place / "open_clip_model.safetensors") for place in (out, self.train))
        assert mine.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-6)

    def _check_runs(self, out: Path, reference: Path) -> None:
        """In MLflow there is what an undisturbed run leaves: the same runs, metrics and steps, once."""
        assert not self._waiting(out)
        assert self._logged(out.name) == self._logged(reference.name)

    def _waiting(self, out: Path) -> bool:
        """Whether something was not delivered to MLflow."""
        address = join_address(self.server.uri, out.name)
        return any(waits(Store(str(place)), address) for place in (out, out / ".rayclip") if place.is_dir())

    @staticmethod
    def _logged(experiment: str) -> list[object]:
        client = MlflowClient()
        found = client.get_experiment_by_name(experiment)
        assert found is not None
        runs = []
        for run in client.search_runs([found.experiment_id]):
            metrics = {}
            for name in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, name)
                if name in ("train/images_per_second", "train/data_wait"):
                    continue
                metrics[name] = sorted((m.step, round(m.value, 4)) for m in history)
            runs.append((run.info.status, metrics))
        return sorted(runs, key=str)
