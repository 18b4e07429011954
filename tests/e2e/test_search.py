"""A search on a real Ray: ASHA stops what lags behind, the front is attacked, a second start has nothing left to do."""

import json
import sys
from pathlib import Path

import pytest

from calling import run_here
from e2e.test_commands import NO_RAY, run

pytestmark = pytest.mark.e2e
SWEEP = Path(__file__).resolve().parents[2] / "sweeps" / "joint_search.py"


def test_a_search_stops_trials_and_finds_a_front(tmp_path):
    options = ["--samples", "4", "--epochs", "3", "--shots", "1", "--limit", "20", "--out", "s"]
    done = run(tmp_path, *options, program=[sys.executable, SWEEP])
    scores = json.loads((tmp_path / "s" / "search.json").read_text())
    assert len(scores) == 4 and all(s["ended"] for s in scores.values())
    assert {s["epoch"] for s in scores.values()} <= {1, 2, 3}
    finished = [f for f in (tmp_path / "s" / "models").iterdir() if (f / "rayclip.json").exists()]
    assert 1 <= len(finished) == sum(s["epoch"] == 3 for s in scores.values()) < 4
    assert "untouched digits" in done.stdout and "*" in done.stdout
    assert not (tmp_path / "s" / "unfinished").exists()
    again = run_here(tmp_path, *options, "--cluster", program=SWEEP, **NO_RAY)
    assert again.stdout == done.stdout
