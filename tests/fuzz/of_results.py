"""Journals and results."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fuzz import mutations as m
from fuzz.kind import Form, Kind, always, as_text
from fuzz.of_data import prepare_pictures, read_prepared
from rayclip.data.prepare import JOURNAL
from rayclip.evaluation.aggregate import right_after_attack
from rayclip.evaluation.plan import missing_shards
from rayclip.reports.build import build
from rayclip.reports.results import confidences, read_results
from rayclip.store import Store
from rayclip.tracking.journal import Journal, journals_in, logged_runs, waits
from rayclip.types import UserError
from reports import made

ADDRESS = "http://host study"


# Journals


def make_journals(folder: Path) -> None:
    with contextlib.suppress(UserError):
        prepare_pictures(folder / "half", stop=True)
    journal = Journal(Store(str(folder)))
    about = {"name": "a", "parent": None, "params": {"x": "1"}, "tags": {"t": "1"}, "experiment": "study"}
    for run in ("one", "two"):
        journal.add("start", run, key=f"key {run}", cells=["c1", "c2"], **about)
        journal.metrics(run, [("clean/digits", 50.0, 0), ("train/loss", 1.5, 3)])
        journal.add("table", run, rows=[{"a": 1}], name="results_table.json")
        journal.add("artifact", run, files={"a.txt": journal.keep(b"x")}, folder="texts")
        journal.add("checkpoint", run, place="models/a", folder="checkpoint", about={"tags": {}})
        journal.add("finish", run, failed=False, complete=True)
    journal.add("known", "old", key="old", address=ADDRESS, experiment="study", cells=["c3"], complete=True)
    os.replace(next((folder / "journal").glob("*.jsonl")), folder / "journal/a.jsonl")
    journal.note_delivered(ADDRESS, {"runs": {"one": "1" * 32}, "positions": {"journal/a.jsonl": 200}, "refused": []})
    os.replace(next((folder / "journal").glob("*.json")), folder / "journal/delivered-a.json")
    older = Store(str(folder / "older"))
    runs = {"eval m 1": "a" * 32, "m": "b" * 32}
    older.write_json("runs.json", {"tracker": ADDRESS, "runs": runs, "logged": ["m"], "cells": {"c": "a" * 32}})
    older.write_json("mlflow_ids.json", {"a" * 32: "1" * 32})
    entry = {"kind": "start", "run": "b" * 32, "time_ms": 5, "content": {"name": "m", "params": {}, "tags": {}}}
    older.write_json("spool/1-x.json", entry)


def read_journals(folder: Path) -> Any:
    found = []
    for journal in journals_in(str(folder)):
        for address in (None, ADDRESS):
            history = journal.history(address)
            found.append([history.runs, sorted(history.complete), history.cells, history.experiment])
        found += [waits(journal.store, ADDRESS), logged_runs(journal.store), journal.delivered(ADDRESS)]
    as_text(found)


def resume_preparation(folder: Path) -> Any:
    prepare_pictures(folder / "half")
    return read_prepared(folder / "half")


JOURNALS = Kind(
    make=make_journals,
    forms=(
        *[Form(file="journal/a.jsonl", damage=m.json_lines, read=read_journals)] * 3,
        Form(file="journal/delivered-a.json", damage=m.json_file, read=read_journals),
        Form(file="older/runs.json", damage=m.json_file, read=read_journals),
        Form(file="older/mlflow_ids.json", damage=m.json_file, read=read_journals),
        Form(
            file="half/set/train-00000.part.npy", damage=m.any_file, read=resume_preparation, same=always, writes=True
        ),
        Form(file=f"half/set/{JOURNAL}", damage=m.json_file, read=resume_preparation, same=always, writes=True),
    ),
)


# Results


def make_results(folder: Path) -> None:
    attacks = (made.CLEAN, made.pgd())
    for model in ("local-dir:a/b", "digits"):
        for attack in attacks:
            made.put(folder, model, attack, made.bits(1, 12), confidence=np.linspace(0, 1, 12), shard=12)
        made.describe(folder, model, method="tecoa", shots=4)
    store = Store(str(folder))
    (record,) = [
        r
        for c in store.child("cells").folders()
        if (r := store.read_json(f"cells/{c}/cell.json"))["model"] == "digits" and r["attack_label"] == "clean"
    ]
    recalls = [{"direction": d, "k": k, "right": k, "n": 20} for d in ("tr", "ir") for k in (1, 5, 10)]
    counted = {"images": 20, "captions": 20, "text": "captions as written", "ties": "against the query"}
    protocol = {**record["protocol"], **counted}
    pairs = {**record, "recalls": recalls, "dataset": "flickr8k", "data_fingerprint": "f", "protocol": protocol}
    store.write_json("retrieval/pairs.json", pairs)
    store.write_json("results.json", [{"model": "digits"}, {"model": "local-dir:a/b"}])
    cell = next(c for c in store.child("cells").folders() if store.read_json(f"cells/{c}/cell.json") == record)
    os.rename(folder / "cells" / cell, folder / "cells/one")
    os.rename(folder / f"lineage/{made.fingerprint('digits')}.json", folder / "lineage/one.json")
    store.write_json("cells/one/cell.json", {**record, "model_fingerprint": "one"})


def read_reports(folder: Path) -> Any:
    results = read_results([str(folder)])
    document = build(results, calibration=True)
    as_text([document.summary, document.lines])
    store, cell = Store(str(folder)), SimpleNamespace(id="one", dataset="set", attack_label="clean")
    left = missing_shards(cell, np.arange(12), store, 4)  # type: ignore[arg-type]
    right = right_after_attack(cell, np.arange(12), store)  # type: ignore[arg-type]
    sure = [confidences(c) for c in sorted(results.cells, key=lambda c: c.id)]
    return [right.tolist(), left.positions.tolist(), str(sure), document.lines]


RESULTS = Kind(
    make=make_results,
    forms=(
        *[Form(file="cells/one/00000000.parquet", damage=m.any_file, read=read_reports, same=always)] * 2,
        *[Form(file="cells/one/00000000.parquet", damage=m.parquet, read=read_reports)] * 3,
        Form(file="cells/one/cell.json", damage=m.json_file, read=read_reports),
        Form(file="lineage/one.json", damage=m.json_file, read=read_reports),
        Form(file="results.json", damage=m.json_file, read=read_reports),
        Form(file="retrieval/pairs.json", damage=m.json_file, read=read_reports),
    ),
)
