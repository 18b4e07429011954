"""Commands say when it is decoding that bounds them: with images of 2 megapixels for a model that reads 8×8."""

import json

import pytest

from calling import run_here
from data.test_data import png, write
from rayclip.evaluation import waiting

pytestmark = pytest.mark.e2e
WHAT = ["--model", "digits", "--no-tracking", "--quiet", "--resolution", "model", "--eps", "8/255", "--data"]


@pytest.mark.slow
def test_commands_say_that_decoding_bounds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "_LOOKS_AT_S", 0.1)
    data = write(tmp_path / "large.parquet", [i % 3 for i in range(16)], [png((7, 7, 7), (1500, 1500))] * 16)
    what = [*WHAT, data, "--out", "r", "--attacks", "clean"]
    evaluated = run_here(tmp_path, "eval", *what, "--limit", 12, "--batch-size", 4)
    assert evaluated.stderr.count("raise --data-workers") == 1
    planned = run_here(tmp_path, "plan", *what, "--calibrate", 0, "--json", "plan.json")
    assert "decoding bounds 1 of 1 cells" in planned.stdout and "--data-workers" in planned.stdout
    (cell,) = json.loads((tmp_path / "plan.json").read_text())["cells"].values()
    assert cell["decoding"]["needed"] > cell["decoding"]["threads"] == 1
    trained = run_here(tmp_path, "train", *WHAT, data, "--out", "t", "--method", "ft-standard", "--epochs", 1)
    assert trained.stderr.count("training waits") == 1
    logged = (tmp_path / "t" / ".rayclip").rglob("*.json*")
    assert any("train/data_wait" in file.read_text() for file in logged)
