"""`rayclip doctor`, check by check; `e2e/test_commands.py` runs all of it, with Ray."""

import json
import shutil
import subprocess
import sys

import pytest

from calling import call
from rayclip.cli import doctor
from rayclip.data.manifest import MANIFEST

UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAYCLIP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RAYCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def found(check):
    return [(finding.topic, finding.state, finding.says) for finding in doctor._careful("topic", check)]


def test_versions_name_every_library():
    states = found(doctor._versions)
    assert [state for _, state, _ in states] == ["ok", "ok"]
    assert all(f"{name} " in states[1][2] for name in doctor._LIBRARIES)


def test_an_absent_library_is_wrong_and_how_to_get_it_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "_LIBRARIES", ("torch", "no-such-library"))
    assert ("libraries", "wrong", "no-such-library is not installed: pip install -e . brings it.") in found(
        doctor._versions
    )


def test_a_store_that_is_not_there_will_be_made_and_is_not_made_now(here):
    ((topic, state, says),) = found(lambda: doctor._mlflow(None))
    assert (topic, state) == ("MLflow", "ok") and "will be made at the first run" in says
    assert list(here.iterdir()) == []


def test_a_server_that_does_not_answer_is_wrong():
    ((_, state, says),) = found(lambda: doctor._mlflow(UNREACHABLE))
    assert state == "wrong" and "cannot be reached: start it" in says


def test_data_sets_are_listed_and_damaged_ones_are_wrong(here):
    ((_, state, says),) = found(lambda: doctor._data(None))
    assert state == "note" and "rayclip data prepare NAME" in says
    (here / "data" / "dtd").mkdir(parents=True)
    (here / "data" / "dtd" / MANIFEST).write_text("{")
    first, *_ = found(lambda: doctor._data(None))
    assert first[1] == "wrong" and first[2].startswith("dtd: ")


def test_a_disk_that_is_nearly_full_is_noted(monkeypatch):
    assert {state for _, state, _ in found(doctor._disk)} <= {"ok", "note"}
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    assert all(state == "note" and "1.0 GiB left" in says for _, state, says in found(doctor._disk))


def test_something_wrong_is_exit_code_1_and_the_rest_is_still_said(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_ray", lambda cluster: iter(()))  # starts one: `e2e/test_commands.py`
    code, out, _ = call(monkeypatch, capsys, "doctor", "--tracking-uri", UNREACHABLE)
    marks = {line.split()[1]: line[0] for line in out.splitlines()}
    assert code == 1 and marks["MLflow"] == "✗" and marks["rayclip"] == "✓" and {"GPU", "data", "disk"} <= set(marks)
    code, out, _ = call(monkeypatch, capsys, "doctor", "--json")
    assert code == 0 and {finding["topic"] for finding in json.loads(out)} >= {"rayclip", "libraries", "MLflow"}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError("first line\nand more"),
            "this check was cut off by an error (RuntimeError: first line) in test_",
        ),
        (SystemExit(3), "(SystemExit: 3)"),
        (OSError(36, "File name too long"), "File name too long"),
        (MemoryError(), "(MemoryError)"),
        (KeyError("postgresql://me:secret@host/x"), "postgresql://me:***@host/x"),
    ],
)
def test_no_error_of_one_check_ends_the_others(monkeypatch, capsys, error, says):
    def fails(*_):
        yield doctor.Finding("topic", "ok", "before")
        raise error

    for check in ("_versions", "_gpu", "_ray", "_mlflow", "_data"):
        monkeypatch.setattr(doctor, check, fails)
    code, out, err = call(monkeypatch, capsys, "doctor")
    lines = out.splitlines()
    assert code == 1 and err == "" and sum(says in line for line in lines) == 5
    assert [line.split()[1] for line in lines if line[0] == "✗"] == ["versions", "GPU", "Ray", "MLflow", "data"]
    assert any(line.split()[1] == "disk" for line in lines)


@pytest.mark.parametrize("name", ["ray.py", "pyarrow/__init__.py"])
def test_a_file_that_shadows_a_library_is_named(here, monkeypatch, name):
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_text("raise RuntimeError('shadow')\n")
    assert any(state == "note" and "bears the name of a library" in says for _, state, says in found(doctor._versions))
    code = "import sys; sys.path.insert(0, '.'); from rayclip.cli import doctor as d\n" + (
        f"def check():\n    import {name.partition('/')[0].removesuffix('.py')}\n    yield\n"
        "print(*d._careful('topic', check))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    module = name.partition("/")[0].removesuffix(".py")
    assert f"{here / name} is imported in the place of the installed {module}, rename it" in done.stdout


def test_places_that_cannot_be_written_are_wrong_with_what_to_do(here, monkeypatch):
    monkeypatch.setenv("RAYCLIP_CACHE", "/proc/x")
    assert [says for topic, state, says in found(doctor._disk) if state == "wrong"] == [
        "cache: /proc/x cannot be written (No such file or directory): set RAYCLIP_CACHE to one that can."
    ]
    assert not any(here.iterdir()), "nothing is left behind"
