"""Servers that tests start on 127.0.0.1, kill, and start again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition: Callable[[], bool], seconds: float = 240.0, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)


class HttpServer:
    """A program that answers at a page of its port. `start` and `kill` may be called again and again.

    Attributes:
        uri: its address.
    """

    page = "health"

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        """The program with its arguments, and its environment."""
        raise NotImplementedError

    def start(self) -> None:
        command, env = self.command()
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{self.uri}/{self.page}", timeout=2).close()
        except (urllib.error.URLError, OSError):
            return False
        return True

    def kill(self) -> None:
        """SIGKILL it and what it has started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class MlflowServer(HttpServer):
    """An MLflow server over an SQLite file, which outlives it."""

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        options = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination"]
        options += [str(self.folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return [sys.executable, "-m", "mlflow", "server", *options], env


class ObjectStore(HttpServer):
    """A server with the protocol of S3, which forgets everything when it ends.

    Attributes:
        env: what a client has to know beside a URI.
    """

    page = "moto-api/data.json"
    env: ClassVar = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)], os.environ

    def place(self, name: str) -> str:
        """The URI of a folder, with the options that reach this server."""
        where = f"scheme=http&endpoint_override=127.0.0.1:{self.port}&allow_bucket_creation=true&region=us-east-1"
        return f"s3://bucket/{name}?{where}"
