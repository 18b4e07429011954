"""A Ray cluster of several nodes on this machine, with token authentication, whose parts can be killed."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from servers import free_port, wait_for

_OBJECT_STORE = 80 << 20  # the least that Ray takes


class Cluster:
    """A head without CPUs, and nodes of one CPU each. Ends its own processes and no other's.

    Attributes:
        env: what a client has to know.
        dashboard: the address for `ray job submit`.
    """

    def __init__(self, nodes: int, env: Mapping[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # Ray's sockets want a short path
        self._port, dashboard = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"127.0.0.1:{self._port}",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # what `python` is in a job
            # A dead node is noticed in two seconds instead of fifteen
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "3",
            **env,
        }
        self.nodes: list[subprocess.Popen[bytes]] = []
        dashboard_options = ["--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard]
        self._head = self._start("--head", "--port", self._port, "--num-cpus", 0, *dashboard_options)
        for _ in range(nodes):
            self.add_node()

    def _start(self, *options: object) -> subprocess.Popen[bytes]:
        command = [Path(sys.executable).with_name("ray"), "start", "--block", "--node-ip-address", "127.0.0.1"]
        command += ["--object-store-memory", _OBJECT_STORE, "--disable-usage-stats"]
        # A folder of its own, as on a machine of its own: what one node clears away another may be using
        place = self._folder / secrets.token_hex(2)
        command += ["--temp-dir", place, "--dashboard-agent-listen-port", free_port(), *options]
        log = place.with_suffix(".log")
        env = {k: v for k, v in self.env.items() if k != "RAY_ADDRESS"}
        with log.open("wb") as out:
            process = subprocess.Popen([str(c) for c in command], env=env, stdout=out, stderr=subprocess.STDOUT)

        def is_up() -> bool:
            said = log.read_text(errors="replace")
            assert process.poll() is None, said[-2000:]
            return "Ray runtime started" in said

        wait_for(is_up)
        return process

    def add_node(self) -> None:
        self.nodes.append(self._start("--address", f"127.0.0.1:{self._port}", "--num-cpus", 1))

    def kill_node(self, number: int) -> None:
        """SIGKILL a node's raylet; what it carried dies with it."""
        node = self.nodes.pop(number)
        for process in psutil.Process(node.pid).children():
            if process.name() == "raylet":
                process.send_signal(signal.SIGKILL)
        _end(node)

    def workers(self, title: str) -> list[psutil.Process]:
        """Ray's worker processes on all nodes whose title begins so."""
        found = []
        for node in self.nodes:
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(node.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if " ".join(process.cmdline()).startswith(title):
                            found.append(process)
        return found

    def stop(self) -> None:
        for node in [*self.nodes, self._head]:
            _end(node)
        shutil.rmtree(self._folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours and all below it."""
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.kill()
    process.kill()
    process.wait()


@contextmanager
def local_cluster(nodes: int, env: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster of a head and so many nodes, which know `env`: passwords come with a node, never with a job."""
    cluster = Cluster(nodes, env or {})
    try:
        yield cluster
    finally:
        cluster.stop()
