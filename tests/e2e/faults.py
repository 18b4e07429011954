"""What is broken in the middle of work, and what has to hold afterwards.

Every round starts a real command on a real cluster, breaks something at a random time, and compares the end with that
of an undisturbed run, sample by sample and step by step.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from mlflow import MlflowClient
from pyarrow import fs
from safetensors.torch import load_file

from e2e.hosts import ADDRESS
from e2e.local_cluster import Cluster
from e2e.mlflow_server import Server
from e2e.relay import Relay, relay
from e2e.test_commands import RAYCLIP, verdicts
from rayclip.store import Store
from rayclip.tracking.address import join_address
from rayclip.tracking.journal import waits
from servers import ObjectStore, wait_for

EVAL = ["eval", "--cluster", "--model", "digits", "--data", "digits", "--attacks", "clean,pgd,bert,sep", "--eps"]
EVAL += ["32/255", "--steps", "20", "--limit", "80", "--shard-size", "4"]
TRAIN = ["train", "--cluster", "--method", "tecoa", "--model", "digits", "--data", "digits", "--shots", "5", "--eps"]
TRAIN += ["32/255", "--batch-size", "10", "--epochs", "5", "--save-every-steps", "5", "--workers", "2"]
_LIMIT_S = 420
_PAUSE_S = 30
_GIVEN_UP_S = 8  # a node that has not answered for so long is lost
_MEMORY = 0.85  # of the machine's memory: more, and Ray ends workers
_TEMPORARY_MB = 64
_FAKE_CLOCK = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")

KINDS = ("actor", "raylet", "client", "mlflow", "disk")
KINDS += ("train-worker", "tune-driver", "train-raylet", "train-client", "train-disk")
# On hosts of their own. Seconds for which a cable is pulled; processes that stop and go on; requests that come late, or
# are answered badly; memory that something else takes, or a worker, slowly; temporary folders of a node; its clock
NETWORK_KINDS = ("cut-5", "cut-60", "train-cut-5", "train-cut-60")
NETWORK_KINDS += ("stop-actor", "stop-raylet", "stop-client", "stop-mlflow")
NETWORK_KINDS += ("train-stop-worker", "train-stop-tune", "train-stop-raylet", "train-stop-client")
NETWORK_KINDS += ("store-late", "store-503", "store-cut", "train-store-late", "train-store-503", "train-store-cut")
NETWORK_KINDS += ("mlflow-late", "train-mlflow-late", "memory", "train-memory", "swallow")
NETWORK_KINDS += ("tmp-full", "tmp-readonly", "train-tmp-full", "train-tmp-readonly", "clock", "train-clock")
_PROCESSES = {
    "stop-actor": "ray::EvaluationActor",
    "stop-worker": "ray::RayTrainWorker",
    "stop-tune": "ray::ImplicitFunc",
}


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
    """Rounds on one cluster with one MLflow server; faults come within the first part `until` of the work.

    Args:
        store: an object store on this host, if results shall be there when `store-…` is broken.
    """

    def __init__(
        self,
        cluster: Cluster,
        server: Server,
        folder: Path,
        seed: int = 0,
        until: float = 0.8,
        store: ObjectStore | None = None,
    ) -> None:
        self.cluster, self.server, self.folder, self._until, self._store = cluster, server, folder, until, store
        self._random = random.Random(seed)
        self._env = cluster.env | server.client_env
        os.environ.update(server.client_env)  # for the client that looks
        self._round = 0
        self.eval = self._finish(EVAL, str(folder / "eval"), "eval")
        self.eval_s = self._worked
        self.train = self._finish(TRAIN, str(folder / "train"), "train")
        self.train_s = self._worked

    @contextmanager
    def _started(self, command: list[str], out: str, experiment: str) -> Iterator[subprocess.Popen[str]]:
        """What still runs at the end is killed: a round that hangs must not take the next one's room."""
        whole = [*RAYCLIP, *command, "--out", out, "--experiment", experiment, "--quiet"]
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

    def _finish(self, command: list[str], out: str, experiment: str) -> Path:
        """An undisturbed run; `_worked` is how long it was at work."""
        with self._started(command, out, experiment) as process:
            wait_for(lambda: self._at_work(command, out) or process.poll() is not None, _LIMIT_S)
            began = time.monotonic()
            _, stderr = process.communicate(timeout=_LIMIT_S)
            assert process.returncode == 0, stderr[-3000:]
            self._worked = time.monotonic() - began
        return self.folder / experiment

    def _at_work(self, command: list[str], out: str) -> bool:
        where = ("cells", ".parquet") if command is EVAL else (".rayclip/unfinished", "checkpoint_")
        if "://" not in out:
            files = (str(path) for path in Path(out, where[0]).rglob("*"))
        else:
            system, base = fs.FileSystem.from_uri(out)
            files = (f.path for f in system.get_file_info(fs.FileSelector(f"{base}/{where[0]}", True, True)))
        return any(where[1] in file for file in files)

    def round(self, kind: str) -> Outcome:
        """Break something of this kind at a random time; or of several kinds, with + between, one after the other.

        Raises:
            AssertionError: something is lost, counted twice, or another than in the undisturbed run.
        """
        self._round += 1
        self._replace_lost_nodes()
        began = time.monotonic()
        training = kind.startswith(("train", "tune"))
        command, work = (TRAIN, "train_s") if training else (EVAL, "eval_s")
        name = f"{self._round:03d}-{kind}"
        out = self.folder / name
        with ExitStack() as stack:
            where, tracking_uri = self._place(kind, out, training, stack)
            process = stack.enter_context(self._started(command, where, name))
            wait_for(lambda: self._at_work(command, where) or process.poll() is not None, _LIMIT_S)
            after, mends, at_work = None, [], time.monotonic()
            for each in kind.split("+"):
                time.sleep(self._random.random() * self._until * getattr(self, work) / len(kind.split("+")))
                after = time.monotonic() - began if process.poll() is None else None
                mends.append(self._break(each.removeprefix("train-"), process, out))
            _, stderr = process.communicate(timeout=_LIMIT_S)
            if process.returncode == 0:  # other work on this machine may have made it long before
                setattr(self, work, min(getattr(self, work), time.monotonic() - at_work))
            for mend in mends:
                mend()
            stopped = process.returncode != 0
            if stopped and not {"client", "train-client"} & set(kind.split("+")):
                assert process.returncode == 2 and stderr.count("\n") == 1, stderr[-3000:]
                assert "run again" in stderr or "go on" in stderr, stderr
            # MLflow was away to the end: the next command here delivers
            waiting = not stopped and self._waiting(self._fetch(where, out), tracking_uri)
            if waiting:
                assert "mlflow" in kind and "MLflow does not answer" in stderr, stderr[-3000:]
            again = stopped or waiting
            if again:
                self._finish(command, where, name)
                self._fetch(where, out)
            self._check_training(out) if training else self._check_verdicts(out)
            self._check_runs(out, self.train if training else self.eval, tracking_uri)
        return Outcome(kind=kind, after=after, again=again, said=stderr.strip()[:160], seconds=time.monotonic() - began)

    def _place(self, kind: str, out: Path, training: bool, stack: ExitStack) -> tuple[str, str]:
        """Prepare what is bad throughout a round. Returns where its results and its runs go."""
        what = kind.removeprefix("train-")
        if what.endswith("disk"):
            stack.enter_context(self._small_disk(out, 200 if training else 8))
        if what.startswith("tmp-"):
            stack.enter_context(self._other_node(apart=True, temporary_mb=_TEMPORARY_MB))
        if what == "clock":
            assert _FAKE_CLOCK.exists(), "install faketime: without it the clock would be right"
            ahead = self._random.choice("+-")
            fake = {"LD_PRELOAD": str(_FAKE_CLOCK), "FAKETIME": f"{ahead}10m"}
            stack.enter_context(self._other_node(env=fake))
        if what.startswith("store-"):
            assert self._store is not None
            bad = stack.enter_context(self._bad_relay(self._store.port, what))
            place = self._store.place(out.name)
            return place.replace(f"127.0.0.1:{self._store.port}", f"{ADDRESS}:{bad.port}"), self.server.uri
        if what == "mlflow-late":
            bad = stack.enter_context(self._bad_relay(self.server.port, what))
            before = self._env
            self._env = before | {"MLFLOW_TRACKING_URI": f"http://{ADDRESS}:{bad.port}"}
            stack.callback(setattr, self, "_env", before)
            return str(out), self._env["MLFLOW_TRACKING_URI"]
        return str(out), self.server.uri

    @contextmanager
    def _bad_relay(self, port: int, kind: str) -> Iterator[Relay]:
        with relay(ADDRESS, ("127.0.0.1", port), self._random.randrange(1 << 30)) as bad:
            bad.fault = kind.rpartition("-")[2]
            yield bad
            assert bad.broken, "something had a fault"

    @contextmanager
    def _other_node(self, **options: object) -> Iterator[None]:
        """One node, the last, is replaced by one with these options."""
        self.cluster.kill_node(-1)
        self.cluster.add_nodes(1, **options)
        special = self.cluster.nodes[-1]
        try:
            yield
        finally:
            if special in self.cluster.nodes:
                self.cluster.kill_node(self.cluster.nodes.index(special))
                self.cluster.add_nodes(1)

    def _fetch(self, where: str, out: Path) -> Path:
        """Copy results that are on the object store to the local folder, for those who look; return that."""
        if "://" in where:
            assert self._store is not None
            fs.copy_files(self._store.place(out.name), str(out))
        return out

    def _break(self, kind: str, process: subprocess.Popen[str], out: Path) -> Callable[[], object]:
        """Do the damage; what has to be called to mend it."""
        match kind:
            case "actor":
                self._send("ray::EvaluationActor", signal.SIGKILL)
            case "worker":
                self._send("ray::RayTrainWorker", signal.SIGKILL)
            case "tune-driver":
                self._send("ray::ImplicitFunc", signal.SIGKILL)
            case "raylet":
                self.cluster.kill_node(self._random.randrange(len(self.cluster.nodes)))
                self.cluster.add_nodes(1)
            case "client":
                _signal_group(process, signal.SIGKILL)
            case "mlflow":
                self.server.kill()
                return self.server.start
            case "disk":
                return self._fill(out)
            case "cut-5" | "cut-60":
                self._cut(int(kind.removeprefix("cut-")))
            case "stop-actor" | "stop-worker" | "stop-tune":
                stopped = self._send(_PROCESSES[kind], signal.SIGSTOP)
                time.sleep(_PAUSE_S * bool(stopped))
                _send(stopped, signal.SIGCONT)
            case "stop-raylet":
                node = self._random.choice(self.cluster.nodes)
                raylet = [p for p in psutil.Process(node.pid).children() if p.name() == "raylet"]
                _send(raylet, signal.SIGSTOP)
                time.sleep(_PAUSE_S)
                _send(raylet, signal.SIGCONT)
                self._replace(node)
            case "stop-client" | "stop-mlflow":
                who = process if kind == "stop-client" else self.server.process
                _signal_group(who, signal.SIGSTOP)
                time.sleep(_PAUSE_S)
                _signal_group(who, signal.SIGCONT)
            case "memory":
                ballast = _take_memory()
                time.sleep(3)
                ballast.kill()
                ballast.communicate()
            case "swallow":
                return self._swallow()
            case "tmp-full" | "tmp-readonly":
                if len(self.cluster.nodes):
                    script = (
                        "mount -o remount,ro ." if kind == "tmp-readonly" else "cat /dev/zero > tmp/ballast || true"
                    )
                    self.cluster.temporary(self.cluster.nodes[-1], script)
        return lambda: None

    def _send(self, title: str, number: int) -> list[psutil.Process]:
        """Send a signal to one of Ray's processes, if there is one."""
        found = self.cluster.workers(title)
        chosen = [self._random.choice(found)] if found else []
        _send(chosen, number)
        return chosen

    def _cut(self, seconds: int) -> None:
        """Pull a node's cable for so many seconds."""
        node = self._random.choice(self.cluster.nodes)
        host = self.cluster.hosts[node.pid]
        host.cut()
        time.sleep(seconds)
        host.join()
        if seconds > _GIVEN_UP_S:
            self._replace(node)

    def _replace(self, node: subprocess.Popen[bytes]) -> None:
        """Replace a node that was given up while it was away: it ends when it learns of that."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(20)
        self.cluster.forget_node(self.cluster.nodes.index(node))
        self.cluster.add_nodes(1)

    def _replace_lost_nodes(self) -> None:
        for number, node in reversed([*enumerate(self.cluster.nodes)]):
            if node.poll() is not None:
                self.cluster.forget_node(number)
                self.cluster.add_nodes(1)

    def _swallow(self) -> Callable[[], object]:
        """One worker takes a hundred megabytes after the other, until Ray ends it."""
        file = Path(self.cluster.env[HUNGRY])
        found = self.cluster.workers("ray::EvaluationActor")
        if found:
            file.write_text(str(self._random.choice(found).pid))
        return lambda: file.unlink(missing_ok=True)

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
    def _fill(out: Path) -> Callable[[], object]:
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

    def _check_runs(self, out: Path, reference: Path, tracking_uri: str) -> None:
        """In MLflow there is what an undisturbed run leaves: the same runs, metrics and steps, once."""
        assert not self._waiting(out, tracking_uri)
        assert self._logged(out.name) == self._logged(reference.name)

    @staticmethod
    def _waiting(out: Path, tracking_uri: str) -> bool:
        """Whether something was not delivered to MLflow."""
        address = join_address(tracking_uri, out.name)
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


HUNGRY = "RAYCLIP_TEST_HUNGRY"  # names the file with the number of the process that shall swallow memory
_HUNGER = """
import os, threading, time

