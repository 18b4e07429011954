"""`rayclip doctor`, check by check; `e2e/test_commands.py` runs all of it, with Ray."""

import json
import shutil

import pytest

from rayclip import cli_doctor
from rayclip.data.manifest import MANIFEST
from test_cli import call

UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAYCLIP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def found(check):
    return [(finding.topic, finding.state, finding.says) for finding in cli_doctor._careful("topic", check)]


def test_versions_name_every_library():
    states = found(cli_doctor._versions)
    assert [state for _, state, _ in states] == ["ok", "ok"]
    assert all(f"{name} " in states[1][2] for name in cli_doctor._LIBRARIES)


def test_an_absent_library_is_wrong_and_how_to_get_it_is_said(monkeypatch):
    monkeypatch.setattr(cli_doctor, "_LIBRARIES", ("torch", "no-such-library"))
    assert ("libraries", "wrong", "no-such-library is not installed: pip install -e . brings it.") in found(
        cli_doctor._versions
    )


def test_a_store_that_is_not_there_will_be_made_and_is_not_made_now(here):
    ((topic, state, says),) = found(lambda: cli_doctor._mlflow(None))
    assert (topic, state) == ("MLflow", "ok") and "will be made at the first run" in says
    assert list(here.iterdir()) == []


def test_a_server_that_does_not_answer_is_wrong():
    ((_, state, says),) = found(lambda: cli_doctor._mlflow(UNREACHABLE))
    assert state == "wrong" and "cannot be reached: start it" in says


def test_data_sets_are_listed_and_damaged_ones_are_wrong(here):
    ((_, state, says),) = found(lambda: cli_doctor._data(None))
    assert state == "note" and "rayclip data prepare NAME" in says
    (here / "data" / "dtd").mkdir(parents=True)
    (here / "data" / "dtd" / MANIFEST).write_text("{")
    first, *_ = found(lambda: cli_doctor._data(None))
    assert first[1] == "wrong" and first[2].startswith("dtd: ")


def test_a_disk_that_is_nearly_full_is_noted(monkeypatch):
    assert {state for _, state, _ in found(cli_doctor._disk)} <= {"ok", "note"}
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    assert all(state == "note" and "1.0 GiB left" in says for _, state, says in found(cli_doctor._disk))


def test_something_wrong_is_exit_code_1_and_the_rest_is_still_said(monkeypatch, capsys):
    monkeypatch.setattr(cli_doctor, "_ray", lambda cluster: iter(()))  # starts one: `e2e/test_commands.py`
    code, out, _ = call(monkeypatch, capsys, "doctor", "--tracking-uri", UNREACHABLE)
    marks = {line.split()[1]: line[0] for line in out.splitlines()}
    assert code == 1 and marks["MLflow"] == "✗" and marks["rayclip"] == "✓" and {"GPU", "data", "disk"} <= set(marks)
    code, out, _ = call(monkeypatch, capsys, "doctor", "--json")
    assert code == 0 and {finding["topic"] for finding in json.loads(out)} >= {"rayclip", "libraries", "MLflow"}
