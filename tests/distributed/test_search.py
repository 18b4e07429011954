"""What a search measures and what it calls the front; the search itself is in e2e/test_search.py."""

import pickle

import numpy as np
import pytest
import torch

from rayclip.api.checks import Opened, plan_cells
from rayclip.api.request import Evaluation
from rayclip.attacks import parse_attacks
from rayclip.distributed.search import Scores, Validation
from rayclip.distributed.trials import Trial
from rayclip.evaluation import Evaluator, Protocol, Shard, Store, collect_rows
from rayclip.evaluation.front import Score, pareto_front
from rayclip.models.loading import BUNDLED
from rayclip.reports.rows import search_grid
from training.test_loop import config


@pytest.mark.parametrize("attacks", ["clean,pgd", "clean,pgd,fgsm"])
def test_it_measures_what_an_evaluation_measures(tmp_path, attacks):
    """Under two attacks a sample has to be right under both."""
    chosen = parse_attacks(attacks, {"steps": 2, "step": 8 / 255})
    protocol = Protocol(eps=16 / 255)
    validation = Validation(data="digits#validation", attacks=chosen, protocol=protocol, limit=40)
    found = pickle.loads(pickle.dumps(validation))(BUNDLED["digits"], torch.device("cpu"))
    evaluation = Evaluation(data=["digits#validation"], attacks=chosen, protocol=protocol, limit=40)
    cells, positions = plan_cells(["digits"], evaluation, Opened(quiet=True))
    store = Store(str(tmp_path))
    for cell in cells:
        Evaluator(store).run(Shard(cell=cell, positions=tuple(positions[cell.data])))
    rows = collect_rows(cells, positions, store)
    assert found["clean"] == rows[0].top1 and found["robust"] == rows[-1].top1 < rows[0].top1
    assert found["score"] == pytest.approx((found["clean"] + found["robust"]) / 2)


def test_what_has_ended_is_remembered_by_its_configuration(tmp_path):
    store = Store(str(tmp_path))
    a, b = (
        Trial(name=name, config=config("tecoa", seed=seed), out=str(tmp_path / name)) for seed, name in enumerate("ab")
    )
    scores = Scores([a, b], store)
    scores.keep("a", Score(epoch=1, clean=90.0, robust=40.0, ended=True))
    scores.keep("b", Score(epoch=2, clean=80.0, robust=50.0))
    again = Scores([Trial(name="renamed", config=a.config, out=a.out), b], store)
    assert again.ended == {"renamed"} and again["b"] == scores["b"]
    assert Scores([Trial(name="a", config=config("tecoa", seed=9), out=a.out)], store) == {}


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_beats(seed):
    points = [tuple(p) for p in np.random.default_rng(seed).integers(0, 6, (30, 2)).tolist()]
    for point, on_front in zip(points, pareto_front(points), strict=True):
        beaten = False
        for other in points:
            both = other[0] >= point[0] and other[1] >= point[1]
            better = other[0] > point[0] or other[1] > point[1]
            beaten = beaten or (both and better)
        assert on_front == (not beaten)


def test_the_table_lists_the_furthest_first_and_marks_the_front():
    scores = {
        "a": Score(epoch=1, clean=99, robust=50, ended=True),
        "b": Score(epoch=9, clean=90, robust=30),
        "c": Score(epoch=9, clean=80.04, robust=60),
    }
    table = search_grid(scores, ["c"], "pgd")
    assert [(name, *(cell.text for cell in cells)) for name, cells in table.rows] == [
        ("c", "9", "80.0", "60.0", "*"),
        ("b", "9", "90.0", "30.0", ""),
        ("a", "1", "99.0", "50.0", ""),
    ]
