"""Mean and standard deviation over seeds, beside numpy's."""

import numpy as np
import pytest

from rayclip.reports.rows import result_grids
from rayclip.reports.seeds import seed_grids
from rayclip.types import Row


def row(model, top1, attack="clean", dataset="d", defense="none"):
    eps = None if attack == "clean" else 1 / 255
    protocol = {"attack": attack, "seed": 0}
    return Row(
        model=model, dataset=dataset, attack=attack, eps=eps, steps=None, n=100, top1=top1, ci_low=0, ci_high=100,
        protocol=protocol, cell=f"{model}{attack}{dataset}{defense}", defense=defense,
    )  # fmt: skip


def test_models_that_differ_in_the_seed_are_one_row():
    values = {
        ("a", "d"): 60.0,
        ("b", "d"): 63.0,
        ("c", "d"): 69.0,
        ("a", "e"): 40.0,
        ("b", "e"): 50.0,
        ("c", "e"): 45.0,
    }
    rows = [row("base", 50.0, dataset=d) for d in "de"] + [row(m, v, dataset=d) for (m, d), v in values.items()]
    labels = {"base": "untouched", "a": "tecoa, seed 0", "b": "tecoa, seed 1", "c": "tecoa, seed 2"}
    first, second, average = seed_grids(rows, labels, dict.fromkeys("abc", "tecoa"))
    for grid, expected in (
        (first, [60, 63, 69]),
        (second, [40, 50, 45]),
        (average, [50, 56.5, 57]),  # of each seed over the data sets first
    ):
        assert [name for name, _ in grid.rows] == ["untouched", "tecoa"]
        ((alone,), (cell,)) = (cells for _, cells in grid.rows)
        assert cell.text == f"{np.mean(expected):.1f} ± {np.std(expected, ddof=1):.1f}"
        assert cell.value == pytest.approx(np.mean(expected)) and alone.text == "50.0" and alone.note
        assert grid.notes[0].endswith("over 3 seeds")
        assert (cell.emphasis == "best") == (np.mean(expected) > 50)


def test_without_groups_the_tables_stay():
    rows = [row("a", 60.0), row("b", 63.0), row("b", 50.0, defense="ttc")]
    labels = {"a": "one", "b": "two"}
    assert seed_grids(rows, labels, {}) == result_grids(rows, labels)
    (grid,) = seed_grids([*rows, row("a", 40.0, defense="ttc")], labels, dict.fromkeys("ab", "both"))
    assert [(name, cells[0].text) for name, cells in grid.rows] == [
        ("both", "61.5 ± 2.1"),
        ("both + ttc", "45.0 ± 7.1"),
    ]
