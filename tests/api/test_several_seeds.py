"""One training with several seeds: mean and standard deviation, in the table and in the run above."""

import dataclasses
import json
import statistics

import pytest

from conftest import tiny_clip
from rayclip.api import Where, fine_tune_seeds
from rayclip.api.checks import Opened, check_training
from rayclip.cli.train import parse_seeds
from rayclip.distributed.trials import Trial
from rayclip.models.checkpoint import save_checkpoint
from rayclip.types import UserError
from training.test_loop import config

LOSS = {0: 1.25, 4: 1.5, 7: 2.0}
CLEAN = {0: 50.0, 4: 60.0, 7: 73.0}


def test_seeds_are_reported_as_mean_and_standard_deviation(tmp_path):
    """Finished trainings, so that none is started."""
    trial = Trial(name="mine", config=config("tecoa", precision="fp32"), out=str(tmp_path / "mine"))
    for seed, loss in LOSS.items():
        settings = check_training(dataclasses.replace(trial.config, seed=seed), 1, Opened())
        best = {"epoch": 1, "step": 2, "clean": CLEAN[seed]}
        validation = {"best": best, "history": [best, {**best, "clean": 40.0}]}
        lineage = {"digest": settings.digest(), "loss": loss, "validation": validation}
        save_checkpoint(tiny_clip(), tmp_path / "mine" / f"seed-{seed}", lineage)
    for _ in range(2):
        found = fine_tune_seeds(trial, [0, 4, 7], Where(out=trial.out, quiet=True))
    assert [each.config.seed for each in found.trials] == [0, 4, 7] and not found.errors
    assert found.trials[1].model == f"local-dir:{tmp_path / 'mine' / 'seed-4'}"
    assert found.grid.header[1:] == ("loss", "clean", "best clean")
    rows = {name: [cell.text for cell in cells] for name, cells in found.grid.rows}
    assert list(rows) == ["seed 0", "seed 4", "seed 7", "mean"]
    assert rows["seed 4"] == ["1.5000", "40.0", "60.0"]
    sd = statistics.stdev(CLEAN.values())
    assert rows["mean"] == [f"1.5833 ± {statistics.stdev(LOSS.values()):.4f}", "40.0 ± 0.0", f"61.0 ± {sd:.1f}"]
    lines = [json.loads(line) for file in tmp_path.glob("mine/journal/*.jsonl") for line in file.open()]
    (root,) = [line["run"] for line in lines if line["event"] == "start" and line["key"] == "mine"]
    assert {line["parent"] for line in lines if line["event"] == "start"} == {None, root}
    logged = [v for line in lines if line["event"] == "metrics" and line["run"] == root for v in line["values"]]
    assert len(logged) == 6, "once"
    values = {name: value for name, value, _ in logged}
    assert values["validate/best_clean_mean"] == pytest.approx(61) and values[
        "validate/best_clean_sd"
    ] == pytest.approx(sd)
    assert values["train/loss_mean"] == pytest.approx(19 / 12)


def test_seeds_are_read():
    assert parse_seeds(["0,2", "5"]) == [0, 2, 5] and parse_seeds(["0"]) == [0]
    for wrong in ("", "x", "-1", "1,1"):
        with pytest.raises(UserError):
            parse_seeds([wrong])
