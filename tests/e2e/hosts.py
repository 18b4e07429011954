"""Network namespaces as hosts, each with an address and a cable that can be pulled. Needs root and iproute2."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ADDRESS = "10.77.0.1"  # of the host where the head, the client and the servers are
_INSIDE = "RAYCLIP_TEST_NETWORK"


def can_have_hosts() -> bool:
    return os.geteuid() == 0 and all(map(shutil.which, ("ip", "unshare")))


def enter_network() -> None:
    """Start the program anew in a network and a mount namespace of its own, where hosts can be added.

    Nothing in it can be reached from outside, and nothing outside from it. All of it goes with the process.
    """
    if os.environ.get(_INSIDE) == str(os.getpid()):
        return
    # exec keeps the process's number, by which its children do not take the variable for their own
    os.environ[_INSIDE] = str(os.getpid())
    os.execvp("unshare", ["unshare", "--net", "--mount", sys.executable, *sys.argv])


def start_network() -> None:
    """Bring up this host's address and the bridge to which hosts are connected."""
    # What is mounted here later is there on the hosts, too, which get a mount namespace each
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    Path("/run/netns").mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run/netns"], check=True)  # names that no one else has
    _ip("link set lo up")
    _ip("link add bridge type bridge")
    _ip(f"addr add {ADDRESS}/16 dev bridge")
    _ip("link set bridge up")


class Host:
    """A network namespace on the bridge.

    Attributes:
        address: of the host.
        prefix: what a command is run with to run on it.
    """

    _count = 0

    def __init__(self) -> None:
        Host._count += 1
        self._name = f"host{Host._count}"
        self.address = f"10.77.{Host._count // 200}.{Host._count % 200 + 10}"
        self.prefix: Sequence[str] = ("ip", "netns", "exec", self._name)
        _ip(f"netns add {self._name}")
        _ip(f"link add {self._name} type veth peer name eth0 netns {self._name}")
        _ip(f"link set {self._name} master bridge up")
        for words in ("link set lo up", f"addr add {self.address}/16 dev eth0", "link set eth0 up"):
            _ip(f"-n {self._name} {words}")

    def cut(self) -> None:
        """Pull the cable."""
        _ip(f"link set {self._name} down")

    def join(self) -> None:
        """Plug it in again."""
        _ip(f"link set {self._name} up")


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)
