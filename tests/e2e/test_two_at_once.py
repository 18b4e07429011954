"""Commands that work in one folder at the same time, as from several hosts: the outcome is that of one alone."""

import json
import subprocess
from collections import Counter

import pytest
from mlflow import MlflowClient

from calling import run_here
from e2e.test_commands import RAYCLIP, verdicts
from rayclip.models.checkpoint import read_lineage
from rayclip.store import Store
from rayclip.tracking.deliverer import deliver_results
from rayclip.tracking.journal import Journal

pytestmark = pytest.mark.e2e


def at_once(cwd, *commands):
    """Run commands together; return what they printed."""
    begun = [subprocess.Popen([*map(str, [*RAYCLIP, *c])], cwd=cwd, stdout=-1, stderr=-1, text=True) for c in commands]
    ended = [process.communicate(timeout=600) for process in begun]
    for process, (_, err) in zip(begun, ended, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [out for out, _ in ended]


def logged(store):
    """Runs with their metrics, each with all values that it ever had."""
    client, found = MlflowClient(store), []
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            assert run.info.status == "FINISHED", run.info.run_name
            names = [name for name in run.data.metrics if not name.startswith("train/") or name == "train/loss"]
            values = {n: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)] for n in names}
            found.append((run.info.run_name, values))
    return sorted(found, key=str)


def steps(place):
    """How often each step of each training was reported."""
    events = Journal(Store(str(place))).read({})
    told = [(e.run, step) for e in events for name, _, step in e.content.get("values", ()) if name == "train/loss"]
    return list(Counter(told).values())


def test_two_equal_evaluations_and_a_leaderboard(tmp_path, saved_clip):
    attack = ["--data", "digits", "--attacks", "clean,fgsm,pgd:steps=5", "--eps", "32/255", "--limit", 96]
    alone, both = (f"sqlite:///{tmp_path}/{name}.db" for name in ("alone", "both"))

    def evaluate(out, store, json_file):
        models = ["--model", "digits", "--model", saved_clip, "--shard-size", 16, "--tracking-uri", store]
        return ["eval", "--local", *models, *attack, "--experiment", "x", "--out", out, "--json", json_file]

    def board(out):
        return ["leaderboard", "reference", f"{out}/results", "--out", out, "--add", saved_clip]

    run_here(tmp_path, "eval", "--local", "--model", "digits", *attack, "--no-tracking", "--out", "reference")
    run_here(tmp_path, *evaluate("alone/results", alone, "rows.json"))
    run_here(tmp_path, *board("alone"))
    begun = evaluate("both/results", both, "rows1.json"), evaluate("both/results", both, "rows2.json")
    (tmp_path / "both" / "results" / "cells").mkdir(parents=True)
    at_once(tmp_path, *begun, board("both"))

    assert verdicts(tmp_path / "both" / "results") == verdicts(tmp_path / "alone" / "results") != {}, "each once"
    expected = json.loads((tmp_path / "rows.json").read_text())
    assert [json.loads((tmp_path / f"rows{i}.json").read_text()) for i in (1, 2)] == [expected, expected]
    results = json.loads((tmp_path / "both" / "results" / "results.json").read_text())
    models = {row["model"] for row in results}  # of whoever ended last
    mine, theirs = ({(row["model"], row["attack"], row["n"], row["top1"]) for row in r} for r in (results, expected))
    assert mine == {row for row in theirs if row[0] in models} != set()
    for name, store in (("alone", alone), ("both", both)):
        deliver_results(str(tmp_path / name / "results"), store, "x")  # the leaderboard has no tracker
    assert logged(both) == logged(alone)
    boards = [json.loads((tmp_path / name / "leaderboard.json").read_text()) for name in ("alone", "both")]
    assert "".join(map(str, boards)).count(saved_clip) and not list(tmp_path.rglob(".lease-*"))


@pytest.mark.slow
def test_two_equal_sweeps(tmp_path):
    grid = ["sweep", "--method", "tecoa:steps=1", "--lr", "1e-4,1e-3", "--model", "digits", "--data", "digits"]
    grid += ["--eps", "32/255", "--shots", 1, "--epochs", 2, "--limit", 20, "--experiment", "x", "--quiet"]
    stores = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("alone", "both")}
    alone, both = ([*grid, "--out", name, "--tracking-uri", store] for name, store in stores.items())
    (expected,) = at_once(tmp_path, alone)
    tables = at_once(tmp_path, both, both)
    assert [table.replace("both", "alone") for table in tables] == [expected, expected]
    places = {file.parent.name: file.parent for file in (tmp_path / "alone").glob("models/*/rayclip.json")}
    assert len(places) == 2
    for name, place in places.items():
        mine, theirs = (read_lineage(each) | {"seconds": 0} for each in (tmp_path / "both" / "models" / name, place))
        assert mine == theirs
    assert steps(tmp_path / "both") == steps(tmp_path / "alone") == [1] * len(steps(tmp_path / "alone"))
    assert str(logged(stores["both"])).replace("both", "alone") == str(logged(stores["alone"]))
    assert not (tmp_path / "both" / "unfinished").exists() and not list(tmp_path.rglob(".lease-*"))
