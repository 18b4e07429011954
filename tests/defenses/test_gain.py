"""What TTC is for, on real images: accuracy under an attack that ignores it; and what attacks through it leave."""

import pytest

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.defenses import parse_aims, parse_defenses
from rayclip.evaluation import Evaluator, Protocol, Store, chosen_positions, collect_rows, make_cells, missing_shards
from rayclip.models import load_model

SETTINGS = "eps=32/255,step=8/255"


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory):
    """Percent of 40 digits by defence and attack."""
    store = Store(str(tmp_path_factory.mktemp("results")))
    cells = make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", open_data("digits", "test"))],
        parse_attacks("clean,pgd", {"steps": 10, "step": 8 / 255}),
        Protocol(eps=32 / 255),
        parse_defenses(f"none,ttc:{SETTINGS},ttc:{SETTINGS},tau=10"),
        parse_aims("ignore,bpda", draws=4),
    )
    positions = {"digits": chosen_positions(445, 40)}
    evaluator = Evaluator(store)
    for cell in cells:
        for shard in missing_shards(cell, positions["digits"], store, 60):
            evaluator.run(shard)
    rows = collect_rows(cells, positions, store)
    return {("none" if r.defense == "none" else f"tau {'tau=10' in r.defense}", r.attack): r.top1 for r in rows}


@pytest.mark.ci
def test_ttc_raises_accuracy_under_an_attack_that_ignores_it(accuracy):
    bare, usual, always = (accuracy[kind, "pgd-10_eps32"] for kind in ("none", "tau False", "tau True"))
    assert bare < 25 and usual > bare + 15 and always > usual
    assert accuracy["tau False", "clean"] > 80


@pytest.mark.ci
def test_what_attacks_through_it_leave_of_that(accuracy):
    """Per sample over the blind attack and the one through the defence: lower than the blind column alone."""
    bare = accuracy["none", "pgd-10_eps32"]
    for kind in ("tau False", "tau True"):
        assert bare < accuracy[kind, "worst"] < accuracy[kind, "pgd-10_eps32"]
