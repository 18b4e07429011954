"""Where a private Ray keeps its sockets, and what its workers import; on a real Ray in e2e/test_ray_surroundings.py."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rayclip.distributed.session import (
    find_shadowing,
    make_import_hook,
    ray_folder,
    short_folder,
    why_unsuitable,
)
from rayclip.types import UserError


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory that this process imports nothing from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    return tmp_path


def test_a_short_folder_stays_and_a_long_one_is_replaced_by_a_private_one_for_ray_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    with short_folder():
        assert "RAY_TMPDIR" not in os.environ
    long = tmp_path / ("x" * 60)
    monkeypatch.setenv("TMPDIR", str(long))
    with short_folder():
        chosen = ray_folder()
        assert chosen != long and os.environ["TMPDIR"] == str(long), "everything else keeps to it"
        about = chosen.stat()
        assert stat.S_IMODE(about.st_mode) == 0o700 and about.st_uid == os.geteuid()
        (chosen / "ray").mkdir()
    assert not chosen.exists() and "RAY_TMPDIR" not in os.environ
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(ZeroDivisionError), short_folder():
        chosen = ray_folder()
        assert chosen != long
        raise ZeroDivisionError
    assert not chosen.exists() and os.environ["RAY_TMPDIR"] == str(long), "also after an error"


def test_room_is_left_for_the_longest_socket():
    room = next(n for n in range(200) if why_unsuitable(Path("/" + "x" * n)) is not None)
    assert why_unsuitable(Path("/" + "x" * (room - 1))) is None or os.geteuid() != 0
    session = "ray/session_2026-11-27_16-51-06_123456_4194304/sockets/plasma_store"
    assert room + len(os.fsencode(f"/{session}")) <= 107
    assert "bytes long" in why_unsuitable(Path("/" + "ä" * (room // 2 + 1))), "bytes count, not letters"


def test_a_folder_that_cannot_be_written_is_none_for_ray():
    assert why_unsuitable(Path("/proc/x")) == "cannot be written"
    assert why_unsuitable(Path("/dev/null/x")) == "cannot be written"


def test_without_any_short_folder_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr("rayclip.distributed.session._SHORT_FOLDERS", ("/proc/none", "/dev/null/none"))
    monkeypatch.setenv("RAY_TMPDIR", f"/{'x' * 99}")
    with pytest.raises(UserError, match="set RAY_TMPDIR to a short folder"), short_folder():
        pass


def test_what_would_shadow_a_package_is_named(elsewhere):
    assert find_shadowing() == [] and make_import_hook() is None
    for name in ("pyarrow.py", "mine.py", "notes.txt", "my-file.py"):
        (elsewhere / name).write_text("")
    (elsewhere / "torch").mkdir()
    (elsewhere / "ray").mkdir()
    (elsewhere / "ray" / "__init__.py").write_text("")
    assert find_shadowing() == ["pyarrow.py", "ray"], "a folder without __init__.py gives way to a package"


def test_a_working_directory_that_the_driver_imports_from_stays(elsewhere, monkeypatch):
    """As with `python -m rayclip`, PYTHONPATH=. and a script's own folder."""
    (elsewhere / "pyarrow.py").write_text("")
    assert make_import_hook() is not None
    for place in ("", str(elsewhere), f"{elsewhere}/../{elsewhere.name}"):
        monkeypatch.setattr(sys, "path", [place, *sys.path])
        assert make_import_hook() is None and find_shadowing() == []
        monkeypatch.undo()
        monkeypatch.chdir(elsewhere)


def test_a_working_directory_that_is_gone_is_no_matter(elsewhere):
    (elsewhere / "gone").mkdir()
    os.chdir(elsewhere / "gone")
    (elsewhere / "gone").rmdir()
    assert make_import_hook() is None and find_shadowing() == []
    os.chdir(elsewhere)


def test_a_worker_drops_what_ray_adds_before_it_imports_anything(elsewhere):
    (elsewhere / "wave.py").write_text("raise RuntimeError('shadowed')")
    (elsewhere / "only_here.py").write_text("")
    worker = """
import ray.cloudpickle, sys
start = ray.cloudpickle.loads(bytes.fromhex(sys.argv[1]))
sys.path.remove("") if "" in sys.path else None
start()
sys.path.insert(0, sys.argv[2])  # as Ray does
import wave
assert sys.argv[2] not in sys.path and "wave.py" in wave.__file__
try:
    import only_here
except ModuleNotFoundError:
    print("as the driver")
"""
    import ray.cloudpickle

    start = ray.cloudpickle.dumps(make_import_hook()).hex()
    command = [sys.executable, "-P", "-c", worker, start, str(elsewhere)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere)
    assert done.stdout == "as the driver\n", done.stderr
