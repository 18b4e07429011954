"""`rayclip sweep` on a real Ray: a grid that is killed and goes on, and a random search after its plan."""

import json
import subprocess

import pytest

from calling import run_here
from e2e.test_commands import NO_RAY, RAYCLIP, kill_tree, run
from servers import wait_for

pytestmark = pytest.mark.e2e
TINY = ["--model", "digits", "--data", "digits", "--eps", "32/255", "--shots", 1, "--epochs", 1, "--limit", 20]
WHERE = ["--no-tracking", "--out", "s"]


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_reports_seeds_together(tmp_path):
    grid = ["sweep", "--method", "ft-standard,tecoa:steps=1", "--lr", "1e-4,1e-3", "--seeds", 2, *TINY, *WHERE]
    begun = subprocess.Popen([*map(str, [*RAYCLIP, *grid])], cwd=tmp_path, start_new_session=True)
    wait_for(lambda: list((tmp_path / "s").glob("models/*/rayclip.json")), seconds=120)
    kill_tree(begun)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "s").glob("models/*/rayclip.json")}
    assert 0 < len(before) < 8
    done = run(tmp_path, *grid)
    assert len(list((tmp_path / "s").glob("models/*/rayclip.json"))) == 8
    assert before == {file: file.stat().st_mtime_ns for file in before}, "what was finished is not trained again"
    assert all(name in done.stdout for name in ("ft-standard, lr 0.0001", "tecoa, lr 0.001", "untouched digits"))
    assert "over 2 seeds" in done.stdout and "seed 1" not in done.stdout and done.stdout.count("±") == 9
    assert len(json.loads((tmp_path / "s" / "results.json").read_text())) == 2 * 9
    kept = (tmp_path / "s" / "table.md").read_text()
    assert kept.count("±") == 9 and "seed 1" in kept, "means, and the numbers of each seed below them"
    assert done.stdout.endswith(run_here(tmp_path, *grid, "--cluster", **NO_RAY).stdout), "and nothing is left to do"


@pytest.mark.slow
def test_a_random_search_after_its_plan(tmp_path):
    search = ["sweep", "--method", "tecoa:steps=1", "--lr", "1e-4..1e-2", "--search", "random", "--samples", 3]
    planned = run_here(tmp_path, *search, *TINY, *WHERE, "--plan").stdout
    assert "3 trials, 0 of them finished; 4 models to test, 2 cells each" in planned and "at most" in planned
    assert list(tmp_path.iterdir()) == []
    done = run_here(tmp_path, *search, *TINY, *WHERE).stdout
    scores = json.loads((tmp_path / "s" / "search.json").read_text())
    assert len(scores) == 3 and all(score["ended"] and score["epoch"] == 1 for score in scores.values())
    assert done.count("tecoa, lr ") > 3 and "untouched digits" in done and "ASHA" not in done
    assert "best by worst case: tecoa, lr " in done
