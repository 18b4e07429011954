"""A search on a real Ray: ASHA stops what lags behind, the front is attacked, a second start has nothing left to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
SWEEP = Path(__file__).resolve().parents[2] / "sweeps" / "joint_search.py"


def test_a_search_stops_trials_and_finds_a_front(tmp_path):
    command = [sys.executable, str(SWEEP), "--samples", "5", "--epochs", "4", "--shots", "1,2", "--limit", "50"]
    done = subprocess.run([*command, "--out", "s"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads((tmp_path / "s" / "search.json").read_text())
    assert len(scores) == 5 and all(s["ended"] for s in scores.values())
    assert {s["epoch"] for s in scores.values()} <= {1, 2, 3, 4}
    finished = [f for f in (tmp_path / "s" / "models").iterdir() if (f / "rayclip.json").exists()]
    assert 1 <= len(finished) == sum(s["epoch"] == 4 for s in scores.values()) < 5
    assert "untouched digits" in done.stdout and "*" in done.stdout
    assert not (tmp_path / "s" / "unfinished").exists()
    again = subprocess.run(
        [*command, "--out", "s", "--cluster"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"},  # nobody listens there
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout == done.stdout
