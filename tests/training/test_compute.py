"""The compute of a training is counted with the real train loop, in forward passes of an image."""

import dataclasses

import pytest
import torch

from rayclip.data import open_data
from rayclip.methods import make_method
from rayclip.training import TrainConfig
from rayclip.training.compute import count_compute


def counted(method, **settings):
    made = make_method(method, eps=32 / 255, **settings)
    recipe = dataclasses.replace(made.small, batch_size=20)
    return count_compute(TrainConfig(model="digits", data="digits", method=made, recipe=recipe), torch.device("cpu"))


def test_each_pass_of_a_step_counts():
    """By hand: a forward pass is 1, a backward pass to the pixels 1, to the weights 2; the first layer needs less."""
    two, four = counted("tecoa", steps=2), counted("tecoa", steps=4)
    assert two.per_image == pytest.approx(2 * 2 + 3, rel=0.03) and four.per_image == pytest.approx(4 * 2 + 3, rel=0.03)
    assert counted("fare", steps=2).per_image == pytest.approx(two.per_image + 1, rel=0.01), "the original model's pass"
    assert counted("sim-clip", steps=2).per_image == pytest.approx(two.per_image + 1 + 3, rel=0.02), "and a clean one"
    assert two.steps_within(two.of(7) + 0.4 * two.step) == 7 and two.steps_within(0) == 1


def test_prepared_images_count_before_the_first_step():
    """AdvPT's images are made once; a step of it passes no image, only the class prompts."""
    advpt, images = counted("advpt", steps=2), len(open_data("digits", "train"))
    assert advpt.start == pytest.approx(images * (1 + 2 * 2 + 1), rel=0.03)
    assert advpt.per_image < 0.5 and advpt.steps_per_epoch == -(-images // 20)
