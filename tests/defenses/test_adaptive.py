"""What is left of a defence when the attack goes through it: nothing, of one that only hides gradients."""

from dataclasses import dataclass

import pytest
import torch

from rayclip import rng
from rayclip.attacks import Samples, make_attack
from rayclip.data import batch_pixels, open_data
from rayclip.defenses import DEFENSES, Aim, Defended, Defense, Purifier, fitting
from rayclip.models import ZeroShot, load_model
from rayclip.rng import sample_keys

EPS, N = 32 / 255, 60
SUITE = ("apgd-ce", {"iterations": 12}), ("apgd-t", {"iterations": 8, "targets": 3})


@dataclass(frozen=True, kw_only=True)
class Masking(Purifier):
    """Hides gradients in three ways: noise, rounding to 32 grey levels, and logits in steps."""

    name = "masking"
    random = True

    def purify(self, victim, pixels_BCHW, keys_B):
        noise = rng.uniform(keys_B, tuple(pixels_BCHW.shape[1:]), dtype=pixels_BCHW.dtype) - 0.5
        return ((pixels_BCHW + 0.02 * noise) * 31).round().div(31).clamp(0, 1)

    def logits(self, logits_BK):
        return (logits_BK * 4).round() / 4


@dataclass(frozen=True, kw_only=True)
class Identity(Defense):
    """Does nothing, and says that it is not smooth."""

    name = "identity"


@pytest.fixture(scope="module")
def digits():
    data, positions = open_data("digits", "test"), [i * 445 // N for i in range(N)]
    victim = ZeroShot(load_model("digits"), data.class_names)
    images, labels = batch_pixels(data, positions, "native", 8).float() / 255, torch.from_numpy(data.labels[positions])
    return victim, images, labels, sample_keys(data.ids[positions].tolist(), 0, "adaptive")


def standing(digits, chain, aim=None, suite=SUITE, rows=N):
    """Which images are right before and after each attack of the suite."""
    victim, images, labels, keys = (digits[0], *(x[:rows] for x in digits[1:]))
    judge = Defended(victim, chain, rng.subkeys(keys, "defense"))
    target = victim if aim is None else Defended(victim, chain, rng.subkeys(keys, "defense"), aim)
    with torch.no_grad():
        held = right = judge(images).argmax(1) == labels
    for name, settings in suite:
        attack = make_attack(name, **settings).to_last_step()
        made = attack.run(target, Samples(images, labels, keys, right), eps=EPS)
        with torch.no_grad():
            held = held & (made.logits(judge, labels).argmax(1) == labels)
    return held


def test_a_defence_that_masks_gradients_is_left_what_the_model_has(digits):
    bare = 100 * standing(digits, ()).float().mean()
    blind, straight, through = (
        100 * standing(digits, (Masking(),), aim).float().mean()
        for aim in (None, Aim(gradient="straight"), Aim(gradient="bpda", draws=4))
    )
    assert straight > bare + 40, "its gradients are no use"
    assert min(through, blind) <= bare + 2, "with the attack that does not see it, as the worst case has both"
    assert through <= bare + 2


def test_blind_and_adaptive_agree_on_a_defence_that_does_nothing(digits):
    found = [
        standing(digits, (Identity(),), aim, rows=20) for aim in (None, Aim(gradient="bpda"), Aim(gradient="gate"))
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


QUICK = {"rtpt": {"count": 4}, "hedge": {"steps": 2}, "doc": {"tau": 0.02}, "clipure-cos": {"length": 0.1}}


@pytest.mark.ci
@pytest.mark.parametrize("name", list(DEFENSES))
def test_the_suite_goes_through_every_defence(digits, name):
    """It breaks images that the blind attack of one step leaves, at any rate no fewer than none."""
    chain = (DEFENSES[name](**QUICK.get(name, {})),)
    aim = fitting(Aim(gradient="gate", draws=2), chain)
    suite = (("apgd-ce", {"iterations": 3}), ("apgd-t", {"iterations": 1, "targets": 1}))
    clean = standing(digits, chain, aim, (), rows=16)
    held = standing(digits, chain, aim, suite, rows=16)
    assert clean.sum() > 6 and held.sum() < clean.sum() and not (held & ~clean).any()
