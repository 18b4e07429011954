"""Token authentication: on by default in a private Ray, and explained where a cluster refuses us."""

import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from servers import free_port, wait_for

pytestmark = pytest.mark.e2e

WHO = """
import os, sys
from rayclip.distributed.connect import ray_cluster
from rayclip.types import UserError
import ray

if "NAMES_GONE" in os.environ:
    from rayclip.distributed import compat
    assert compat._find("Config") is not None
    compat._find = lambda name: None

class Actor:
    def token(self):
        return os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAYCLIP_MODELS")

before = Actor().token()
try:
    with ray_cluster(cluster=sys.argv[1] == "cluster"):
        print("worker", *ray.get(ray.remote(num_cpus=0)(Actor).remote().token.remote()))
        address = ray.get_runtime_context().gcs_address
        if sys.argv[1] == "stranger":
            import subprocess
            env = {k: v for k, v in os.environ.items() if "AUTH" not in k} | {"RAY_ADDRESS": address}
            print("stranger", subprocess.run([sys.executable, __file__, "cluster"], env=env, text=True,
                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    assert Actor().token() == before, "the environment is as it was"
except UserError as error:
    print("refused", error)
"""


@pytest.fixture
def who(tmp_path):
    """Asks, in a process of its own, what a worker knows of the token."""
    script = tmp_path / "who.py"
    script.write_text(WHO)
    (tmp_path / "home").mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path / "home")}

    def ask(how: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, script, how], env=clean | env, text=True, stdout=subprocess.PIPE, check=True, timeout=300
        )
        return done.stdout.strip()

    return ask


def test_a_private_ray_asks_for_a_token_of_its_own(who, tmp_path):
    said = who("stranger")
    assert said.startswith("worker token ") and len(said.split()[2]) == 64
    assert "stranger refused the Ray cluster refuses this machine's token" in said
    assert said.split()[2] != who("local").split()[2], "another time another token"
    assert not (tmp_path / "home" / ".ray").exists(), "on no disk"


def test_what_the_user_sets_stays(who, tmp_path):
    assert who("local", RAY_AUTH_MODE="disabled").startswith("worker disabled None")
    assert who("local", RAY_AUTH_TOKEN="mine" * 16).startswith(f"worker token {'mine' * 16}")
    file = tmp_path / "token"
    file.write_text("mine" * 16)
    assert who("local", RAY_AUTH_TOKEN_PATH=str(file)).startswith("worker token None")


@contextlib.contextmanager
def running_head(folder, port, **auth):
    """The address of a running head; it ends with its own process."""
    place = Path("/tmp") / f"rayclip-{secrets.token_hex(3)}"  # Ray's sockets want a short path
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port", port]
    command += ["--node-ip-address", "127.0.0.1", "--temp-dir", place, "--include-dashboard=false", "--num-cpus", "1"]
    command += ["--object-store-memory", 80 << 20, "--disable-usage-stats"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | auth | {"HOME": str(folder)}
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen([str(c) for c in command], env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text())
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()  # with --block it takes its own processes along, and no other's
        process.wait(60)
        subprocess.run(["rm", "-rf", place], check=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A running head with a token: (address, token)."""
    token = secrets.token_hex(32)
    folder = tmp_path_factory.mktemp("head")
    with running_head(folder, free_port(), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as address:
        yield address, token


def test_a_cluster_that_refuses_us_says_what_to_do(who, head):
    address, token = head
    refused = "refused the Ray cluster refuses this machine's token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    assert who("cluster", RAY_ADDRESS=address).startswith(refused), "no token"
    assert who("cluster", RAY_ADDRESS=address, RAY_AUTH_TOKEN="0" * 64).startswith(refused), "a wrong one"
    assert who("cluster", RAY_ADDRESS=address, RAY_AUTH_MODE="token").startswith(refused), "none, but the mode"
    lost = who("cluster", RAY_ADDRESS=address, RAY_AUTH_TOKEN_PATH="/nowhere")
    assert lost == "refused RAY_AUTH_TOKEN_PATH names no file that holds a token: correct or unset it."
    assert who("cluster", RAY_ADDRESS=address, RAY_AUTH_TOKEN=token).startswith("worker token"), "the right one"
    told = who("cluster", RAY_ADDRESS=address, RAY_AUTH_TOKEN=token, RAYCLIP_MODELS="/models")
    assert told.endswith("/models"), "a node's worker knows which models a checkpoint may name"


def test_a_token_is_kept_from_a_cluster_that_asks_for_none(who, tmp_path):
    """Also where the names that are not public are gone."""
    token = {"RAY_AUTH_TOKEN": "0" * 64}  # such as `ray get-auth-token --generate` leaves on a machine
    with running_head(tmp_path, free_port(), RAY_AUTH_MODE="disabled") as address:
        for known in ({}, token, token | {"NAMES_GONE": "1"}):
            assert who("cluster", RAY_ADDRESS=address, **known).startswith("worker ")


def test_without_the_names_that_are_not_public_all_goes_on(who, head):
    """Ray was imported before, so that it cannot be told of a token that comes later; it asks for one by itself."""
    said = who("local", NAMES_GONE="1")
    assert said.startswith("worker token ") and len(said.split()[2]) == 64
    address, token = head
    told = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    assert who("cluster", NAMES_GONE="1", **told).startswith("worker token")
