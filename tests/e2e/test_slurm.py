"""The Slurm script on this machine: two "nodes" of it; stand-ins for `srun` and `scontrol` only start things."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.files import CLUSTER
from servers import wait_for

pytestmark = pytest.mark.e2e

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show && $2 == hostnames && $3 == "node[1-2]" ]] && printf 'node1\\nnode2\\n'
"""
JOB = """
import os, subprocess, sys, time
from pathlib import Path
import ray
from rayclip.distributed.connect import ray_cluster

with ray_cluster(cluster=True):
    while len([n for n in ray.nodes() if n["Alive"]]) < 2:
        time.sleep(0.2)
    print("CPUs", ray.cluster_resources()["CPU"])
    print("worked", ray.get(ray.remote(lambda: 6 * 7).remote()))
token = os.environ["RAY_AUTH_TOKEN"]
lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.exists()]
print("token", len(token), "seen" if any(token.encode() in line for line in lines) else "unseen")
code = '''
from rayclip.distributed.connect import ray_cluster
from rayclip.types import UserError
try:
    with ray_cluster(cluster=True):
        print("stranger in")
except UserError as error:
    print("stranger:", error)
'''
stranger = {k: v for k, v in os.environ.items() if "AUTH" not in k} | {"HOME": sys.argv[1]}
subprocess.run([sys.executable, "-c", code], env=stranger, stderr=subprocess.DEVNULL, check=True)
sys.exit(7)
"""


def ray_port() -> int:
    """A free one of those that the script takes."""
    for _ in range(100):
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


def steps_run(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def job(tmp_path):
    """Runs a command as `sbatch --nodes=2 cluster/slurm.sh COMMAND ...` would; ends its steps as Slurm would."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    (tmp_path / "home").mkdir()
    number = ray_port() - 20000
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))} | {
        "PATH": f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_CPUS_ON_NODE": "1",
        "HOME": str(tmp_path / "home"),
        "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",
    }
    started = []

    def run(*command):
        log = tmp_path / "job.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                ["bash", CLUSTER / "slurm.sh", *map(str, command)],
                env=env,
                cwd=tmp_path,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            started.append(process)
            return process.wait(240), log.read_text()

    yield run
    for process in started:
        # As Slurm ends them, but for its patience: a Ray node without its head gives up after half a minute
        for end, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 60)):
            with contextlib.suppress(AssertionError, ProcessLookupError):
                os.killpg(process.pid, end)
                wait_for(lambda group=process.pid: not steps_run(group), seconds)
        assert not steps_run(process.pid)
    subprocess.run(["rm", "-rf", f"/tmp/ray-{number}"], check=True)


def test_a_job_is_a_cluster_of_its_own(job, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    rc, log = job(sys.executable, script, tmp_path / "home")
    assert rc == 7, f"the command's own: {log[-3000:]}"
    assert "CPUs 2.0" in log and "worked 42" in log, log[-3000:]
    assert "token 64 unseen" in log, "on no command line"
    assert "stranger: the Ray cluster refuses this machine's token" in log
