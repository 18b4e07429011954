"""From a row of a report to its run, checkpoint, data and code."""

import csv
import io

import pytest

from rayclip.reports.build import build
from rayclip.reports.formats import document_csv
from rayclip.reports.results import read_results
from rayclip.store import Store
from rayclip.tracking.journal import logged_runs
from reports.made import BERT, CLEAN, bits, describe, fingerprint, put


@pytest.fixture
def results(tmp_path):
    store, runs = Store(str(tmp_path)), {}
    for model in ("digits", "local-dir:/trained"):
        for attack in (CLEAN, BERT):
            cell = put(tmp_path, model, attack, bits(1), dataset="letters")
            record = store.read_json(f"cells/{cell}/cell.json")
            store.write_json(f"cells/{cell}/cell.json", record | {"code": {"version": "9.8.7", "commit": "abc123"}})
            runs[cell] = f"key of {model}"
    describe(tmp_path, "digits")
    describe(tmp_path, "local-dir:/trained", method="tecoa", digest="d1g3st", shots=5)
    store.write_json("runs.json", {"tracker": "http://server study", "runs": {}, "logged": [], "cells": runs})
    store.write_json("mlflow_ids.json", {"key of digits": "1" * 32, "key of local-dir:/trained": "2" * 32})
    return read_results([str(tmp_path)], logged=logged_runs)


def test_a_row_for_each_model_and_each_data_set(results):
    models, data = build(results).parts[-1].grids
    found = {
        name: dict(zip(models.header[1:], (cell.text for cell in cells), strict=True)) for name, cells in models.rows
    }
    assert found["trained"] == {
        "weights": fingerprint("local-dir:/trained"),
        "specification": "local-dir:/trained",
        "method": "tecoa",
        "settings": "d1g3st",
        "trained on": "digits",
        "evaluated by rayclip": "9.8.7 abc123",
        "MLflow runs": "2" * 32,
    }
    assert found["digits"]["method"] == "" and found["digits"]["MLflow runs"] == "1" * 32
    assert [(name, [cell.text for cell in cells]) for name, cells in data.rows] == [
        ("letters", [fingerprint("letters"), "letters"])
    ]
    assert "MLflow: http://server study" in models.notes


def test_without_a_tracker_no_run_is_named(results, tmp_path):
    assert {cell.run for cell in read_results([str(tmp_path)]).cells} == {""}


def test_every_line_of_the_csv_names_them(results):
    rows = list(csv.DictReader(io.StringIO(document_csv(build(results)))))
    assert {(row["model"], row["run"]) for row in rows} == {("digits", "1" * 32), ("trained", "2" * 32)}
    assert {row["code"] for row in rows} == {"9.8.7 abc123"}
    assert {row["data"] for row in rows} == {fingerprint("letters")}
