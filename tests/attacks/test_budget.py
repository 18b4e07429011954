"""What every attack does with its budget and its pixels, whoever runs it: the step follows, nonsense is refused."""

import re

import pytest
import torch

from attacks.test_gradient import balanced, batch, build, universal
from rayclip.attacks import ATTACKS, Attack, Samples, make_attack, parse_attacks
from rayclip.data import batch_pixels, open_data
from rayclip.models import ZeroShot, load_model
from rayclip.rng import sample_keys
from rayclip.types import UserError
from rayclip.units import default_step

N = 96
ON_IMAGES = [name for name, kind in ATTACKS.items() if kind.needs_eps]


@pytest.fixture(scope="module")
def digits():
    data = open_data("digits", "test")
    victim = ZeroShot(load_model("digits"), data.class_names)
    images = batch_pixels(data, range(N), "native", victim.clip.image_size).float() / 255
    labels = torch.from_numpy(data.labels[:N])
    with torch.no_grad():
        todo = victim(images).argmax(1) == labels
    return victim, Samples(images, labels, sample_keys(data.ids[:N].tolist(), 0, data.fingerprint, "pgd"), todo)


def left(digits, attack, eps=None):
    victim, samples = digits
    made = attack.run(victim, samples, eps=eps)
    with torch.no_grad():
        right = victim(made.images_BCHW).argmax(1) == samples.labels_B
    return 100 * (right & samples.todo_B).float().mean().item()


@pytest.mark.parametrize("name", ["pgd", "cw", "feature", "transfer"])
def test_a_large_ball_is_crossed_without_a_step_being_named(digits, name):
    """With steps of 1/255 PGD-10 leaves some 90 % at 32/255, where APGD-CE leaves 15 %."""
    settings = {"source": "digits"} if name == "transfer" else {}
    assert left(digits, make_attack(name, **settings), 32 / 255) < 45
    assert left(digits, make_attack(name, step=1 / 255, **settings), 32 / 255) > 75


def test_in_l2_the_step_follows_the_budget_too(digits):
    assert left(digits, make_attack("pgd-l2"), 3.0) == 0 < left(digits, make_attack("pgd-l2", step=0.1), 3.0)


def test_a_budget_may_be_the_attacks_or_the_calls(digits):
    own = left(digits, make_attack("pgd", eps=32 / 255))
    assert own == left(digits, make_attack("pgd"), 32 / 255) == left(digits, make_attack("pgd", eps=0.5), 32 / 255)


@pytest.mark.parametrize(
    ("eps", "steps", "norm", "step"),
    [
        (1 / 255, 10, "linf", 1 / 255),
        (4 / 255, 10, "linf", 1 / 255),
        (8 / 255, 10, "linf", 2 / 255),
        (32 / 255, 10, "linf", 8 / 255),
        (32 / 255, 100, "linf", 1 / 255),
        (0.5, 10, "l2", 0.125),
        (0.5, 100, "l2", 0.0125),
        (0.0, 10, "linf", 1 / 255),
        (0.0, 10, "l2", 0.0),
    ],
)
def test_the_default_step(eps, steps, norm, step):
    assert default_step(eps, steps, norm) == pytest.approx(step)
    attack = make_attack("pgd", steps=steps, norm=norm).within(eps)
    assert (attack.eps, attack.step) == (eps, pytest.approx(step))
    assert make_attack("pgd", steps=steps, norm=norm, step=0.3).within(eps).step == 0.3


def test_on_pairs_the_default_step_is_the_papers():
    assert make_attack("co-attack", steps=10).within_on_pairs(2 / 255).step == pytest.approx(0.25 / 255)
    assert make_attack("co-attack", step=1 / 255).within_on_pairs(2 / 255).step == 1 / 255
    assert make_attack("bert").within_on_pairs(None) == make_attack("bert")


@pytest.mark.parametrize("name", ON_IMAGES)
def test_every_attack_on_images_has_a_budget_as_a_setting(name):
    source = {"transfer": ",source=digits", "uap": f",file={universal()}"}.get(name, "")
    (attack,) = parse_attacks(f"{name}:eps=2/255{source}", {})
    assert attack.eps == pytest.approx(2 / 255) == attack.within(8 / 255).eps
    assert "eps" not in attack.describe()  # the cell says it, once


@pytest.mark.parametrize("name", ["clean", "bert"])
def test_attacks_that_leave_images_alone_have_none(name):
    with pytest.raises(UserError, match=f"{name}.*eps"):
        parse_attacks(f"{name}:eps=1/255", {})
    assert make_attack(name).within(None) == make_attack(name)


@pytest.fixture(scope="module")
def victim():
    return balanced()


def attempt(victim, name, eps, change=lambda images: images):
    images, labels, todo, keys = batch(victim, 6)
    attack: Attack = build({"name": name})
    prompts = attack.prepare(victim)
    return attack.run(victim, Samples(change(images), labels, keys, todo), eps=eps, prompts=prompts)


@pytest.mark.parametrize("eps", [8, 1.0, 255 / 255, -1 / 255, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ON_IMAGES)
def test_budgets_that_cannot_be_are_refused_by_every_attack(victim, name, eps):
    if ATTACKS[name].name == "pgd-l2" and eps in (8, 1.0):
        assert attempt(victim, name, eps).images_BCHW.isfinite().all()
        return
    with pytest.raises(UserError, match=re.escape(name)):
        attempt(victim, name, eps)


def test_a_missing_budget_is_refused(victim):
    with pytest.raises(UserError, match="budget"):
        attempt(victim, "pgd", None)
    assert attempt(victim, "clean", None).images_BCHW.isfinite().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: 255 * x, "pixels from .* to 25"),
        (lambda x: 2 * x - 1, "pixels from -"),
        (lambda x: torch.where(x > 0.9, torch.nan, x), "pixels from nan"),
        (lambda x: torch.where(x > 0.9, torch.inf, x), "to inf"),
    ],
    ids=["bytes", "normalised", "NaN", "infinite"],
)
@pytest.mark.parametrize("name", ["clean", *ON_IMAGES])
def test_pixels_outside_the_range_are_refused_by_every_attack(victim, name, change, says):
    with pytest.raises(UserError, match=says):
        attempt(victim, name, 1 / 255, change)


def test_rounding_is_no_reason_to_refuse(victim):
    mean, std = 0.4814, 0.2686
    attempt(victim, "pgd", 1 / 255, lambda x: ((x.round() - mean) / std) * std + mean)


def test_pixels_are_looked_at_once_a_run(victim, monkeypatch):
    """Each look waits for the device: none is inside a loop or in the parts of AutoAttack."""
    looks = []
    check = torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda self, *a, **k: looks.append(1) or check(self, *a, **k))
    for name in ("pgd", "autoattack", "transfer", "sep", "fgsm"):
        looks.clear()
        attempt(victim, name, 1 / 255)
        assert len(looks) == 1, name


def test_transfer_of_an_l2_attack_stays_in_the_l2_ball(victim):
    images, labels, todo, keys = batch(victim, 6)
    attack = make_attack("transfer", source="digits", attack="pgd-l2", eps=0.5)
    assert attack.ball == "l2" and attack.inner.norm == "l2"
    delta = (attack.run(victim, Samples(images, labels, keys, todo)).images_BCHW - images).flatten(1)
    assert 0 < delta.norm(dim=1).max() <= 0.5 + 1e-6
