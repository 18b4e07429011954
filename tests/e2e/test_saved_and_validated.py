"""What several workers save is what one saves; a validated training with several seeds, on a real Ray and MLflow."""

import json

import numpy as np
import pytest
from mlflow import MlflowClient

from e2e.test_commands import run
from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.evaluation import Evaluator, Protocol, Store, chosen_positions, make_cells, outstanding
from rayclip.evaluation.saving import write_set
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage

pytestmark = pytest.mark.e2e


def test_two_workers_save_what_one_does(tmp_path):
    command = ["eval", "--model", "digits", "--data", "digits", "--attacks", "clean,pgd", "--steps", 3]
    limits = ["--eps", "32/255", "--limit", 60, "--shard-size", 16, "--workers", 2, "--no-tracking"]
    done = run(tmp_path, *command, *limits, "--save-adversarial", "--out", "two", "--quiet")
    (place,) = (tmp_path / "two" / "adversarial").iterdir()
    manifest = json.loads((place / "manifest.json").read_text())["source"]
    assert f"{manifest['surviving']} of {manifest['successes']} successes survive" in " ".join(done.stderr.split())
    model = [("digits", load_model("digits").fingerprint())]
    attacks, data = parse_attacks("pgd", {"steps": 3}), open_data("digits", "test")
    (cell,) = make_cells(model, [("digits", data)], attacks, Protocol(eps=32 / 255))
    store = Store(str(tmp_path / "one"))
    positions = {"digits": chosen_positions(445, 60)}
    for shards in outstanding([cell], positions, store, 256, save_images=True):
        for shard in shards:
            Evaluator(store).run(shard)
    mine, theirs = open_data(write_set(cell, store).place, "test"), open_data(str(place), "test")
    assert mine.fingerprint == theirs.fingerprint and np.array_equal(mine.ids, theirs.ids)


def test_seeds_are_trained_validated_and_logged(tmp_path):
    command = ["train", "--method", "tecoa", "--model", "digits", "--data", "digits", "--eps", "32/255", "--steps", 2]
    small = ["--shots", 3, "--epochs", 2, "--seed", "0,1", "--validate", "every=1,size=20,attacks=pgd:steps=2"]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    done = run(tmp_path, *command, *small, "--out", "mine", "--tracking-uri", store, "--quiet")
    assert "mean" in done.stdout and " ± " in done.stdout
    told = [read_lineage(tmp_path / "mine" / f"seed-{seed}")["validation"] for seed in (0, 1)]
    best = [load_model(f"local-dir:{tmp_path}/mine/seed-{seed}/best").fingerprint() for seed in (0, 1)]
    assert best[0] != best[1] and [len(each["history"]) for each in told] == [2, 2]
    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    name = "validate/pgd-2_eps32"
    for seed, each in enumerate(told):
        curve = client.get_metric_history(runs[f"seed {seed}"].info.run_id, name)
        assert [(p.step, p.value) for p in curve] == [(e["step"], e["pgd-2_eps32"]) for e in each["history"]]
    last = [each["history"][-1]["pgd-2_eps32"] for each in told]
    assert runs["mine"].data.metrics[f"{name}_mean"] == pytest.approx(np.mean(last))
    assert runs["mine"].data.metrics[f"{name}_sd"] == pytest.approx(np.std(last, ddof=1))
