"""The feature attack against its formula, written out."""

import pytest
import torch

import naive
from attacks.test_gradient import CLASSES, balanced, batch
from rayclip.attacks import Samples, make_attack
from rayclip.attacks.feature import feature_distance
from rayclip.models import ZeroShot


def plain_distance(clean, other, objective):
    if objective == "squared":
        return sum(float(o - c) ** 2 for c, o in zip(clean, other, strict=True))
    return naive.kl(clean, other)


@pytest.mark.parametrize("objective", ["squared", "kl"])
def test_distances_are_the_formulas(objective):
    clean, other = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = feature_distance(clean, other, objective)
    for c, o, d in zip(clean, other, ours, strict=True):
        assert abs(plain_distance(c, o, objective) - float(d)) < 1e-12
    assert (feature_distance(clean, clean, objective).abs() < 1e-12).all()


@pytest.mark.parametrize("objective", ["squared", "kl"])
def test_one_step_follows_the_gradient(objective):
    """In float64, against a gradient by differences, on a few pixels of images that are not the first of the batch."""
    victim = balanced(torch.float64)
    images, labels, todo, keys = batch(victim, n=6)
    todo[:2] = False
    eps, step = 0.02, 0.003
    attack = make_attack("feature", objective=objective, steps=1, step=step, stop="final")
    result = attack.run(victim, Samples(images, labels, keys, todo), eps=eps)
    assert result.queries_B.tolist() == [0, 0, 2, 2, 2, 2]

    def encode(pixels):
        return victim.clip.encode_image(pixels[None], normalize=False)[0].detach()

    for i in (2, 5):
        start = (images[i] + (2 * naive.uniforms(int(keys[i]), (3, 8, 8)) - 1) * eps).clamp(0, 1)
        clean = encode(images[i])
        for place in ((0, 0, 0), (1, 3, 4), (2, 7, 5)):
            d = torch.zeros_like(start)
            d[place] = 1e-5
            slope = plain_distance(clean, encode(start + d), objective) - plain_distance(
                clean, encode(start - d), objective
            )
            assert abs(slope) > 1e-12
            before = float(start[place] - images[i][place])
            after = min(max(before + (step if slope > 0 else -step), -eps), eps)
            expected = min(max(float(images[i][place]) + after, 0), 1)
            assert abs(float(result.images_BCHW[i][place]) - expected) < 1e-12


def test_it_needs_no_labels():
    """The images depend on the labels through who is attacked and when one stops, and nothing else."""
    victim = ZeroShot(balanced().clip, CLASSES)
    images, labels, todo, keys = batch(victim)
    attack = make_attack("feature", stop="final")
    one, other = (
        attack.run(victim, Samples(images, y, keys, todo), eps=8 / 255).images_BCHW for y in (labels, labels.flip(0))
    )
    assert torch.equal(one, other)
