"""TTC's counterattack beside its authors' code."""

import pytest
import torch

from parity.inputs import cifar, equal_share, golden, places
from rayclip.attacks import make_attack
from rayclip.defenses.ttc import TTC
from rayclip.units import parse_budget

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def images(shared):
    return cifar(shared, 60, 1000)


@pytest.fixture(scope="module")
def inputs(images):
    pgd = make_attack("pgd", steps=10, stop="final")
    attacked = pgd.run(images.model, images.samples, eps=1 / 255).images_BCHW
    return {"clean": images.pixels, "pgd-10 at 1/255": attacked}


@pytest.mark.parametrize("run", golden("ttc")["runs"][::3], ids=lambda run: f"{run['of']}, tau {run['tau']}")
def test_the_same_counterattack(run, images, inputs):
    given = inputs[run["of"]]
    defense = TTC(
        eps=parse_budget(run["eps"]),
        step=parse_budget(run["step"]),
        steps=run["steps"],
        tau=run["tau"],
        beta=run["beta"],
    )
    made = defense.purify(images.model, given, images.keys)
    with torch.no_grad():
        assert images.model(made).argmax(1).tolist() == run["predictions"]
    assert images.stands(made) == run["stands"]
    assert equal_share(places(made - given), run["change"]) > 0.995
