"""The referee's page of results: kept beside them, and logged."""

import csv
import json

from mlflow import MlflowClient

from rayclip import api
from rayclip.attacks import parse_attacks
from rayclip.defenses import parse_aims, parse_defenses
from rayclip.evaluation import Protocol


def test_the_table_its_figure_and_its_costs_are_kept_and_logged(tmp_path):
    part, out = tmp_path / "out" / "seed-0", tmp_path / "out"
    evaluation = api.Evaluation(
        data=["digits"],
        attacks=parse_attacks("clean,pgd", {"steps": 1}),
        protocol=Protocol(eps=32 / 255),
        limit=12,
        defenses=parse_defenses("none,rn"),
        aims=parse_aims("ignore,bpda", 1),
    )
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = api.Tracking.choose(uri, "referee")
    api.evaluate_models(["digits"], evaluation, api.Where(out=str(part), cluster=None, quiet=True))
    where = api.Where(out=str(out), quiet=True, tracking=tracking)
    (grid,) = api.referee("referee of a test", {"digits": "untouched"}, {str(part): [evaluation]}, where)
    assert [name for name, _ in grid.rows] == ["digits", "digits + rn"]
    assert {"forwards", "MiB", "claimed", "left"} <= set(grid.header)
    page, lines = (out / "referee.md").read_text(), list(csv.DictReader((out / "referee.csv").open()))
    assert "![" in page and "referee.svg" in page and len(lines) == 2
    assert all((out / f"referee.{form}").stat().st_size > 1000 for form in ("svg", "pdf", "png"))
    costs = [json.loads(file.read_text()) for file in part.rglob("overhead.json")]
    assert sorted(round(cost["forwards"]) for cost in costs) == [1, 1]
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("referee").experiment_id])
    assert (run.info.run_name, run.info.status) == ("referee of a test", "FINISHED")
    assert {"referee.md", "referee.csv", "referee.svg"} <= {
        file.path for file in client.list_artifacts(run.info.run_id)
    }
