"""The MLflow server of `cluster/` without containers: the image's own command, its settings, and a real PostgreSQL."""

import configparser
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cluster.files import CLUSTER, read
from servers import HttpServer, free_port, wait_for


def postgres_tools() -> Path:
    """The folder of initdb and postgres; skips where there is none."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    for place in reversed(places):
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    pytest.skip("no PostgreSQL on this machine: initdb and postgres are not on PATH or in /usr/lib/postgresql")


@contextmanager
def postgres(password: str) -> Iterator[int]:
    """A PostgreSQL on 127.0.0.1 with the compose file's database and user, both `mlflow`; gives its port."""
    tools, port = postgres_tools(), free_port()
    user = None
    if os.geteuid() == 0:  # as which PostgreSQL refuses to run
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres' here")
    folder = Path(tempfile.mkdtemp(prefix="rayclip-pg-", dir="/tmp"))  # its socket wants a short path
    options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    process = None
    try:
        (folder / "password").write_text(password)
        if user:
            shutil.chown(folder / "password", user.pw_uid, user.pw_gid)
            os.chown(folder, user.pw_uid, user.pw_gid)
        make = ["--pgdata", folder / "data", "--username", "mlflow", "--pwfile", folder / "password"]
        make += ["--auth", "scram-sha-256", "--no-sync"]
        subprocess.run([tools / "initdb", *make], check=True, stdout=subprocess.DEVNULL, cwd=folder, **options)
        serve = ["-D", folder / "data", "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1"]
        process = subprocess.Popen([tools / "postgres", *serve], stderr=subprocess.DEVNULL, cwd=folder, **options)

        def ask(database: str, command: str) -> bool:
            import psycopg2

            try:
                place = {"host": "127.0.0.1", "port": port, "user": "mlflow", "password": password}
                connection = psycopg2.connect(dbname=database, **place)
            except psycopg2.OperationalError:
                return False
            connection.autocommit = True
            connection.cursor().execute(command)
            connection.close()
            return True

        wait_for(lambda: ask("postgres", "CREATE DATABASE mlflow"))
        yield port
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


class Server(HttpServer):
    """An MLflow server with users; its runs outlive it.

    Attributes:
        username, password: of the first user.
    """

    def __init__(self, folder: Path, postgres_port: int, postgres_password: str) -> None:
        super().__init__(folder)
        self.username, self.password = "admin", secrets.token_hex(16)
        store = f"postgresql+psycopg2://mlflow@127.0.0.1:{postgres_port}/mlflow"
        auth = configparser.ConfigParser()
        auth.read(CLUSTER / "mlflow-auth.ini")
        auth["mlflow"]["database_uri"] = store
        with (folder / "auth.ini").open("w") as file:
            auth.write(file)
        self._env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PG"))},
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_BACKEND_STORE_URI": store,
            "PGPASSWORD": postgres_password,
            "MLFLOW_AUTH_ADMIN_USERNAME": self.username,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    @property
    def client_env(self) -> dict[str, str]:
        """What a client has to know."""
        names = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
        return dict(zip(names, (self.uri, self.username, self.password), strict=True))

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        """That of the image, on another port and address."""
        (command,) = re.findall(r'(?m)^CMD \["sh", "-c", "(.*mlflow server.*)"\]$', read("Dockerfile"))
        command = command.replace('\\"', '"').replace(
            "--host 0.0.0.0 --port 5000", f"--host 127.0.0.1 --port {self.port}"
        )
        assert str(self.port) in command
        return ["sh", "-c", command], self._env

    def command_lines(self) -> str:
        """Of all its processes, as everyone on the machine can read them."""
        found = []
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if os.getpgid(int(place.parent.name)) == self.process.pid:
                    found.append(place.read_bytes().replace(b"\0", b" ").decode())
        return "\n".join(found)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[Server]:
    """A running server on a PostgreSQL of its own; skips where there is no PostgreSQL."""
    password = secrets.token_hex(16)
    with postgres(password) as port:
        server = Server(folder, port, password)
        try:
            server.start()
            yield server
        finally:
            server.kill()
