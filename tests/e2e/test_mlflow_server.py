"""The MLflow server as `cluster/` starts it, on a real PostgreSQL: who has no password gets nothing."""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from calling import run_here
from cluster.files import read
from e2e.mlflow_server import mlflow_server
from e2e.test_commands import run
from rayclip.tracking.experiment import Experiment
from rayclip.types import UserError

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def login(server, monkeypatch):
    for name, value in server.client_env.items():
        monkeypatch.setenv(name, value)


def test_an_anonymous_request_is_refused(server, monkeypatch):
    for page in ("/", "/api/2.0/mlflow/experiments/search?max_results=1", "/api/2.0/mlflow-artifacts/artifacts"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.uri + page, timeout=60)
        assert refused.value.code == 401, page
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD"):
        Experiment(server.uri, "anonymous").contact()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a wrong password")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD"):
        Experiment(server.uri, "anonymous").contact()


def test_a_tracker_with_a_password_logs_and_reads_back(server, login, tmp_path):
    tracker = Experiment(server.uri, "study")
    started = tracker.start("trial", params={"method.eps": 1 / 255}, tags={"x": "y"})
    tracker.metrics(started, [("train/loss", 0.5, 0), ("train/loss", 0.25, 1)], 1)
    (tmp_path / "a.txt").write_text("a")
    tracker.artifact(started, tmp_path / "a.txt", "folder")
    tracker.finish(started)
    client = MlflowClient(server.uri)
    found = client.get_run(started)
    assert found.data.params == {"method.eps": str(1 / 255)} and found.data.tags["x"] == "y"
    assert [m.value for m in client.get_metric_history(started, "train/loss")] == [0.5, 0.25]
    assert found.info.artifact_uri.startswith("mlflow-artifacts:"), (
        "through the server, which alone has the store's key"
    )
    file = Path(client.download_artifacts(started, "folder/a.txt", str(tmp_path)))
    assert file.read_text() == "a"
    assert list((server.folder / "artifacts").rglob("a.txt"))


def test_runs_and_users_survive_the_server(server, login):
    tracker = Experiment(server.uri, "study")
    started = tracker.start("before")
    server.kill()
    server.start()
    assert MlflowClient(server.uri).get_run(started).info.run_name == "before"


def test_a_user_who_may_only_read_cannot_write(server, login, monkeypatch):
    tracker = Experiment(server.uri, "study")
    started = tracker.start("of the admin")
    password = "one that is long enough"
    body = json.dumps({"username": "reader", "password": password}).encode()
    (address,) = set(re.findall(r"https://HOST(/api/\S+/users/create)", read("mlflow-auth.ini")))
    request = urllib.request.Request(server.uri + address, body, {"Content-Type": "application/json"})
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, server.uri, server.username, server.password)
    urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords)).open(request, timeout=60).close()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    assert MlflowClient(server.uri).get_run(started).info.run_name == "of the admin"
    with pytest.raises(Exception, match="Permission denied"):
        tracker.metrics(started, [("clean/x", 1.0, 0)], 1)


def test_no_command_line_shows_a_password(server):
    lines = server.command_lines()
    assert "mlflow" in lines and "basic-auth" in lines
    assert not any(server._env[name] in lines for name in server._env if "PASSWORD" in name or "SECRET" in name)
    log = (server.folder / "server.log").read_text()
    assert not any(server._env[name] in log for name in server._env if "PASSWORD" in name or "SECRET" in name)


def test_a_command_logs_to_it_and_keeps_the_password_to_itself(server, login, tmp_path):
    done = run(
        tmp_path,
        *("eval", "--model", "digits", "--data", "digits", "--attacks", "clean", "--limit", 20, "--eps", "1/255"),
        *("--out", "r", "--experiment", "command", "--local"),
    )
    client = MlflowClient(server.uri)
    (found,) = client.search_runs([client.get_experiment_by_name("command").experiment_id])
    assert found.data.metrics["clean/digits"] > 50
    written = [p for p in (tmp_path / "r").rglob("*") if p.is_file()]
    assert written and not any(server.password.encode() in p.read_bytes() for p in written)
    assert server.password not in done.stdout + done.stderr + json.dumps(found.to_dictionary())
    address = server.uri.replace("://", f"://admin:{server.password}@")
    refused = run_here(
        tmp_path,
        *("eval", "--model", "digits", "--data", "digits", "--attacks", "clean", "--limit", 20, "--eps", "1/255"),
        *("--out", "other", "--tracking-uri", address),
        check=False,
    )
    assert refused.returncode == 2 and "MLFLOW_TRACKING_PASSWORD" in refused.stderr
    assert server.password not in refused.stdout + refused.stderr and not (tmp_path / "other").exists()
