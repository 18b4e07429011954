"""Places on the command line: commas, `~`, several values."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rayclip.paths import expand_home, split_places, temporary_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("~", "{h}"),
        ("~/a.parquet", "{h}/a.parquet"),
        ("local-dir:~/m", "local-dir:{h}/m"),
        ("cupl:captions=~/c,crops=3", "cupl:captions={h}/c,crops=3"),
        ("~/a,~/b", "{h}/a,{h}/b"),
        ("a~/b", "a~/b"),
        ("/x/~", "/x/~"),
        ("~other/a", "~other/a"),
        ("s3://bucket/~/a", "s3://bucket/~/a"),
        ("digits", "digits"),
    ],
)
def test_home_is_meant_where_a_path_begins(home, written, read):
    assert expand_home(written) == read.format(h=home)


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ("digits,cifar10", ["digits", "cifar10"]),
        (["digits", "cifar10"], ["digits", "cifar10"]),
        (["digits, cifar10", "a"], ["digits", "cifar10", "a"]),
        ("a,b.parquet", ["a,b.parquet"]),
        (" a,b.parquet ,digits", ["a,b.parquet", "digits"]),
        ("digits,a,b.parquet", ["digits", "a,b.parquet"]),
        ("x,y,a,b.parquet", ["x", "y", "a,b.parquet"]),
        ("a,b.parquet#holdout,c", ["a,b.parquet#holdout", "c"]),
        ("a,b.parquet#label=x#holdout", ["a,b.parquet#label=x#holdout"]),
        (",,", []),
        ("", []),
        ([], []),
        ("x" * 5000 + ",y", ["x" * 5000, "y"]),
    ],
)
def test_what_exists_is_taken_whole(tmp_path, monkeypatch, values, places):
    monkeypatch.chdir(tmp_path)
    Path("a,b.parquet").touch()
    assert split_places(values) == places


def test_home_and_commas_together(home):
    (home / "my, own").mkdir()
    assert split_places("~/my, own,digits") == [f"{home}/my, own", "digits"]


def test_a_temporary_folder_of_a_killed_process_is_cleared_away_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "rayclip-of-others").mkdir()
    hold = (
        "import sys, rayclip.paths as p; f = p.temporary_folder(); print(f.__enter__(), flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold], env={"TMPDIR": str(tmp_path)}, **pipes) as process:
        theirs = Path(process.stdout.readline().strip())
        (theirs / "file").write_text("a")
        with temporary_folder() as mine:
            assert (theirs / "file").exists() and list(mine.iterdir()) == []
        process.kill()
    assert theirs.exists()
    with temporary_folder() as mine, temporary_folder() as second:
        assert not theirs.parent.exists() and mine.exists() and second.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["rayclip-of-others"]
