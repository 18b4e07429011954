"""Losses, gradients and training attacks that the public code gives on a small real CLIP, as golden values.

How they were made: the repositories' own functions (SAFT's `helper.criterion` and `attention_map_text`, with patches
normalised one by one; PMG-AFT's `multiGPU_CLIP` and `attack_pgd`; RobustVLM's `pgd` and `compute_loss`) on pocket-clip,
16 test images of CIFAR-10 from the 301st on, and a student that is pocket-clip with noise in its image tower, from the
same start of the attack. Their pixels equalled ours.
"""

import copy

import pytest
import torch

from rayclip.data import batch_pixels, open_data
from rayclip.methods import Batch, ClassTexts, Original, make_method
from rayclip.models import TEMPLATE, load_model
from rayclip.models.clip import frozen
from rayclip.rng import sample_keys

pytestmark = pytest.mark.ci

# settings, loss, and norm of its gradient in the image encoder
GOLDEN = {
    "saft": ({"captions": "templates", "steps": 2}, 2.1538734, 9.466020),
    "pmg-aft": ({"form": "scaled", "steps": 2}, 2.3857419, 9.869717),
    "pmg-aft published": ({"form": "published", "steps": 2}, 2.2060165, 0.979474),
    "fare": ({"steps": 10}, 75.1684799, 1005.859253),
}


@pytest.fixture(scope="module")
def case(shared):
    """The original, the student, images and labels."""
    base = load_model(f"local-dir:{shared / 'models/pocket-clip'}")
    student = copy.deepcopy(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.model.visual.parameters():
            p += 0.02 * p.std().nan_to_num(0) * torch.randn_like(p)
    data = open_data(str(shared / "data/cifar10-test.parquet"), "test", "raw")
    pixels = batch_pixels(data, range(300, 316), "native", 32).float() / 255
    return base, student, data.class_names, pixels, torch.from_numpy(data.labels[300:316])


@pytest.mark.parametrize("name", GOLDEN)
def test_loss_and_gradient_are_those_of_the_public_code(case, name):
    base, student, classes, pixels, labels = case
    settings, loss, norm = GOLDEN[name]
    method = make_method(name.split()[0], eps=1 / 255, step=1 / 255, **settings)
    prompts = method.prompts(classes, TEMPLATE)
    student.requires_grad_(False)
    trained = student.parameters_of("image")
    for p in trained:
        p.requires_grad_(True)
    batch = Batch(
        pixels_BCHW=pixels,
        labels_B=labels,
        keys_B=sample_keys(range(16), "ref"),
        texts=ClassTexts(student, prompts, trainable=False),
        total=16,
        original=Original(clip=base.requires_grad_(False), texts=ClassTexts(base, prompts, trainable=False)),
    )
    with frozen(student):
        batch = method.attack(student, batch)
    found, _ = method.loss(student, batch)
    gradients = torch.autograd.grad(found, trained, allow_unused=True)
    length = torch.cat([g.flatten() for g in gradients if g is not None]).norm().item()
    assert found.item() == pytest.approx(loss, rel=2e-6)
    assert length == pytest.approx(norm, rel=1e-5)
