"""Every attack on images breaks the bundled model at 32/255, on its own data."""

import pytest
import torch

from attacks.test_gradient import build
from rayclip.attacks import ATTACKS, Samples
from rayclip.data import batch_pixels, open_data
from rayclip.models import ZeroShot, load_model
from rayclip.rng import sample_keys

N = 24
OTHERS = ("sep", "co-attack", "sga", "transfer", "uap")  # which need texts, another model, or a file
ON_IMAGES = [name for name, kind in ATTACKS.items() if kind.needs_eps and name not in OTHERS]


@pytest.fixture(scope="module")
def digits():
    data = open_data("digits", "test")
    victim = ZeroShot(load_model("digits"), data.class_names)
    images = batch_pixels(data, range(N), "native", victim.clip.image_size).float() / 255
    labels = torch.from_numpy(data.labels[:N])
    with torch.no_grad():
        todo = victim(images).argmax(1) == labels
    assert todo.sum() > 0.8 * N
    return victim, Samples(images, labels, sample_keys(range(N), "t"), todo)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ON_IMAGES)
def test_it_breaks_the_bundled_model(digits, name, norm):
    victim, samples = digits
    attack = build({"name": name, "norm": norm, "step": 8 / 255 if norm == "linf" else 0.5, "queries": 200})
    result = attack.run(victim, samples, eps=32 / 255 if attack.ball == "linf" else 1.5)
    with torch.no_grad():
        right = victim(result.images_BCHW).argmax(1) == samples.labels_B
    assert right.sum() <= 0.7 * samples.todo_B.sum()
    assert not (right & ~samples.todo_B).any()
