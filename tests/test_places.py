"""Every command that writes says before any work starts that it cannot, in one sentence, and leaves nothing behind."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calling import call
from conftest import tiny_clip
from data.test_data import write
from rayclip import paths
from rayclip.cli.options import hand_out
from rayclip.models.checkpoint import save_checkpoint
from rayclip.types import UserError

EVAL = ["--model", "digits", "--data", "digits", "--eps", "1/255"]
NOWHERE = {
    "proc": "/proc/x",
    "device": "/dev/null/x",
    "file": "{here}/in_the_way",
    "below a file": "{here}/in_the_way/below",
    "link to nothing": "{here}/dangling",
    "name too long": "{here}/" + 300 * "n",
    "nobody's home": "~nobody-of-this-name/x",
}
FOLDERS = {
    "eval": ["eval", *EVAL, "--no-tracking", "--out"],
    "plan": ["plan", *EVAL, "--no-tracking", "--out"],
    "train": ["train", "--method", "tecoa", "--model", "digits", "--data", "digits", "--no-tracking", "--out"],
    "retrieval": ["retrieval", "--model", "digits", "--data", "{here}/pairs.parquet", "--no-tracking", "--out"],
    "interpolate": ["interpolate", "--from", "digits", "--to", "digits", *EVAL[2:], "--no-tracking", "--out"],
    "import": ["import", "{here}/tower.pt", "--base", "digits", "--allow-gelu", "--out"],
    "leaderboard": ["leaderboard", "{here}", "--out"],
    "report": ["report", "{here}", "--figures"],
    "prepare": ["data", "prepare", "dtd", "--root"],
}
FILES = {
    "report": ["report", "{here}", "--format", "md", "--out"],
    "eval": ["eval", *EVAL, "--no-tracking", "--out", "{here}/out", "--json"],
    "sheet": ["data", "show", "digits", "--sheet"],
    "filter": ["captions", "filter", "{here}/none.json", "--model", "digits", "--data", "digits", "--out"],
    "generate": ["captions", "generate", "--generator", "none", "--data", "digits", "--out"],
}
ENDINGS = {"filter": ".csv", "generate": ".json"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYCLIP_DATA", str(tmp_path / "data"))
    (tmp_path / "in_the_way").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    return tmp_path


@pytest.mark.parametrize("place", NOWHERE)
@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_cannot_be_made_is_told_at_once(here, monkeypatch, capsys, command, place):
    args = [arg.format(here=here) for arg in [*FOLDERS[command], NOWHERE[place]]]
    before = sorted(here.rglob("*"))
    code, out, err = call(monkeypatch, capsys, *args)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: ")
    assert args[-1] in err and ("give a folder" in err or "give another folder" in err)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x", "{here}/folder"])
@pytest.mark.parametrize("command", FILES)
def test_a_file_that_cannot_be_made_is_told_at_once(here, monkeypatch, capsys, command, place):
    ending = ENDINGS.get(command, "")
    (here / f"folder{ending}").mkdir()
    args = [arg.format(here=here) for arg in [*FILES[command], place + ending]]
    before = sorted(here.rglob("*"))
    code, out, err = call(monkeypatch, capsys, *args)
    assert (code, out) == (2, "") and err.count("\n") == 1 and Path(args[-1]).name in err
    assert sorted(here.rglob("*")) == before


def test_a_device_is_not_replaced_by_a_report(here, monkeypatch, capsys):
    os.mkfifo(here / "pipe.md")
    code, _, err = call(monkeypatch, capsys, "report", here, "--out", here / "pipe.md")
    assert code == 2 and "no file but a device or a pipe" in err and (here / "pipe.md").is_fifo()


def test_what_is_finished_may_lie_where_nothing_can_be_written(here, monkeypatch, capsys):
    """A checkpoint of the same settings: nothing is to be written."""
    write(here / "tower.parquet", [0, 1])
    import torch

    torch.save(tiny_clip(1).model.visual.state_dict(), here / "tower.pt")
    save_checkpoint(tiny_clip(), here / "base", {})
    command = ["import", here / "tower.pt", "--base", f"local-dir:{here}/base", "--allow-gelu", "--out", here / "out"]
    assert call(monkeypatch, capsys, *command)[0] == 0

    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(paths.tempfile, "TemporaryFile", refuse)
    code, out, err = call(monkeypatch, capsys, *command)
    assert code == 0 and "nothing to do" in out, err
    code, _, err = call(monkeypatch, capsys, *command[:-1], here / "other")
    assert code == 2 and "Read-only file system" in err and not (here / "other").exists()


def test_the_python_interface_is_told_as_well(here):
    from rayclip.api.request import Where
    from rayclip.store import Store

    with pytest.raises(UserError, match="/proc/x"):
        Where(out="/proc/x").logbook(Store("/proc/x"))


def test_folders_that_were_made_for_the_test_are_gone(here):
    before = sorted(here.rglob("*"))
    paths.check_folder("--out", str(here / "a" / "b" / "c"))
    paths.check_folder("--out", "s3://bucket/anything")
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("kind", ["mount", "rights"])
def test_a_working_directory_that_cannot_be_written_is_told_in_a_moment(tmp_path, kind):
    """MLflow would try for 102 s. A superuser needs a read-only mount, anybody else the rights of the folder."""
    (tmp_path / "cwd").mkdir()
    command = [sys.executable, "-m", "rayclip", "eval", *EVAL, "--quiet", "--out", str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    if kind == "mount":
        mount = f"mount --bind {tmp_path}/cwd {tmp_path}/cwd && mount -o remount,ro,bind {tmp_path}/cwd"
        isolated = ["unshare", "--mount", "sh", "-c", f'{mount} && cd {tmp_path}/cwd && exec "$@"', "sh"]
        if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a folder read-only")
        command = [*isolated, *command]
    elif os.geteuid() == 0:
        pytest.skip("a superuser may write in every folder: the mount is tried instead")
    else:
        (tmp_path / "cwd").chmod(0o555)
    took = []
    for _ in range(2):  # the first start may have to compile
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True, check=False
        )
        took.append(time.perf_counter() - began)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
        assert "mlflow.db', where runs are logged" in done.stderr
        assert "work in a folder that can be written, or give another --tracking-uri" in done.stderr
    assert min(took) < 10, "imports and all"
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_written_are_shown_all_the_same(here, monkeypatch):
    shown = []
    with pytest.raises(UserError, match="/dev/full"):
        hand_out("/dev/full", "[]\n", lambda: shown.append("table"))
    assert shown == ["table"]
    hand_out(str(here / "rows.json"), "[]\n", lambda: shown.append("again"))
    assert shown == ["table", "again"] and (here / "rows.json").read_text() == "[]\n"
    assert [p.name for p in here.glob("*.partial")] == []
