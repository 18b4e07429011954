"""The table of methods at equal compute: differences of models of the same seed, and when they are significant."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from rayclip.reports.equal_compute import Spent, equal_compute_grid
from rayclip.reports.numbers import sections
from rayclip.reports.results import read_results
from reports.made import CLEAN, pgd, put

RIGHT = {  # of 100 samples, under the attack
    "base": range(10),
    "tecoa-0": range(50),
    "tecoa-1": range(54),
    "fare-0": range(20, 80),  # 30 only here, 20 only with TeCoA
    "fare-1": range(90),
}


@pytest.fixture
def folder(tmp_path):
    for model, right in RIGHT.items():
        put(tmp_path, model, CLEAN, np.ones(100, bool))
        put(tmp_path, model, pgd(), np.isin(np.arange(100), right))
    return tmp_path


def table(folder, *models, baseline="tecoa"):
    (section,) = sections(read_results([str(folder)]))
    spent = {
        name: Spent(
            method=name[:-2], seed=int(name[-1]), per_image=7.5, steps=55, total=8e4, seconds=60.0 + int(name[-1])
        )
        for name in models
    }
    grid = equal_compute_grid(section, spent, baseline)
    return {name: dict(zip(grid.header[1:], cells, strict=True)) for name, cells in grid.rows}, grid


def test_one_seed_has_intervals_and_mcnemars_p(folder):
    rows, grid = table(folder, "tecoa-0", "fare-0")
    assert list(rows)[-2:] == ["tecoa", "fare"] and "base" in rows
    found = rows["fare"]
    assert [found[c].text for c in ("passes", "steps", "compute", "seconds")] == ["7.5", "55", "80.0", "60"]
    assert found["pgd-10 1/255"].text == "60.0" and found["pgd-10 1/255"].note == "50–69"
    cell = found["pgd-10 1/255 − tecoa"]
    assert cell.text == "+10.0" and cell.note == f"p = {binomtest(20, 50).pvalue:.3f}" and cell.emphasis == ""
    assert not rows["tecoa"]["clean − tecoa"].text and not rows["base"]["steps"].text
    assert "95 % intervals" in grid.caption


def test_seeds_are_paired_and_must_agree(folder):
    """One seed's gain of 36 points is significant, the other's of 10 is not."""
    rows, grid = table(folder, "tecoa-0", "tecoa-1", "fare-0", "fare-1")
    cell = rows["fare"]["pgd-10 1/255 − tecoa"]
    assert cell.text == f"+23.0 ± {np.std([10, 36], ddof=1):.1f}" and cell.emphasis == ""
    assert rows["fare"]["pgd-10 1/255"].text == f"75.0 ± {np.std([60, 90], ddof=1):.1f}"
    assert rows["fare"]["seconds"].text == "60" and "2 seeds" in grid.caption


def test_an_average_over_data_sets_has_a_paired_p(folder):
    """McNemar's test without its correction, for two data sets with the same verdicts: z grows by the root of two."""
    for model in ("tecoa-0", "fare-0"):
        put(folder, model, CLEAN, np.ones(100, bool), dataset="other")
        put(folder, model, pgd(), np.isin(np.arange(100), RIGHT[model]), dataset="other")
    for model in ("base", "tecoa-1", "fare-1"):
        put(folder, model, CLEAN, np.ones(100, bool), dataset="other")
        put(folder, model, pgd(), np.zeros(100, bool), dataset="other")
    rows, _ = table(folder, "tecoa-0", "fare-0")
    cell = rows["fare"]["pgd-10 1/255 − tecoa"]
    z = 10 / np.sqrt((50 - 100 / 100) / 100) / 10 * np.sqrt(2)
    assert cell.text == "+10.0" and cell.note == f"p = {2 * norm.sf(z):.3f}" and cell.emphasis == "higher"
