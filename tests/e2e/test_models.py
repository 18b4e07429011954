"""Interpolation and kept epochs, on a real Ray."""

import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from calling import run_here
from e2e.test_commands import NO_RAY
from rayclip.models import load_model
from rayclip.models.checkpoint import read_lineage, save_checkpoint

pytestmark = pytest.mark.e2e
SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"


def changed_digits():
    """The bundled model with noise on its weights."""
    clip = load_model("digits")
    with torch.no_grad():
        for p in clip.model.parameters():
            p.add_(torch.randn(p.shape) * 0.1 * p.std(correction=0))
    return clip


@pytest.mark.slow
def test_the_curve_begins_and_ends_with_the_models_themselves(tmp_path):
    settings = ["--data", "digits", "--eps", "32/255", "--limit", 60]
    save_checkpoint(changed_digits(), tmp_path / "ft", {})
    curve = ["interpolate", "--from", "digits", "--to", "local-dir:ft", *settings, "--a", "0,0.5,1"]
    run_here(tmp_path, *curve, "--out", "curve", "--json", "curve.json")
    rows = json.loads((tmp_path / "curve.json").read_text())
    assert [(r["model"][-3:], r["attack"]) for r in rows] == [
        (a, attack) for a in ("t@0", "0.5", "t@1") for attack in ("clean", "pgd-10_eps32")
    ]
    # The ends are evaluated already, under their own names: Ray is not even asked for.
    ends = ["eval", "--model", "digits", "--model", "local-dir:ft", *settings, "--out", "curve"]
    run_here(tmp_path, *ends, "--json", "ends.json", "--cluster", "--no-tracking", **NO_RAY)
    own = json.loads((tmp_path / "ends.json").read_text())
    assert [(r["cell"], r["top1"]) for r in own] == [(r["cell"], r["top1"]) for r in rows[:2] + rows[4:]]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rayclip-interpolate").experiment_id
    runs = {r.info.run_name: r for r in client.search_runs([experiment])}
    assert {"a = 0", "a = 0.5", "a = 1", "eval a = 0.5", "interpolate digits to local-dir:ft"} <= set(runs)
    assert set(runs["eval a = 0.5"].data.metrics) == {"clean/digits", "robust/pgd-10_eps32/digits"}


@pytest.mark.slow
def test_kept_epochs_are_the_run_s_own_past(tmp_path):
    """What is kept after an epoch is one model of the run, not of a shorter one with its own schedule."""
    settings = ["--methods", "tecoa", "--shots", 2, "--epochs", 3, "--every", 1, "--limit", 20]
    done = run_here(tmp_path, *settings, "--out", "s", program=SWEEPS / "mmcoa_iterations.py")
    assert all(f"tecoa epoch {n}" in done.stdout for n in (1, 2, 3))
    place = tmp_path / "s" / "models" / "tecoa"
    folders = [place / "epoch-1", place / "epoch-2", place]
    assert [read_lineage(f)["step"] for f in folders] == [1, 2, 3]
    assert {read_lineage(f)["digest"] for f in folders} == {read_lineage(place)["digest"]}
    assert len({load_model(f"local-dir:{f}").fingerprint() for f in folders}) == 3
