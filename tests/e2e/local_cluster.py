"""A Ray cluster of several nodes on this machine, with token authentication, whose parts can be killed."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from e2e.hosts import ADDRESS, Host
from servers import free_port, wait_for

_OBJECT_STORE = 80 << 20  # the least that Ray takes
_HEAD_ID = "f" * 51 + "00000"  # the one that Ray's stand-in for a cloud knows


class Cluster:
    """A head without CPUs, and nodes of one CPU each. Ends its own processes and no other's.

    Attributes:
        env: what a client has to know.
        dashboard: the address for `ray job submit`.
        elsewhere: the address for a machine that is not of the cluster.
        head: its process.
        hosts: of the nodes, by their process's number, if they have hosts of their own.
    """

    def __init__(self, nodes: int, env: Mapping[str, str], grows_to: int = 0, own_hosts: bool = False) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # Ray's sockets want a short path
        self._own = self._folder / "own"
        (self._own / "tmp").mkdir(parents=True)
        self._address, self._own_hosts = ADDRESS if own_hosts else "127.0.0.1", own_hosts
        self.hosts: dict[int, Host] = {}
        self._port, dashboard, client = free_port(), free_port(), free_port()
        self.dashboard, self.elsewhere = f"http://127.0.0.1:{dashboard}", f"ray://127.0.0.1:{client}"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"{self._address}:{self._port}",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._own / "tmp"),
            "RAYCLIP_CACHE": str(self._own / "cache"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # what `python` is in a job
            # A dead node is noticed in two seconds instead of fifteen
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "3",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_TRAIN_METRICS_ENABLED": "0",
            **env,
        }
        self._head_env: dict[str, str] = {}
        self.nodes: list[subprocess.Popen[bytes]] = []
        options = ["--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard, "--ray-client-server-port", client]
        options += self._growing(grows_to) if grows_to else []
        self.head = self._start("--head", "--port", self._port, "--num-cpus", 0, *options)
        self.add_nodes(nodes)

    def _start(self, *options: object) -> subprocess.Popen[bytes]:
        process, is_up = self._begin(*options)
        wait_for(is_up)
        return process

    def _begin(
        self,
        *options: object,
        host: Host | None = None,
        apart: bool = False,
        temporary_mb: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> tuple[subprocess.Popen[bytes], Callable[[], bool]]:
        command = [Path(sys.executable).with_name("ray"), "start", "--block", "--node-ip-address"]
        command += [host.address if host else self._address]
        command += ["--object-store-memory", _OBJECT_STORE, "--disable-usage-stats"]
        # A folder of its own, as on a machine of its own: what one node clears away another may be using
        place = self._folder / secrets.token_hex(2)
        command += ["--temp-dir", place, "--dashboard-agent-listen-port", free_port(), *options]
        log = place.with_suffix(".log")
        env = {k: v for k, v in self.env.items() if k != "RAY_ADDRESS"} | dict(env or {})
        env |= self._head_env if "--head" in options else {}
        # All hosts have this machine's name, which leads each to itself
        env |= {"GLOO_SOCKET_IFNAME": "eth0"} if host else {}
        if apart and os.geteuid() == 0:
            size = f"-o size={temporary_mb}m" if temporary_mb else ""
            hide = f'mount -t tmpfs {size} tmpfs "$0" && mkdir "$TMPDIR" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hide, self._own, *command]
        command = [*(host.prefix if host else ()), *command]
        with log.open("wb") as out:
            process = subprocess.Popen([str(c) for c in command], env=env, stdout=out, stderr=subprocess.STDOUT)

        def is_up() -> bool:
            said = log.read_text(errors="replace")
            assert process.poll() is None, said[-2000:]
            return "Ray runtime started" in said

        return process, is_up

    def _growing(self, nodes: int) -> list[str]:
        """Options of a head with Ray's own autoscaler, which starts and ends up to so many nodes on this machine. Each
        has a CPU, and a GPU by its own account."""
        config = {
            "cluster_name": "grows",
            "max_workers": nodes,
            "idle_timeout_minutes": 0.05,
            "upscaling_speed": 10,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "use_internal_ips": True,
                "gcs_address": f"127.0.0.1:{self._port}",
                "head_node_id": _HEAD_ID,
                "launch_multiple": True,
            },
            # There is nobody to run them, but Ray's parser wants to see them
            **{f"{who}{what}_commands": [] for who in ("head_", "worker_") for what in ("setup", "start_ray")},
            **{name: [] for name in ("setup_commands", "initialization_commands", "cluster_synced_files")},
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "gpu": {
                    "resources": {"CPU": 1, "GPU": 1, "object_store_memory": _OBJECT_STORE},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": nodes,
                },
            },
        }
        (self._folder / "autoscaler.json").write_text(json.dumps(config))
        self._head_env |= {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        }
        labels = f"autoscales-to-GPU={nodes},autoscales-to-CPU={nodes}"
        return [f"--autoscaling-config={self._folder / 'autoscaler.json'}", "--labels", labels]

    def add_nodes(
        self, count: int, *, apart: bool = False, temporary_mb: int = 0, env: Mapping[str, str] | None = None
    ) -> None:
        """So many more, which start at the same time; `apart` with temporary files and a cache that no other sees, as
        on a machine of its own (if root runs the tests), and with room for so many MB of them.

        Args:
            env: that only they know.
        """
        options = ("--address", f"{self._address}:{self._port}", "--num-cpus", 1)
        hosts = [Host() if self._own_hosts else None for _ in range(count)]
        begun = [self._begin(*options, host=h, apart=apart, temporary_mb=temporary_mb, env=env) for h in hosts]
        self.nodes += [process for process, _ in begun]
        self.hosts |= {process.pid: host for (process, _), host in zip(begun, hosts, strict=True) if host}
        for _, is_up in begun:
            wait_for(is_up)

    def kill_node(self, number: int) -> None:
        """SIGKILL a node's raylet; what it carried dies with it."""
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            for process in psutil.Process(self.nodes[number].pid).children():
                if process.name() == "raylet":
                    process.send_signal(signal.SIGKILL)
        self.forget_node(number)

    def forget_node(self, number: int) -> None:
        """End what is left of a node."""
        node = self.nodes.pop(number)
        self.hosts.pop(node.pid, None)
        _end(node)

    def temporary(self, node: subprocess.Popen[bytes], script: str) -> None:
        """Run a shell script in the temporary folder that only a node `apart` sees."""
        enter = ["nsenter", "--mount", "--target", str(node.pid), "sh", "-c", f'cd "$0" && {script}', self._own]
        subprocess.run(enter, check=True, stderr=subprocess.DEVNULL)

    def workers(self, title: str) -> list[psutil.Process]:
        """Ray's worker processes on all nodes whose title begins so."""
        found = []
        for node in [*self.nodes, self.head]:  # the head carries what its autoscaler has started
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(node.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if " ".join(process.cmdline()).startswith(title):
                            found.append(process)
        return found

    def raylets(self) -> int:
        """How many there are on the head and the nodes that its autoscaler has added."""
        found = 0
        for process in psutil.Process(self.head.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                found += process.name() == "raylet"
        return found

    def stop(self) -> None:
        """End all at once, without a farewell: a node that ends in order takes seconds."""
        for node in [*self.nodes, self.head]:
            _end(node)
        shutil.rmtree(self._folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of ours and all below it."""
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()  # first, or it would end what it has started, one after the other
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.kill()
    process.kill()
    process.wait()


@contextmanager
def local_cluster(
    nodes: int, env: Mapping[str, str] | None = None, grows_to: int = 0, own_hosts: bool = False
) -> Iterator[Cluster]:
    """A cluster of a head and so many nodes, which know `env`: passwords come with a node, never with a job.

    Args:
        grows_to: nodes that an autoscaler may add.
        own_hosts: each node is on a host of its own (`hosts.enter_network` has been called).
    """
    cluster = Cluster(nodes, env or {}, grows_to, own_hosts)
    try:
        yield cluster
    finally:
        cluster.stop()
