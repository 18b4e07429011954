"""What is wrong with an MLflow address is one sentence with its remedy, in a moment, for every command that asks."""

import errno
import os
import sqlite3
import time

import pytest

from calling import call
from rayclip.cli import doctor
from rayclip.store import Store
from rayclip.tracking import address
from rayclip.tracking.address import AwayError
from rayclip.tracking.deliverer import Deliverer
from rayclip.tracking.experiment import Experiment, count_experiments, results_of
from rayclip.tracking.journal import Journal
from rayclip.types import UserError

NOBODY = "127.0.0.1:5"
DRIVERS = {
    f"postgresql://mlflow@{NOBODY}/mlflow": ("psycopg", "psycopg[binary]"),
    f"postgresql+pg8000://mlflow@{NOBODY}/mlflow": ("pg8000", "pg8000"),
    f"mysql://mlflow@{NOBODY}/mlflow": ("MySQLdb", "mysqlclient"),
    f"mysql+pymysql://mlflow@{NOBODY}/mlflow": ("pymysql", "pymysql"),
    f"mssql+pyodbc://mlflow@{NOBODY}/mlflow": ("pyodbc", "pyodbc"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of a good store, to be copied and spoiled."""
    folder = tmp_path_factory.mktemp("made")
    Experiment(f"sqlite:///{folder}/mlflow.db", "study").contact()
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def damaged(here, made):
    (here / "mlflow.db").write_bytes(b"this is no database\n" * 200)
    return "is none, or damaged: move it away, or give another --tracking-uri."


def torn(here, made):
    """The beginning is there: MLflow itself meets what is missing."""
    (here / "mlflow.db").write_bytes(made[:5000] + b"\xff" * 20000)
    return "cannot be used: mend it, move it away, or give another --tracking-uri"


def old(here, made):
    (here / "mlflow.db").write_bytes(made)
    with sqlite3.connect(here / "mlflow.db") as database:
        database.execute("update alembic_version set version_num='451aebb31d03'")
    database.close()
    return f"take a backup and run `mlflow db upgrade sqlite:///{here}/mlflow.db`, or give another --tracking-uri."


def folder(here, made):
    (here / "mlflow.db").mkdir()
    return "is a folder: give a file."


SPOILED = [damaged, torn, old, folder]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_spoiled_store_is_told_by_every_command(here, made, monkeypatch, capsys, spoil):
    says = spoil(here, made)
    uri = f"sqlite:///{here}/mlflow.db"
    began = time.perf_counter()
    for ask in (
        Experiment(uri, "study").contact,
        lambda: count_experiments(uri),
        lambda: results_of("0" * 32, uri),
        lambda: Deliverer(Journal(Store(str(here / "out"))), Experiment(uri, "study")),
    ):
        with pytest.raises(UserError) as told:
            ask()
        assert says in str(told.value) and "\n" not in str(told.value)
        assert not isinstance(told.value, AwayError), "waiting does not mend it"
    assert time.perf_counter() - began < 20
    evaluate = ["eval", "--model", "digits", "--data", "digits", "--attacks", "clean", "--limit", "4", "--out", "o"]
    for command in (["ui", "--no-browser"], evaluate):
        code, out, err = call(monkeypatch, capsys, *command)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    assert not (here / "o").exists()
    ((topic, state, line),) = doctor._careful("MLflow", lambda: doctor._mlflow(None))
    assert (topic, state) == ("MLflow", "wrong") and says in line


@pytest.mark.parametrize("uri", DRIVERS)
def test_a_driver_that_is_not_installed_is_named_with_its_package(here, monkeypatch, capsys, uri):
    module, package = DRIVERS[uri]
    try:
        __import__(module)
        pytest.skip(f"{module} is installed")
    except ImportError:
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    told = []
    for command in (
        ["eval", "--model", "digits", "--data", "digits", "--attacks", "clean", "--out", "o"],
        ["train", "--method", "tecoa", "--model", "digits", "--data", "digits", "--out", "o"],
        ["retrieval", "--model", "digits", "--data", "none", "--out", "o"],
        ["interpolate", "--from", "digits", "--to", "digits", "--data", "digits", "--out", "o"],
        ["ui", "--no-browser"],
        ["report", "0" * 32],
    ):
        code, out, err = call(monkeypatch, capsys, *command)
        assert (code, out) == (2, "") and err.count("\n") == 1
        told.append(err)
    ((_, state, line),) = doctor._careful("MLflow", lambda: doctor._mlflow(None))
    assert state == "wrong"
    for sentence in (*told, line):
        assert f"the Python package {module}, which is not installed: pip install" in sentence and package in sentence
    assert list(here.iterdir()) == []


def test_a_database_that_does_not_answer_is_away_in_a_moment(here):
    """MLflow would try ten times, for 102 s."""
    pytest.importorskip("psycopg2")
    experiment = Experiment(f"postgresql+psycopg2://mlflow@{NOBODY}/mlflow", "study")
    began = time.perf_counter()
    with pytest.raises(AwayError, match=r"cannot be reached: start it, or give another --tracking-uri \(.*refused"):
        experiment.contact()
    assert time.perf_counter() - began < 5
    journal = Journal(Store(str(here / "out")))
    journal.note_delivered(experiment.address, {})
    Deliverer(journal, experiment)  # what has been reached before may be away


@pytest.mark.parametrize("uri", ["postgresql+nix://h/d", "postgresql://h:port/d", "somewhere", "ftp://h/x"])
def test_an_address_that_is_none_is_told(here, uri):
    with pytest.raises(UserError, match="cannot be reached as it is written") as told:
        Experiment(uri, "study").contact()
    assert "\n" not in str(told.value) and not isinstance(told.value, AwayError)


def test_a_folder_that_cannot_be_written_is_told_before_mlflow_tries(here, made, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (here / "mlflow.db").write_bytes(made)
    monkeypatch.setattr("rayclip.paths.tempfile.TemporaryFile", refuse)
    uri = f"sqlite:///{here}/mlflow.db"
    with pytest.raises(UserError, match=r"cannot write '.*', where runs are logged \(Read-only file system\)"):
        Experiment(uri, "study").contact()
    assert count_experiments(uri) == 2, "it may be looked at: the default experiment and ours"
    ((_, state, line),) = doctor._careful("MLflow", lambda: doctor._mlflow(uri))
    assert state == "wrong" and "work in a folder that can be written" in line


def test_a_working_directory_that_is_gone_is_told(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="the working directory is gone"):
        address.default_uri()
    for check in (lambda: doctor._mlflow(None), doctor._disk, doctor._versions):
        assert list(doctor._careful("topic", check))
