"""Each defence against its formula, written out image by image in float64; and what all of them promise."""

import math

import pytest
import torch
import torch.nn.functional as F

import naive
from attacks.test_gradient import CLASSES, balanced
from conftest import tiny_clip
from rayclip import rng
from rayclip.defenses import DEFENSES, Defended
from rayclip.models import ZeroShot
from rayclip.models.checkpoint import save_checkpoint
from rayclip.rng import sample_keys

N = 6


@pytest.fixture(scope="module")
def victim():
    return balanced(torch.float64)


@pytest.fixture(scope="module")
def images():
    noise = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return noise.clamp(0.02, 0.95)  # some pixels near the ends of the range


@pytest.fixture(scope="module")
def keys():
    return sample_keys(range(N), 0, "defence")


def start(x, key, eps):
    """d0 ~ U(-eps, eps), cut to the image range."""
    return torch.clamp((2 * naive.uniforms(key, tuple(x.shape)) - 1) * eps, -x, 1 - x)


def stepped(x, d, loss, step, eps):
    """One signed step that raises `loss(pixels)`, inside the ball and the range."""
    at = (x + d).clone().requires_grad_()
    loss(at[None]).backward()
    return torch.clamp(torch.clamp(d + step * at.grad.sign(), -eps, eps), -x, 1 - x)


def ttc(encode, judge, x, key, *, eps=4 / 255, step=1 / 255, steps=2, tau=0.2, beta=2.0):
    def features(pixels):
        return encode(pixels)[0].detach()

    def away(pixels):
        return (encode(pixels)[0] - clean).pow(2).sum()

    clean = features(x[None])
    d = [start(x, key, eps)]
    for _ in range(steps):
        d.append(stepped(x, d[-1], away, step, eps))
    length = math.sqrt(float((judge((x + d[0])[None])[0] - judge(x[None])[0]).pow(2).sum()))
    if length / math.sqrt(float(judge(x[None])[0].pow(2).sum())) >= tau:
        return x + d[0]
    weights = [math.exp(beta * n) for n in range(steps + 1)]
    return x + sum(w * one for w, one in zip(weights, d, strict=True)) / sum(weights)


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.05, 0.1, 10.0])
def test_ttc_is_the_papers(victim, images, keys, tau):
    encode = lambda p: victim.clip.encode_image(p, normalize=False)  # noqa: E731
    found = DEFENSES["ttc"](tau=tau, steps=3, step=1.5 / 255).purify(victim, images, keys)
    for i in range(N):
        with torch.enable_grad():
            wanted = ttc(encode, encode, images[i], int(keys[i]), tau=tau, steps=3, step=1.5 / 255)
        assert (found[i] - wanted).abs().max() < 1e-12