def swallow(file):
    held = []
    while True:
        time.sleep(0.2)
        try:
            with open(file) as said:
                mine = said.read() == str(os.getpid())
        except OSError:
            mine = False
        if mine:
            held.append(b"x" * (100 << 20))

threading.Thread(target=swallow, args=[os.environ["RAYCLIP_TEST_HUNGRY"]], daemon=True).start()
"""


def cluster_env(folder: Path) -> Mapping[str, str]:
    """What a cluster for the kinds of the network has to know. Its workers can be told to swallow memory."""
    (folder / "inject").mkdir()
    (folder / "inject" / "sitecustomize.py").write_text(_HUNGER)
    return {
        **ObjectStore.env,
        HUNGRY: str(folder / "hungry"),
        "PYTHONPATH": f"{folder / 'inject'}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_memory_usage_threshold": str(_MEMORY),
        "RAY_memory_monitor_refresh_ms": "100",
        # A cable that was pulled for five seconds is no lost node; the default is 15 seconds
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": str(_GIVEN_UP_S),
    }


def _take_memory() -> subprocess.Popen[str]:
    """Start a process that takes what is left below the threshold, and a little more; it holds that until it ends."""
    memory = psutil.virtual_memory()
    more = int(_MEMORY * memory.total - (memory.total - memory.available)) + (400 << 20)
    script = f"held = [b'x' * (1 << 20) for _ in range({max(more, 0) >> 20})]; print(flush=True); input()"
    pipe = subprocess.PIPE
    ballast = subprocess.Popen([sys.executable, "-S", "-c", script], stdin=pipe, stdout=pipe, text=True)
    assert ballast.stdout is not None
    ballast.stdout.readline()
    return ballast


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it may just have ended
            process.send_signal(number)


def _signal_group(process: subprocess.Popen[str] | subprocess.Popen[bytes] | None, number: int) -> None:
    assert process is not None
    with contextlib.suppress(ProcessLookupError):  # it may just have ended
        os.killpg(process.pid, number)
