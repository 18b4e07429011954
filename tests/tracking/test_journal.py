"""The journal beside the results: what several writers add is read whole, and one that is killed costs one line."""

import errno
import json
import multiprocessing
import pickle

import pytest

from rayclip.store import Store
from rayclip.tracking.journal import Journal, logged_runs, waits
from rayclip.tracking.older import convert


@pytest.fixture(params=["folder", "object store"])
def journal(request, tmp_path):
    on_disk = request.param == "folder"
    return Journal(Store(str(tmp_path)) if on_disk else Store(request.getfixturevalue("s3")).child("several"))


def values(journal, positions=None):
    found = journal.read({} if positions is None else positions)
    return sorted(value for event in found for _, value, _ in event.content["values"])


def test_events_of_several_writers_are_read_once_and_again(journal):
    writers, positions = [journal, *(pickle.loads(pickle.dumps(journal)) for _ in range(3))], {}
    for i in range(20):
        writers[i % 4].metrics("run", [("x", float(i), 0)])
    assert len(journal.store.names("journal", ".jsonl")) == 4, "each has a file of its own"
    assert values(journal, positions) == list(range(20)) and journal.read(positions) == []
    writers[2].metrics("run", [("x", 20.0, 0)])
    assert values(journal, positions) == [20.0] and values(journal) == list(range(21))


def test_a_long_journal_on_an_object_store_is_not_written_whole_for_each_event(s3, monkeypatch):
    journal, sizes, write = Journal(Store(s3).child("long")), [], Store.write
    monkeypatch.setattr(Store, "write", lambda self, name, data: (sizes.append(len(data)), write(self, name, data)))
    for i in range(40):
        journal.add("describe", "run", text=f"{i}" + 10_000 * "x")
    assert max(sizes) < 80_000
    assert [event.content["text"].rstrip("x") for event in journal.read({})] == [str(i) for i in range(40)]


def write_and_be_killed(place, i):
    journal = Journal(Store(place))
    for step in range(50):
        journal.metrics("run", [("x", float(i), step)])
    with journal.store.path(journal._file).open("ab") as file:  # in the middle of the next line
        file.write(b'{"event": "metrics", "run": "ru')


def test_processes_that_are_killed_in_the_middle_of_a_line_lose_that_line_alone(tmp_path):
    place = str(tmp_path / "out")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_and_be_killed, args=(place, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    journal = Journal(Store(place))
    journal.metrics("run", [("x", 9.0, 0)])
    assert values(journal) == sorted([float(i) for i in range(4)] * 50 + [9.0])


def test_what_follows_a_line_that_met_a_full_disk_is_read(tmp_path, monkeypatch):
    journal, append = Journal(Store(str(tmp_path))), Store.append

    def half(self, name, data):
        append(self, name, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", name)

    journal.metrics("run", [("x", 1.0, 0)])
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Store, "append", half)
        journal.metrics("run", [("x", 2.0, 0)])
    journal.metrics("run", [("x", 3.0, 0)])
    assert values(journal) == [1.0, 3.0]


@pytest.mark.parametrize(
    "line", [b"", b"nothing", b"[]", b"{}", b'{"event": "x", "run": "y", "time_ms": "z"}', b"\xff"]
)
def test_a_damaged_line_is_no_event(tmp_path, line):
    journal = Journal(Store(str(tmp_path)))
    journal.store.write("journal/a.jsonl", line + b'\n{"event": "metrics", "run": "r", "time_ms": 1, "values": []}\n')
    assert [event.kind for event in journal.read({})] == ["metrics"]


def test_events_hold_no_secrets_and_can_be_read_by_people(tmp_path):
    journal, source = Journal(Store(str(tmp_path))), "https://ann:pa55@host/cupl.json?token=pa55"
    params = {"captions": source, source: "x"}
    journal.add(
        "start", "run", key=source, name="模型 \udc80", parent=None, params=params, tags={}, about=[{"spec": source}]
    )
    (file,) = (tmp_path / "journal").iterdir()
    text = file.read_text()
    assert "pa55" not in text and "https://ann:***@host/cupl.json?token=***" in text and "模型 \\\\udc80" in text
    assert json.loads(text)["event"] == "start" and text.count("\n") == 1


def test_a_checkpoints_place_moves_with_the_results(tmp_path):
    sweep, training = Journal(Store(str(tmp_path / "sweep"))), Journal(Store(str(tmp_path / "m")).child(".rayclip"))
    assert sweep.relative(str(tmp_path / "sweep" / "models" / "a")) == "models/a"
    assert training.relative(str(tmp_path / "m")) == ".." and training.store.parent.root == str(tmp_path / "m")
    assert sweep.relative(str(tmp_path / "elsewhere")) == str(tmp_path / "elsewhere")
    remote = Journal(Store("s3://bucket/m?region=us-east-1").child(".rayclip"))
    assert remote.relative("s3://bucket/m?region=us-east-1") == ".."


def older(store, *, entries=()):
    """What an earlier version left: a finished run in MLflow, another that was begun, and entries that wait."""
    runs = {"eval m 1": "a" * 32, "m": "b" * 32}
    saved = {"tracker": "http://host study", "runs": runs, "logged": ["eval m 1"], "cells": {"c": "a" * 32}}
    store.write_json("runs.json", saved)
    store.write_json("mlflow_ids.json", {"a" * 32: "1" * 32})
    for i, (kind, run, content) in enumerate(entries):
        store.write_json(f"spool/{i:020d}-x.json", {"kind": kind, "run": run, "time_ms": 5 + i, "content": content})


def test_an_earlier_versions_runs_are_known_where_they_were_logged(tmp_path):
    store = Store(str(tmp_path))
    older(store)
    assert logged_runs(store) == ("http://host study", {"c": "1" * 32}), "before it is converted"
    journal = Journal(store)
    convert(journal)
    convert(journal)
    assert logged_runs(store) == ("http://host study", {"c": "1" * 32})
    history = journal.history("http://host study")
    assert history.runs == {"eval m 1": "a" * 32, "m": "b" * 32} and history.complete == {"a" * 32}
    assert journal.history("http://other study").runs == {}
    assert not waits(store, "http://host study") or len(journal.read({})) == 2


def test_an_earlier_versions_queue_becomes_events(tmp_path):
    store, run = Store(str(tmp_path)), "b" * 32
    store.write("spool/files/1", b"png")
    store.write("spool/files/2", b"weights")
    start = {"name": "m", "parent": None, "params": {"shots": "5"}, "tags": {}}
    entries = [
        ("start", run, start),
        ("metrics", run, [["train/loss", 1.0, 0]]),
        ("image", run, {"key": "k", "files": {"png": "spool/files/1"}}),
        ("checkpoint", run, {"folder": "checkpoint", "about": {}, "files": {"prompt.safetensors": "spool/files/2"}}),
        ("finish", run, False),
    ]
    older(store, entries=entries)
    assert waits(store, "http://host study")
    journal = Journal(store)
    convert(journal)
    assert store.names("spool", ".json") == [] and journal.history("http://host study").experiment == "study"
    events = {event.kind: event for event in journal.read({})}
    assert events["start"].content.items() >= {"key": "m", "name": "m", "params": {"shots": "5"}}.items()
    assert events["metrics"].content == {"values": [["train/loss", 1.0, 0]]} and events["metrics"].time_ms == 6
    assert store.read(events["image"].content["file"]) == b"png"
    assert store.read(f"{events['checkpoint'].content['place']}/prompt.safetensors") == b"weights"
    assert events["finish"].content == {"failed": False, "complete": False}
