"""The referee's golden file: what defences gain on the digits, blind, and what is left under all attacks.

`tests/benchmarks/referee.py` says how it is renewed.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from rayclip.attacks import parse_attacks
from rayclip.data import open_data
from rayclip.defenses import chain_label, parse_aims, parse_defenses
from rayclip.evaluation import Evaluator, Protocol, Shard, Store, chosen_positions, make_cells
from rayclip.models import load_model

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/referee_digits.json").read_text())
IMAGES, SEEDS = 60, 3
ATTACKS = "clean,apgd-ce:iterations=10,apgd-t:iterations=5,targets=2"
RN = "rn:eps=64/255"
CLAIMS = ("ttc", "nac", "doc", "csr", "rtpt", "rn", "tte")
LITTLE = ("et3", "clipure-cos", "anti-adversary", "hedge")  # against examples that go on after they fool the model


def right(defense, attack):
    """Which images are right, (seeds, images)."""
    rows = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in GOLDEN[defense][attack]]
    return np.unpackbits(np.stack(rows), axis=1)[:, :IMAGES].astype(bool)


def accuracy(defense, *, blind):
    """Percent right under all attacks, or under those that ignore the defence; mean over the seeds."""
    names = [a for a in GOLDEN[defense] if not blind or a.endswith("_eps32") or a == "clean"]
    return 100 * np.logical_and.reduce([right(defense, a) for a in names]).mean()


def behind(name):
    (found,) = (d for d in GOLDEN if d.partition(":")[0] == name)
    return found


def test_the_file_holds_every_defence_and_seed():
    assert {d.partition(":")[0] for d in GOLDEN} == {"none", *CLAIMS, *LITTLE}
    assert all(len(seeds) == SEEDS for attacks in GOLDEN.values() for seeds in attacks.values())


@pytest.mark.parametrize("name", CLAIMS)
def test_a_defence_gains_what_it_claims_against_attacks_that_ignore_it_and_keeps_less(name):
    defense, bare = behind(name), accuracy("none", blind=True)
    claimed, left = (accuracy(defense, blind=blind) - bare for blind in (True, False))
    assert claimed > 2 and left < claimed


@pytest.mark.ci
def test_verdicts_are_those_of_the_golden_file(tmp_path):
    """Of the first images and seed."""
    few, chosen = 8, ["none", RN, *map(behind, ("ttc", "csr", "clipure-cos", "et3"))]
    cells = make_cells(
        [("digits", load_model("digits").fingerprint())],
        [("digits", open_data("digits", "test"))],
        parse_attacks(ATTACKS, {}),
        Protocol(eps=32 / 255),
        parse_defenses(",".join(chosen)),
        parse_aims(f"ignore,gate,{RN}", 2),
    )
    positions, evaluator = chosen_positions(445, IMAGES)[:few], Evaluator(Store(str(tmp_path)))
    wrong = 0
    for cell in cells:
        shard = Shard(cell=cell, positions=tuple(positions.tolist()))
        evaluator.run(shard)
        table = evaluator.store.read_tables([shard.name])
        found = [table[c].to_numpy() == table["label"].to_numpy() for c in ("clean_pred", "adv_pred")]
        differs = (found[0] & found[1]) != right(chain_label(cell.defense), cell.attack_label)[0, :few]
        wrong += differs.sum()
        assert differs.sum() <= 1, (chain_label(cell.defense), cell.attack_label)
    assert wrong <= 0.02 * few * len(cells), "what another CPU's rounding may turn"
