"""Trainings of equal compute: what a step takes, counted, and how many steps a budget pays."""

import dataclasses

import pytest

from rayclip.api.equal_compute import share_compute
from rayclip.api.request import Where
from rayclip.methods import make_method
from rayclip.training import TrainConfig
from rayclip.types import UserError


def share(*names, passes=None, steps=2, tmp_path):
    configs = []
    for name in ("tecoa", *names):
        method = make_method(name, eps=32 / 255, steps=steps)
        recipe = dataclasses.replace(method.small, batch_size=20, epochs=2)
        configs.append(TrainConfig(model="digits", data="digits", method=method, recipe=recipe))
    return share_compute(configs, configs[0], passes, Where(out=str(tmp_path), quiet=True, tracking=None))


def test_every_pass_of_a_step_counts(tmp_path):
    """By hand: a forward pass is 1, a backward pass to the pixels 1, to the weights 2; the first layer needs less."""
    tecoa, fare, sim_clip = share("fare", "sim-clip", tmp_path=tmp_path)
    assert tecoa.per_image == pytest.approx(2 * 2 + 3, rel=0.03)
    assert fare.per_image == pytest.approx(tecoa.per_image + 1, rel=0.01), "the original model's pass"
    assert sim_clip.per_image == pytest.approx(tecoa.per_image + 1 + 3, rel=0.02), "and a clean one"
    (more,) = share(steps=4, tmp_path=tmp_path)
    assert more.per_image == pytest.approx(4 * 2 + 3, rel=0.03)


def test_a_budget_pays_steps_of_each(tmp_path):
    tecoa, fare = share("fare", tmp_path=tmp_path)
    assert tecoa.epochs == 2 and tecoa.total == pytest.approx(fare.total, rel=0.02)
    assert fare.steps < tecoa.steps and fare.epochs == 2
    with pytest.raises(UserError, match="--passes"):
        share(passes=100, tmp_path=tmp_path)
