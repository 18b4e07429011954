"""APGD against the paper's Algorithm 1, written out one image at a time in `naive`."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import naive
from attacks.test_gradient import CLASSES, balanced, batch
from rayclip.attacks import Samples, apgd, make_attack
from rayclip.attacks.apgd import checkpoints, dlr, targeted_dlr
from rayclip.models import ZeroShot
from rayclip.rng import sample_keys
from rayclip.types import UserError

SIZE = 8


@pytest.fixture(scope="module")
def victim():
    return balanced(torch.float64, SIZE)


class Rugged:
    """A classifier with hills and valleys inside any ball, so that steps keep failing; class 0 always wins.

    A model that is almost linear inside the ball would have the attack at its end after 20 steps, and whether the last
    bits of a loss rise is nobody's contract.
    """

    def __init__(self):
        draw = torch.Generator().manual_seed(5)
        self.seen: list[torch.Tensor] = []
        self.waves_DN = 10 * torch.randn(32, 3 * 4 * 4, generator=draw, dtype=torch.float64)
        self.text_KD = torch.randn(5, 32, generator=draw, dtype=torch.float64) / 8

    def __call__(self, pixels, index=None):
        self.seen.extend(pixels.detach().clone())
        logits = (pixels.flatten(1) @ self.waves_DN.T).sin() @ self.text_KD.T
        return logits + torch.tensor([6.0, 0, 0, 0, 0], dtype=torch.float64)


def rugged_batch(n):
    images = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(6)).double()
    return images, torch.zeros(n, dtype=torch.int64), sample_keys(range(n), "rugged")


def clip_logits(victim):
    """Logits of one image `(C, H, W)`, as a list."""
    scale, texts = victim.clip.scale.item(), victim.text_KD

    def logits(x):
        f = victim.clip.encode_image(x[None], normalize=False)[0]
        f = f / f.pow(2).sum().sqrt()
        return [scale * (f * t / t.pow(2).sum().sqrt()).sum() for t in texts]

    return logits


def plain(logits, attack, image, label, key, eps):
    """What Algorithm 1 makes of an image: points looked at, halvings of each run, result, steps."""
    losses = {
        "apgd-ce": [lambda z: torch.logsumexp(torch.stack(z), 0) - z[label]],
        "apgd-dlr": [lambda z: naive.dlr(z, label)],
    }
    if attack.name == "apgd-t":
        clean = [a.item() for a in logits(image)]
        order = sorted((c for c in range(len(clean)) if c != label), key=lambda c: -clean[c])
        losses["apgd-t"] = [lambda z, t=t: naive.targeted_dlr(z, label, t) for t in order[: attack.targets]]
    points, halvings, best, steps = [], [], (-float("inf"), None), 0
    for turn, loss in enumerate(losses[attack.name] * attack.restarts):
        start = naive.start(key, image, eps, attack.norm, 4 * turn)
        seen, halved, x, f, broken = naive.apgd(
            logits, loss, image, start, label, eps=eps, n=attack.iterations, norm=attack.norm
        )
        points, steps = points + seen, steps + len(seen) - 1
        halvings.append(halved)
        if broken:
            return points, halvings, x, steps
        best = max(best, (f, x), key=lambda pair: pair[0])
    return points, halvings, best[1], steps


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("apgd-ce", {"iterations": 100}),
        ("apgd-dlr", {"iterations": 100}),
        ("apgd-t", {"iterations": 50, "targets": 3}),
        ("apgd-ce", {"iterations": 25, "restarts": 2}),
    ],
)
def test_every_iterate_and_every_halving_are_the_papers(name, settings, norm, monkeypatch):
    n, eps = 4, {"linf": 8 / 255, "l2": 0.1}[norm]  # larger l_2 balls are chaotic: steps multiply the last bits
    images, labels, keys = rugged_batch(n)
    attack = make_attack(name, norm=norm, **settings)
    marks, decide = [k for k in checkpoints(attack.iterations) if k < attack.iterations], apgd.halving
    decisions: list[bool] = []

    def noted(state, steps):
        decisions.append(bool(decide(state, steps)))
        return decide(state, steps)

    monkeypatch.setattr(apgd, "halving", noted)
    count, kinds = 0, set()
    for i in range(n):
        victim = Rugged()
        decisions.clear()
        result = attack.run(victim, Samples(images[i : i + 1], labels[i : i + 1], keys[i : i + 1]), eps=eps)
        seen = victim.seen[1:] if name == "apgd-t" else list(victim.seen)  # the first puts the targets in order
        points, halvings, final, steps = plain(
            lambda x: list(Rugged()(x[None])[0]), attack, images[i], 0, int(keys[i]), eps
        )
        assert len(seen) == len(points) == len(halvings) * (attack.iterations + 1)
        assert max((a - b).abs().max() for a, b in zip(seen, points, strict=True)) < 1e-9
        ours = [k for k, halved in zip(marks * len(halvings), decisions, strict=True) if halved]
        assert ours == [k for run in halvings for k in run]
        assert (result.images_BCHW[0] - final).abs().max() < 1e-9
        assert result.steps_B.item() == steps and result.queries_B.item() == len(victim.seen)
        count, kinds = count + len(ours), kinds | set(decisions)
    assert kinds == {True, False}, "some checkpoints must halve the step and some must not"
    assert count >= 2 * n


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_a_batch_in_which_some_break_agrees_image_by_image(victim, name, norm):
    n, eps = 10, {"linf": 2 / 255, "l2": 0.08}[norm]
    images, labels, _, keys = batch(victim, n, SIZE)
    labels[0] = (labels[0] + 1) % len(CLASSES)  # wrong from the start
    with torch.no_grad():
        todo = victim(images).argmax(1) == labels
    attack = make_attack(name, norm=norm, iterations=15)
    ours = attack.run(victim, Samples(images, labels, keys, todo), eps=eps)
    attack = attack.for_classes(len(CLASSES))
    with torch.no_grad():
        broken = victim(ours.images_BCHW).argmax(1) != labels
    assert torch.equal(ours.images_BCHW[0], images[0]) and ours.queries_B[0] == 0
    assert 0 < broken[1:].sum() < n - 1, "some images must break and some must hold"
    for i in range(1, n):
        points, _, final, steps = plain(clip_logits(victim), attack, images[i], int(labels[i]), int(keys[i]), eps)
        assert (ours.images_BCHW[i] - final).abs().max() < 1e-9
        assert ours.steps_B[i] == steps
        assert ours.queries_B[i] == len(points) + (name == "apgd-t")


def test_checkpoints_of_100_iterations_are_the_published_ones():
    # p: 0.22, +0.19, +0.16, +0.13, +0.10, +0.07, then 0.06 at a time: the next would be 1.05
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("n", [1, 2, 5, 10, 20, 50, 73, 100, 200, 1000])
def test_checkpoints_are_those_of_exact_fractions(n):
    assert checkpoints(n) == naive.apgd_checkpoints(n)[1:]


@pytest.mark.parametrize("classes", [4, 5, 30])
def test_losses_are_the_formulas(classes):
    z = 10 * torch.randn(20, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % classes
    t = (y + 1) % classes
    cw = make_attack("cw").loss(4 * z, y)
    for i, row in enumerate(z.tolist()):
        assert dlr(z, y)[i].item() == pytest.approx(naive.dlr(row, int(y[i])), rel=1e-12)
        assert targeted_dlr(z, y, t)[i].item() == pytest.approx(
            naive.targeted_dlr(row, int(y[i]), int(t[i])), rel=1e-12
        )
        assert cw[i].item() == pytest.approx(naive.cw([4 * a for a in row], int(y[i])), rel=1e-12)
    assert (cw == 0).any() and (cw < 0).any()


def test_equal_logits_give_no_nan():
    z = torch.zeros(2, 5, requires_grad=True)
    y, t = torch.tensor([0, 1]), torch.tensor([1, 0])
    total = (dlr(z, y) + targeted_dlr(z, y, t)).sum()
    assert total.isfinite() and torch.autograd.grad(total, z)[0].isfinite().all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_loss_of_what_holds_rises_and_restarts_only_raise_it(norm):
    images, labels, keys = rugged_batch(12)
    victim, ends = Rugged(), []
    for restarts in (1, 3):
        attack = make_attack("apgd-ce", iterations=10, restarts=restarts, norm=norm)
        result = attack.run(victim, Samples(images, labels, keys), eps=0.05)
        assert (result.steps_B == 10 * restarts).all()
        ends.append(F.cross_entropy(victim(result.images_BCHW), labels, reduction="none"))
    assert (ends[0] > F.cross_entropy(victim(images), labels, reduction="none")).all()
    assert (ends[1] >= ends[0]).all() and (ends[1] > ends[0]).any()


@pytest.mark.parametrize(
    ("name", "classes", "match"),
    [
        ("apgd-dlr", 2, "needs 3 classes, and the data has 2: use apgd-ce"),
        ("apgd-t", 3, "use apgd-dlr"),
        ("apgd-t", 2, "use apgd-ce"),
    ],
)
def test_too_few_classes_are_explained(victim, name, classes, match):
    attack = make_attack(name)
    with pytest.raises(UserError, match=match):
        attack.for_classes(classes)
    few = ZeroShot(victim.clip, CLASSES[:classes])
    images, labels, todo, keys = batch(few, 2, SIZE)
    with pytest.raises(UserError, match=match):
        attack.run(few, Samples(images, labels, keys, todo), eps=1 / 255)


def test_labels_and_protocol():
    assert make_attack("apgd-ce").label == "apgd-ce-100"
    assert make_attack("apgd-dlr", iterations=20, restarts=5, norm="l2").label == "apgd-dlr-20x5_l2"
    assert make_attack("apgd-t").describe() == {"iterations": 100, "restarts": 1, "norm": "linf", "targets": 9}
    assert make_attack("apgd-t").for_classes(5).targets == 4
    assert {f.name for f in dataclasses.fields(make_attack("apgd-ce"))} == {
        *("eps", "iterations", "restarts", "norm", "stop")
    }


def test_to_the_last_step_it_ends_at_the_surest_adversarial_point(victim):
    """It breaks the images that it breaks if it stops there, and goes on to the highest loss of points that do."""
    n, eps = 8, 3 / 255
    images, labels, todo, keys = batch(victim, n, SIZE)
    attack = make_attack("apgd-ce", iterations=8, restarts=2)
    seen = []

    class Watched:
        text_KD = victim.text_KD

        def __call__(self, pixels, index=None):
            logits = victim(pixels, index)
            seen.append((index, F.cross_entropy(logits, labels[index], reduction="none"), logits.argmax(1)))
            return logits

    samples = Samples(images, labels, keys, todo)
    first = attack.run(victim, samples, eps=eps)
    final = attack.to_last_step().run(Watched(), samples, eps=eps)
    with torch.no_grad():
        broken, before = (victim(made.images_BCHW).argmax(1) != labels for made in (final, first))
        ends = F.cross_entropy(victim(final.images_BCHW), labels, reduction="none")
    assert torch.equal(broken, before) and broken.any()
    for i in broken.nonzero().squeeze(1).tolist():
        rows = [(f[index == i], said[index == i]) for index, f, said in seen if (index == i).any()]
        losses = [f.item() for f, said in rows if said != labels[i]]
        assert ends[i].item() == pytest.approx(max(losses), abs=1e-9)
        assert final.steps_B[i] % 8 == 0
    assert (final.images_BCHW - images).abs().max() <= eps + 1e-9
    assert "stop" not in attack.describe() and attack.to_last_step().describe()["stop"] == "final"
