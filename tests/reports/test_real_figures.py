"""Every figure, from a real run: models fine-tuned for two epochs, attacked within two budgets, on `digits` and on
pocket-clip with CIFAR-10. No Ray: the evaluator that the actors run."""

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.evaluation import Evaluator, Protocol, make_cells, missing_shards
from rayclip.methods import SMALL_MODEL, make_method
from rayclip.models import load_model
from rayclip.models.checkpoint import model_record
from rayclip.reports.figures import section_figures
from rayclip.reports.figures.style import style
from rayclip.reports.numbers import sections
from rayclip.reports.results import LINEAGE, read_results
from rayclip.store import Store
from rayclip.training import TrainConfig, train
from training.test_loop import LocalHost

EVERY_KIND = {"shots", "eps", "steps", "tradeoff", "bars", "tsne", "images", "attention"}
SAMPLES = 12


def fine_tuned(root: Path, base: str, data: str, shots: int, eps: float) -> dict[str, str]:
    """A label by model: the checkpoints of two epochs of TeCoA."""
    method = make_method("tecoa", eps=eps, steps=1, step=eps)
    config = TrainConfig(
        model=base,
        data=data,
        method=method,
        recipe=replace(SMALL_MODEL, epochs=2),
        shots=shots,
        model_fingerprint=load_model(base).fingerprint(),
    )
    host = LocalHost(root / f"shots-{shots}")
    host.folder.mkdir()
    train(config, host)
    return {f"local-dir:{path}": f"tecoa {shots}-shot epoch {i}" for i, path in enumerate(host.checkpoints, 1)}


def judge(store: Store, models: Mapping[str, str], data: str, budgets: tuple[float, float]) -> None:
    """Write what an evaluation writes."""
    attacks = "clean,pgd:steps=2,bert,sep:steps=2"
    for eps in budgets:
        cells = make_cells(
            [(spec, load_model(spec).fingerprint()) for spec in models],
            [(data, open_data(data, "test"))],
            parse_attacks(attacks, {"step": eps, "substitutes": "clip-table"}),
            Protocol(eps=eps),
        )
        evaluator = Evaluator(store, batch_size=SAMPLES)
        for cell in cells:
            store.write_json(f"cells/{cell.id}/cell.json", cell.record())
            store.write_json(f"{LINEAGE}/{cell.model_fingerprint}.json", model_record(cell.model, models[cell.model]))
            for shard in missing_shards(cell, np.arange(SAMPLES), store, SAMPLES):
                evaluator.run(shard)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["digits", pytest.param("pocket-clip", marks=pytest.mark.slow)])
def test_every_figure_is_drawn_from_a_real_run(name, tmp_path, request):
    base, training, test, budgets = "digits", "digits", "digits", (16 / 255, 32 / 255)
    if name == "pocket-clip":
        shared = request.getfixturevalue("shared")
        base, budgets = f"local-dir:{shared / 'models' / 'pocket-clip'}", (1 / 255, 2 / 255)
        training, test = (str(shared / "data" / f"cifar10-{part}.parquet") for part in ("train", "test"))
    models = {base: f"untouched {name}"}
    for shots in (1, 2):
        models |= fine_tuned(tmp_path, base, training, shots, budgets[-1])
    models[f"mix:{base}+{list(models)[-1]}@0.5"] = "half way"
    judge(Store(str(tmp_path / "results")), models, test, budgets)

    results = read_results([str(tmp_path / "results")])
    (section,) = sections(results)
    figures = {figure.name: figure for figure in section_figures(results, section)}
    assert {figure.partition("-")[0] for figure in figures} == EVERY_KIND
    assert all(f"{kind}-2" in figures for kind in ("images", "attention")), "of the untouched and the best"
    assert "Step 0" in figures["steps"].caption and "Lines join models" in figures["tradeoff"].caption
    for figure in figures.values():
        buffer = io.BytesIO()
        with style():
            figure.draw(3).savefig(buffer, dpi=50, bbox_inches="tight")
        inked = (np.asarray(Image.open(buffer).convert("L")) < 200).mean()
        assert 0.003 < inked < 0.9, (figure.name, inked)
