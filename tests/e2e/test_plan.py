"""`rayclip plan` before and after the evaluation that it plans, as a user does it."""

import json

import pyarrow.parquet as pq
import pytest

from calling import run_here

pytestmark = pytest.mark.e2e

WHAT = [
    "--model",
    "digits",
    "--data",
    "digits",
    "--limit",
    120,
    "--attacks",
    "clean,pgd:steps=20,sep",
    "--eps",
    "32/255",
]
WHERE = ["--out", "r", "--no-tracking", "--quiet"]


def test_planned_and_actual(tmp_path):
    said = run_here(tmp_path, "plan", *WHAT, *WHERE, "--workers", "1,2", "--price", 2, "--json", "before.json").stdout
    before = json.loads((tmp_path / "before.json").read_text())
    assert said.startswith("3 cells, 0 of them done; to do: ") and "360 samples" in said and "core hours" in said
    assert {cell["basis"] for cell in before["cells"].values()} == {"measured"}
    assert before["hardware"] == {"name": "cpu", "gpus": 0.0, "cores": 1}
    one, two = before["workers"]
    assert (one["workers"], two["workers"]) == (1, 2) and two["wall"] < one["wall"]
    assert two["cost"] == pytest.approx(2 * two["hours"]) and two["hours"] == pytest.approx(2 * two["wall"] / 3600)
    assert before["spent"] and not any(each["done"] for each in before["spent"])
    assert not list((tmp_path / "r").glob("cells/*/*.parquet")), "what was measured does not count"

    said = run_here(tmp_path, "eval", *WHAT, *WHERE).stdout
    assert "planned: " in said.splitlines()[-1] and "for 360 of 360 samples; last run" in said.splitlines()[-1]

    run_here(tmp_path, "plan", *WHAT, *WHERE, "--json", "after.json")
    after = json.loads((tmp_path / "after.json").read_text())
    assert (after["cells"], after["finished"]) == ({}, 3)
    noted = {}
    for file in (tmp_path / "r").glob("cells/*/*.parquet"):
        note = json.loads(pq.read_metadata(file).metadata[b"rayclip"])
        noted[file.parent.name] = noted.get(file.parent.name, 0.0) + note["seconds"]
    assert sum(each["actual"] for each in after["spent"]) == pytest.approx(sum(noted.values()))
    planned = sum(cell["seconds"] for cell in before["cells"].values())
    assert sum(each["planned"] for each in after["spent"]) == pytest.approx(planned)
    assert [each["done"] for each in after["spent"]] == [120, 120, 120]
    (ran,) = after["runs"]
    assert ran["busy"] == pytest.approx(sum(noted.values()), rel=1e-4) or ran["copies"] > 0
    said = run_here(tmp_path, "plan", *WHAT, *WHERE).stdout
    assert "planned and actual:" in said and "actual/planned" in said
    larger = [*WHAT[:-4], "--attacks", "clean,pgd:steps=40", "--eps", "32/255", *WHERE, "--calibrate", 0]
    more = run_here(tmp_path, "plan", *larger).stdout
    assert "2 cells, 1 of them done" in more and "same model" in more