def test_ttc_with_a_threshold_between_its_images_treats_each_by_its_own(victim, images, keys):
    from rayclip.attacks.base import random_start
    from rayclip.defenses.ttc import instability

    delta = random_start(images, keys, 4 / 255, "linf")
    tau_B = instability(*(victim.embed(x, normalize=False) for x in (images, images + delta)))
    middle = float(tau_B.sort().values[N // 2 - 1 : N // 2 + 1].mean())
    found = DEFENSES["ttc"](tau=middle).purify(victim, images, keys)
    noise_alone = ((found - images - delta).abs().amax((1, 2, 3)) < 1e-12).tolist()
    assert noise_alone == (tau_B >= middle).tolist() and 0 < sum(noise_alone) < N


def test_ttc_measures_on_the_original_encoder(victim, images, keys, tmp_path):
    """The original's instabilities decide, the victim's features are counterattacked."""
    other = tiny_clip(seed=5)
    save_checkpoint(other, tmp_path / "original", {})
    spec = f"local-dir:{tmp_path / 'original'}"
    small = ZeroShot(tiny_clip(), CLASSES)
    encode = lambda p: small.clip.encode_image(p.float(), normalize=False).double()  # noqa: E731
    judge = lambda p: other.encode_image(p.float(), normalize=False).detach().double()  # noqa: E731
    for tau in (0.02, 0.05, 0.1):
        found = DEFENSES["ttc"](tau=tau, original=spec).pinned().purify(small, images.float(), keys)
        for i in range(N):
            wanted = ttc(encode, judge, images[i].float().double(), int(keys[i]), tau=tau)
            assert (found[i] - wanted).abs().max() < 1e-5


def test_rn_is_uniform_noise(victim, images, keys):
    found = DEFENSES["rn"](eps=0.1).purify(victim, images, keys)
    for i in range(N):
        assert (found[i] - images[i] - start(images[i], int(keys[i]), 0.1)).abs().max() < 1e-12


def softmax(values):
    top = max(values)
    return [math.exp(v - top) / sum(math.exp(u - top) for u in values) for v in values]


def test_tte_averages_the_softmax_of_ten_views(victim, images, keys):
    """Corner crops of 7 of 8 pixels, resized back; then mirrored."""
    defended = Defended(victim, (DEFENSES["tte"](),), keys)
    with torch.no_grad():
        found = defended(images)
    for i, x in enumerate(images):
        upright = [x]
        for top in (0, 1):
            for left in (0, 1):
                crop = x[None, :, top : top + 7, left : left + 7]
                upright.append(F.interpolate(crop, size=(8, 8), mode="bicubic", antialias=True)[0].clamp(0, 1))
        each = [softmax(victim(v[None])[0].tolist()) for u in upright for v in (u, u.flip(2))]
        mean = [sum(p[c] for p in each) / 10 for c in range(len(CLASSES))]
        assert found[i].exp().tolist() == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("settings", [{}, {"preset": "ttc"}, {"eps": 0.02, "steps": 3, "step": 0.01}], ids=str)
@pytest.mark.parametrize("name", ["anti-adversary", "hedge", "et3"])
def test_signed_steps_are_the_papers(victim, images, keys, name, settings):
    paper = {"anti-adversary": (0.3, 2, 0.15), "hedge": (8 / 255, 20, 4 / 255), "et3": (5 / 255, 2, 2.5 / 255)}[name]
    eps, steps, step = paper
    if settings:
        eps, steps, step = settings.get("eps", 4 / 255), settings.get("steps", steps), settings.get("step", step)
    found = DEFENSES[name](**settings).purify(victim, images, keys)
    for i, x in enumerate(images):
        predicted = int(victim(x[None])[0].argmax())

        def loss(pixels, predicted=predicted):
            logits = victim(pixels)[0]
            logs = torch.stack([z - logits.logsumexp(0) for z in logits])
            return {"anti-adversary": logs[predicted], "hedge": -logs.sum(), "et3": logits.exp().sum().log()}[name]

        d = torch.zeros_like(x)
        for _ in range(steps):
            d = stepped(x, d, loss, step, eps)
        assert (found[i] - x - d).abs().max() < 1e-12


QUICK = {"rtpt": {"count": 6, "selected": 0.4}}


@pytest.mark.parametrize("name", list(DEFENSES))
def test_every_defence_stays_in_range_and_is_the_same_in_any_batch(victim, images, keys, name):
    defense = DEFENSES[name](**QUICK.get(name, {}))

    def predicted(rows, seeds=keys):
        return Defended(victim, (defense,), seeds[rows])(images[rows])

    with torch.no_grad():
        views = defense.views(victim, images, keys)
        whole, apart = predicted(slice(None)), torch.cat([predicted(slice(i, i + 1)) for i in range(N)])
        again = predicted(slice(None), rng.subkeys(keys, "another"))
    assert views.min() >= 0 and views.max() <= 1
    assert (whole - apart).abs().max() < 1e-9
    assert defense.random == bool((again - whole).abs().max() > 1e-6)
