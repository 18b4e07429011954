"""What a study needs besides measured time: its operations are those that torch counts while it really runs."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

import rayclip
from rayclip.api.checks import Opened, plan_all
from rayclip.api.needs import Card, Needs, needs_of_tests
from rayclip.api.request import Evaluation
from rayclip.attacks import parse_attacks
from rayclip.evaluation import Protocol
from rayclip.models import load_model
from rayclip.training.loop import train
from rayclip.training.operations import count_operations
from training.test_loop import LocalHost, config


@pytest.mark.parametrize("name", ["ft-standard", "tecoa", "mmcoa", "advpt", "tecoa lora:rank=2"])
def test_a_training_takes_the_operations_that_are_planned(name, tmp_path):
    name, _, trains = name.partition(" ")
    chosen = config(name)
    if trains:
        chosen = replace(chosen, method=replace(chosen.method, trains=trains))
    images = 30
    steps = chosen.recipe.epochs * -(-images // chosen.recipe.batch_size)
    counted = count_operations(chosen.method, load_model("digits"))
    planned = counted.total(images, 10, steps, chosen.recipe.batch_size)
    with FlopCounterMode(display=False) as counted:
        train(replace(chosen, save_every_epochs=chosen.recipe.epochs), LocalHost(tmp_path))
    assert planned == pytest.approx(counted.get_total_flops(), rel=0.25)


def test_tests_take_the_operations_that_are_planned():
    attacks, limit = "clean,pgd:steps=10,stop=final,cw:steps=5,stop=final", 64
    wanted = Evaluation(
        data=["digits"], attacks=parse_attacks(attacks, {}), protocol=Protocol(eps=8 / 255), limit=limit
    )
    cells, positions = plan_all(["digits"], [wanted], Opened(quiet=True))
    clip = load_model("digits")
    needs = needs_of_tests(cells, {cell.id: len(positions[cell.data]) for cell in cells}, clip, 32)
    with FlopCounterMode(display=False) as counted:
        rayclip.evaluate("digits", "digits", attacks=attacks, eps="8/255", limit=limit)
    assert needs.testing == pytest.approx(counted.get_total_flops(), rel=0.25)
    assert needs.files == 3 * 3 + 2 * 3, "a record and two files of verdicts for each cell, and three of examples"


def test_needs_add_up_and_become_hours():
    both = Needs(training=1e18, disk=1.0, files=2, memory=3.0) + Needs(testing=2e18, disk=1.0, files=2, memory=2.0)
    assert both == Needs(training=1e18, testing=2e18, disk=2.0, files=4, memory=3.0)
    card = Card("card", bf16=100.0, fp32=50.0)
    once = card.hours(1e18, 0)
    assert card.hours(1e18, 2e18) == pytest.approx(once + card.hours(0, 2e18)) and once > 1e18 / 100e12 / 3600
