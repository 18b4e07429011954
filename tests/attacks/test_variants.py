"""FGSM in closed form, and MI, DI and SI against their formulas."""

import pytest
import torch
import torch.nn.functional as F

import naive
from attacks.test_gradient import balanced, batch
from rayclip.attacks import Samples, make_attack, parse_attacks
from rayclip.attacks.variants import SMALLEST, accumulate, resize_and_pad
from rayclip.rng import sample_keys, uniform

EPS, STEP = 4 / 255, 1 / 255


@pytest.fixture(scope="module")
def victim():
    return balanced(torch.float64)


def gradient(victim, pixels, labels, scale=1.0):
    """Of the cross-entropy of `pixels · scale`, in `pixels`."""
    pixels = pixels.clone().requires_grad_()
    loss = F.cross_entropy(victim(pixels * scale), labels, reduction="sum")
    return torch.autograd.grad(loss, pixels)[0]


def climb(victim, images, labels, direction, steps=6):
    """Steps along sign(direction(pixels)) from the images themselves, inside the ball."""
    x = images
    for _ in range(steps):
        x = torch.clamp(x + STEP * direction(x).sign(), images - EPS, images + EPS).clamp(0, 1)
    return x


def test_fgsm_is_one_step_along_the_sign(victim):
    images, labels, todo, keys = batch(victim)
    ours = make_attack("fgsm").run(victim, Samples(images, labels, keys, todo), eps=EPS)
    assert torch.allclose(
        ours.images_BCHW, (images + EPS * gradient(victim, images, labels).sign()).clamp(0, 1), atol=1e-12
    )
    assert (ours.queries_B == 1).all() and (ours.steps_B == 1).all()


def test_pgd_l2_is_pgd_in_the_l2_ball(victim):
    images, labels, todo, keys = batch(victim)
    ours, same = (
        make_attack(name, **settings).run(victim, Samples(images, labels, keys, todo), eps=0.2)
        for name, settings in (("pgd-l2", {}), ("pgd", {"norm": "l2", "step": 2.5 * 0.2 / 10}))
    )
    assert torch.equal(ours.images_BCHW, same.images_BCHW)
    attack = make_attack("pgd-l2", steps=7)
    assert attack.label == "pgd-l2-7" and attack.describe()["norm"] == "l2"


@pytest.mark.parametrize("variant", ["mi", "si", "mi-si"])
def test_mi_and_si_are_their_formulas(victim, variant):
    images, labels, todo, keys = batch(victim)
    g = torch.zeros_like(images)

    def direction(x):
        nonlocal g
        scales = [1 / 2**i for i in range(5)] if "si" in variant else [1]
        new = sum(gradient(victim, x, labels, s) for s in scales) / len(scales)
        if "mi" not in variant:
            return new
        g = 1.0 * g + new / new.abs().sum((1, 2, 3), keepdim=True)
        return g

    attack = make_attack("pgd", variant=variant, steps=6, step=STEP, start="zero", stop="final")
    ours = attack.run(victim, Samples(images, labels, keys, todo), eps=EPS)
    assert torch.allclose(ours.images_BCHW, climb(victim, images, labels, direction), atol=1e-12)
    assert (ours.queries_B == 6 * (5 if "si" in variant else 1)).all()


def test_momentum_keeps_the_direction():
    g = accumulate("mi", torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[1.0, -3.0]]]]))
    assert g.flatten().tolist() == [0.75, -0.25]
    assert accumulate("mi", torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)).isfinite().all()


def test_diversity_is_a_shrunk_image_at_a_random_place():
    images = torch.rand(12, 3, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = sample_keys(range(12), "di")
    ours = resize_and_pad(images, keys, stream=7)
    left_alone = 0
    for image, warped, (chosen, side, x, y) in zip(
        images, ours, uniform(keys, (4,), stream=7, dtype=torch.float64).tolist(), strict=True
    ):
        share = SMALLEST + (1 - SMALLEST) * side
        same = chosen >= 0.5
        expected = image if same else naive.resize_and_pad(image, share, x * (1 - share), y * (1 - share))
        left_alone += same
        assert torch.allclose(warped, expected, atol=1e-12)
    assert 0 < left_alone < 12


def test_half_of_the_images_are_left_alone():
    images = torch.rand(1, 3, 4, 4).expand(2000, -1, -1, -1)
    same = (resize_and_pad(images, sample_keys(range(2000)), stream=0) == images).flatten(1).all(1)
    assert same.float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_the_verdict_is_on_the_image_itself(victim):
    """Under first_success every image that left early fools the model without the warp."""
    images, labels, todo, keys = batch(victim)
    attack = make_attack("pgd", variant="di-si", steps=12, step=2 / 255)
    result = attack.run(victim, Samples(images, labels, keys, todo), eps=12 / 255)
    with torch.no_grad():
        broken = victim(result.images_BCHW).argmax(1) != labels
    early = result.steps_B < 12
    assert early.any() and broken[early].all()
    assert torch.equal(result.queries_B % 6, torch.zeros_like(labels))  # the image and five scaled copies


def test_variants_show_in_label_and_protocol():
    mi, both, sep = parse_attacks("pgd:variant=mi,pgd:variant=mi-di,sep:variant=si", {"steps": 3})
    assert [a.label for a in (mi, both, sep)] == ["pgd-mi-3", "pgd-mi-di-3", "sep_pgd-si-3"]
    assert mi.describe()["variant"] == "mi" and make_attack("pgd").label == "pgd-10"
