"""The referee's table: gains by hand, per sample and over seeds, and the figure that shows them."""

import numpy as np
import pytest

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.defenses import parse_defenses
from rayclip.evaluation import Protocol, Store, make_cells
from rayclip.evaluation.overhead import keep_overhead, read_overhead
from rayclip.models import load_model
from rayclip.reports import make_report
from rayclip.reports.build import referee_part
from rayclip.reports.figures.referee import referee
from rayclip.reports.numbers import sections
from rayclip.reports.referee import hear
from rayclip.reports.results import read_results
from reports.made import CLEAN, bits, pgd, put

LABEL, SETTINGS = pgd()
THROUGH = {aim: (f"{LABEL}_{aim}", {**SETTINGS, "aim": aim, "draws": 1}) for aim in ("bpda", "from-rn")}
TTC = "ttc:eps=8/255,step=2/255"


@pytest.fixture
def made(tmp_path):
    """Two seeds of a model with two defences, of which only one was attacked through; and the verdicts."""
    found = {}
    for seed in (0, 1):
        right = {"bare": bits(seed, p=0.2), "blind": bits(2 + seed, p=0.7), "bpda": bits(4 + seed, p=0.6)}
        right["from-rn"] = right["blind"] & bits(6 + seed, p=0.9)
        root = tmp_path / f"seed-{seed}"
        put(root, "m", CLEAN, bits(8, p=0.9), seed=seed)
        put(root, "m", pgd(), right["bare"], seed=seed)
        put(root, "m", CLEAN, bits(9, p=0.8), seed=seed, defense=TTC)
        put(root, "m", (LABEL, {**SETTINGS, "aim": "ignore"}), right["blind"], seed=seed, defense=TTC)
        put(root, "m", (LABEL, {**SETTINGS, "aim": "ignore"}), right["blind"], seed=seed, defense="tte")
        for aim, attack in THROUGH.items():  # of the first 40 only
            put(root, "m", attack, right[aim][:40], seed=seed, defense=TTC)
        found[seed] = right
    return tmp_path, found


def test_gains_are_paired_by_sample_and_over_the_seeds(made):
    root, right = made
    (hearing,) = hear(sections(read_results([str(root)])))
    bare, ttc = hearing.rulings
    assert (bare.subject.defense, ttc.subject.defense, hearing.seeds) == ("none", TTC, 2)
    blind, less = (np.mean([right[s][name] for s in (0, 1)], axis=0) for name in ("blind", "bare"))
    assert ttc.claimed.top1 == pytest.approx(100 * (blind - less).mean())
    assert (ttc.claimed.n, ttc.left.n) == (50, 40)
    worst = [(right[s]["blind"] & right[s]["bpda"] & right[s]["from-rn"])[:40] for s in (0, 1)]
    gains = [100 * (w.mean() - right[s]["bare"][:40].mean()) for s, w in enumerate(worst)]
    assert ttc.left.top1 == pytest.approx(np.mean(gains)) and ttc.left.low < ttc.left.top1 < ttc.left.high
    assert ttc.spread >= np.std(gains, ddof=1) - 1e-9 and bare.claimed is None
    # Newcombe's interval, written out for samples of 0 or 1/2 or 1
    p, q, r = blind.mean(), less.mean(), np.corrcoef(blind, less)[0, 1]

    def wilson(x, n=50, z=1.959964):
        middle, half = x + z * z / (2 * n), z * np.sqrt(x * (1 - x) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    (l1, u1), (l2, u2) = wilson(p), wilson(q)
    down = np.sqrt((p - l1) ** 2 - 2 * r * (p - l1) * (u2 - q) + (u2 - q) ** 2)
    up = np.sqrt((u1 - p) ** 2 - 2 * r * (u1 - p) * (q - l2) + (q - l2) ** 2)
    assert (ttc.claimed.low, ttc.claimed.high) == pytest.approx((100 * (p - q - down), 100 * (p - q + up)), abs=1e-3)


def test_a_report_has_table_figure_and_lines(made):
    root, _ = made
    found = read_results([str(root)])
    part = referee_part(sections(found), referee)
    (grid,), (figure,) = part.grids, part.figures
    assert [name for name, _ in grid.rows] == ["m", "m + ttc"] and "n = 50 samples, 40 under all" in grid.caption
    assert "over 2 seeds" in grid.caption and "ms" not in grid.header
    canvas = figure.draw(2)
    (ax,) = canvas.axes
    assert [t.get_text() for t in ax.texts] == ["ttc"] and ax.get_xlim() == ax.get_ylim()
    text = make_report(found, "csv", beside=root)
    assert sum(",referee," in line for line in text.splitlines()) == 2
    assert "What defences claim" in make_report(found, "md", beside=root)


def test_costs_are_those_of_the_classifier_that_judges(tmp_path):
    """In forwards of the model: ten views are ten, a step of a purifier a forward and a backward pass."""
    store, chains = Store(str(tmp_path)), parse_defenses("none,tte,rn,et3")
    cells = make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", open_data("digits", "test"))],
        parse_attacks("clean", {}),
        Protocol(),
        chains,
    )
    for cell in cells:
        keep_overhead(cell, store)
    costs = [read_overhead(cell.id, store) for cell in cells]
    none, tte, rn, et3 = (cost.forwards for cost in costs)
    assert (none, rn) == pytest.approx((1, 1), rel=0.01) and tte == pytest.approx(10, rel=0.02)
    assert 2 * 1.8 < et3 - 1 < 2 * 3.2
    assert costs[1].mebibytes > 5 * costs[0].mebibytes > 0 and all(cost.milliseconds > 0 for cost in costs)
