"""Every registered attack keeps its promises; PGD agrees with the formula written out sample by sample."""

import atexit
import copy
import dataclasses
import functools
import shutil
import tempfile

import pytest
import torch

import naive
from conftest import tiny_clip
from rayclip.attacks import ATTACKS, Samples, make_attack, parse_attacks
from rayclip.models import ZeroShot
from rayclip.rng import sample_keys
from rayclip.types import UserError

CLASSES = ("cat", "dog", "truck", "lemon", "violin")
SETTINGS = [
    *({"name": name} for name in ATTACKS),
    *(
        {"name": n, "norm": "l2", "step": 0.1}
        for n in ("pgd", "sep", "fab-t", "square", "feature", "semantic", "transfer", "co-attack", "sga")
    ),
    *({"name": n, "stop": "final"} for n in ("pgd", "sep", "fab-t", "feature", "semantic", "co-attack", "sga")),
    *({"name": n, "norm": "l2"} for n in ("apgd-ce", "apgd-dlr", "apgd-t", "autoattack")),
    {"name": "apgd-ce", "restarts": 3},
    {"name": "pgd", "start": "zero"},
    *({"name": "pgd", "variant": v} for v in ("mi", "di", "mi-di-si")),
    {"name": "feature", "objective": "kl"},
    {"name": "semantic", "objective": "mean_similarity"},
    {"name": "transfer", "attack": "feature"},
    {"name": "uap", "fit": "scale"},
]


def batch(victim, n=24, size=8):
    """Images that the victim is right about, as their labels are what it says."""
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = victim(images.to(victim.text_KD.dtype)).argmax(1)
    return images.to(victim.text_KD.dtype), labels, torch.ones(n, dtype=torch.bool), sample_keys(range(n), 0, "t")


def balanced(dtype=torch.float32, size=8):
    """A random model whose classes share the images out among them.

    A random model says the same of every image. Class weights at right angles to the mean image embedding change that.
    """
    victim = ZeroShot(tiny_clip(dtype=dtype), CLASSES)
    with torch.no_grad():
        images = torch.rand(200, 3, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)
        features = victim.embed(images)
        texts = torch.randn(len(CLASSES), features.shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
        mean = features.mean(0)
        texts -= (texts @ mean)[:, None] * mean / mean.pow(2).sum()
        victim.text_KD = texts / texts.norm(dim=1, keepdim=True)
        assert victim(images).argmax(1).unique().numel() >= 4
    return victim


@functools.cache
def universal():
    """The file of a universal perturbation larger than any budget here."""
    folder = tempfile.mkdtemp(prefix="uap")
    atexit.register(shutil.rmtree, folder)
    drawn = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)) - 0.5
    torch.save(drawn, f"{folder}/universal.pt")
    return f"{folder}/universal.pt"


def build(settings):
    settings = dict(settings)
    kind = ATTACKS[settings.pop("name")]
    known = {f.name for f in dataclasses.fields(kind)}
    defaults = {
        "steps": 5,
        "step": 2 / 255,
        "substitutes": "clip-table",
        "iterations": 5,
        "queries": 30,
        "n": 2,
        "source": "digits",
        "file": universal(),
    }
    return kind(**{k: v for k, v in (defaults | settings).items() if k in known})


def run(attack, victim, images, labels, todo, keys, eps):
    return attack.run(victim, Samples(images, labels, keys, todo), eps=eps, prompts=attack.prepare(victim))


@pytest.fixture(scope="module")
def victim():
    return balanced()


@pytest.fixture(scope="module")
def victim_64():
    return balanced(torch.float64)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_stays_in_the_ball_and_in_range_and_leaves_no_gradient(victim, settings):
    attack, (images, labels, todo, keys) = build(settings), batch(victim)
    l2 = getattr(attack, "norm", None) == "l2"
    eps = 0.3 if l2 else 8 / 255
    adversarial = run(attack, victim, images, labels, todo, keys, eps).images_BCHW
    delta = (adversarial - images).flatten(1)
    size = delta.norm(dim=1) if l2 else delta.abs().amax(1)
    assert size.max() <= eps + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert not adversarial.requires_grad and not images.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in victim.clip.parameters())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_eps_zero_is_identity_on_images(victim, settings):
    images, labels, todo, keys = batch(victim)
    assert torch.equal(run(build(settings), victim, images, labels, todo, keys, 0.0).images_BCHW, images)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_same_keys_same_result_in_any_batch_size(victim, victim_64, settings):
    """In float64, since only rounding may depend on the batch, and steps along normalised gradients magnify it."""
    victim = victim if settings["name"] == "transfer" else victim_64  # its source is in fp32
    attack, (images, labels, todo, keys) = build(settings), batch(victim)
    whole = run(attack, victim, images, labels, todo, keys, 8 / 255)
    parts = [
        run(attack, victim, images[rows], labels[rows], todo[rows], keys[rows], 8 / 255)
        for rows in (slice(0, 7), slice(7, None))
    ]
    together, apart = whole.images_BCHW, torch.cat([p.images_BCHW for p in parts])
    assert torch.allclose(together, apart, rtol=0, atol=1e-9 if images.dtype == torch.float64 else 1e-5)
    assert torch.equal(whole.steps_B, torch.cat([p.steps_B for p in parts]))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_images_wrong_before_are_never_touched(victim, settings):
    images, labels, _, keys = batch(victim)
    nobody = torch.zeros(len(images), dtype=torch.bool)
    result = run(build(settings), victim, images, labels, nobody, keys, 8 / 255)
    assert torch.equal(result.images_BCHW, images) and result.queries_B.sum() == 0


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s["name"] in ("pgd", "pgd-l2", "cw")], ids=str)
def test_loss_rises(victim, settings):
    step = {"step": 0.1} if settings["name"] == "pgd-l2" else {}
    attack, (images, labels, todo, keys) = build(settings | step | {"stop": "final"}), batch(victim)
    eps = 1.0 if attack.norm == "l2" else 8 / 255
    result = run(attack, victim, images, labels, todo, keys, eps)
    with torch.no_grad():
        before, after = attack.loss(victim(images), labels), attack.loss(victim(result.images_BCHW), labels)
    assert (after > before).float().mean() > 0.95
    assert (result.steps_B == 5).all()


LEAVING = ("pgd", "cw", "apgd-ce", "apgd-dlr", "fab-t", "square", "feature", "semantic")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", LEAVING)
def test_decided_images_leave_the_batch(victim, name, norm):
    sizes = []

    class Counting(ZeroShot):
        def embed(self, pixels, index=None, *, normalize=True):
            sizes.append(len(pixels))
            return super().embed(pixels, index, normalize=normalize)

    counting = Counting(victim.clip, CLASSES)
    counting.text_KD = victim.text_KD
    images, labels, todo, keys = batch(counting)
    sizes.clear()
    step = 4 / 255 if norm == "linf" else 0.1
    attack = build({"name": name, "norm": norm, "steps": 20, "iterations": 12, "step": step})
    eps = 16 / 255 if norm == "linf" else 0.3
    # FAB's first step is as long as it takes
    result = attack.run(counting, Samples(images, labels, keys, todo), eps=eps / 8 if name == "fab-t" else eps)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    assert sum(sizes) == result.queries_B.sum()


@pytest.mark.parametrize("stop", ["first_success", "final"])
@pytest.mark.parametrize("steps", [39, 40, 41])
@pytest.mark.parametrize("name", ["pgd", "feature", "semantic", "sep", "co-attack"])
def test_who_comes_back_to_a_former_image_is_decided(victim_64, name, steps, stop):
    """The same images and steps as of a victim that is not known to answer equal pixels equally, for fewer forwards."""
    victim = victim_64
    forgetful = copy.copy(victim)
    forgetful.deterministic = False
    images, labels, todo, keys = batch(victim)
    attack = build({"name": name, "steps": steps, "step": 2 / 255, "stop": stop})
    ours, plain = (run(attack, v, images, labels, todo, keys, 2 / 255) for v in (victim, forgetful))
    assert torch.equal(ours.images_BCHW, plain.images_BCHW) and torch.equal(ours.steps_B, plain.steps_B)
    assert (plain.steps_B == steps).any() and ours.queries_B.sum() < 0.7 * plain.queries_B.sum()


@pytest.mark.parametrize("stop", ["first_success", "final"])
@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_agrees_with_the_plain_formula(norm, start, stop):
    n, size, eps, step = 10, 12, (0.12, 0.008)[norm == "linf"], (0.03, 0.002)[norm == "linf"]
    victim = balanced(torch.float64, size)
    clip, texts = victim.clip, victim.text_KD
    images, labels, _, keys = batch(victim, n, size)
    labels[0] = (labels[0] + 1) % len(CLASSES)  # one image that is wrong from the start
    with torch.no_grad():
        todo = victim(images).argmax(1) == labels
    attack = make_attack("pgd", steps=6, step=step, norm=norm, start=start, stop=stop)
    ours = attack.run(victim, Samples(images, labels, keys, todo), eps=eps)

    def encode(pixels):
        return clip.encode_image(pixels, normalize=False)

    for i in range(n):
        plain, steps = naive.pgd(
            encode,
            texts,
            clip.scale.item(),
            images[i],
            int(labels[i]),
            key=int(keys[i]),
            eps=eps,
            step=step,
            steps=6,
            norm=norm,
            start=start,
            stop=stop,
        )
        assert (ours.images_BCHW[i] - plain).abs().max() < 1e-9
        assert ours.steps_B[i] == steps
    if stop == "first_success":
        broken = (ours.steps_B[todo] < 6).sum()
        assert 0 < broken < todo.sum(), "some images must break early and some must hold"


def test_sep_is_judged_by_both_modalities(victim):
    """Clean text objective, adversarial text verdict: it breaks at least what BERT-Attack alone breaks."""
    images, labels, todo, keys = batch(victim)
    results = {
        name: run(build({"name": name}), victim, images, labels, todo, keys, 8 / 255) for name in ("bert", "sep")
    }
    with torch.no_grad():
        right = {
            name: victim.logits(victim.embed(r.images_BCHW), r.text_KD).argmax(1) == labels
            for name, r in results.items()
        }
    assert torch.equal(results["bert"].text_KD, results["sep"].text_KD)
    assert not (right["sep"] & ~right["bert"]).any()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("pdg", "unknown attack 'pdg'"),
        ("pgd:stepz=3", "no setting 'stepz'"),
        ("pgd:steps=x", "no whole number"),
        ("pgd:steps=0", "at least 1"),
        ("pgd:norm=l7", "linf, l2"),
        ("pgd:step=8", "8/255"),
        ("pgd:steps", "KEY=VALUE"),
        ("pgd:", "KEY=VALUE"),
        ("steps=3", "starts with a setting"),
        ("clean,,pgd", "empty name"),
        ("pgd,pgd", "twice"),
        ("bert:offset=left", "correct, reference"),
        ("fab-t:eta=inf", "not finite"),
        ("square:p_init=2", "share of the pixels"),
        ("feature:start=zero", "use start=random"),
        ("semantic:texts=a", "no setting 'texts'"),
        ("semantic:sets=17", "16 templates"),
        ("transfer", "needs the model to attack"),
        ("transfer:source=digits,attack=bert", "changes texts"),
        ("transfer:source=digits,attack=sep", "changes texts"),
        ("transfer:source=digits,attack=transfer", "in circles"),
        ("transfer:source=digits,attack=pdg", "unknown attack 'pdg'"),
        ("sga:scales=0.5+1.5", "1 among them"),
        ("sga:scales=1+x", "no number"),
        ("sga:scales=-1+1", "positive"),
        ("pgd:variant=im", "mi, di, si"),
        ("pgd-l2:norm=linf", "no setting 'norm'"),
        ("fgsm:steps=2", "no setting 'steps'"),
        ("autoattack:classes=2", "no setting 'classes'"),
    ],
)
def test_bad_attack_texts_are_explained(text, match):
    with pytest.raises(UserError, match=match):
        parse_attacks(text, {})


def test_settings_follow_their_attack():
    clean, pgd, bert = parse_attacks("clean,pgd:steps=100,step=1/255,bert:k=5", {"steps": 7})
    assert (pgd.label, pgd.steps, pgd.step, bert.k) == ("pgd-100", 100, 1 / 255, 5)
    assert clean.label == "clean"
    (moved,) = parse_attacks("transfer:steps=3,source=local-dir:/a/b.c:d,attack=feature", {"step": 2 / 255})
    assert (moved.source, moved.label) == ("local-dir:/a/b.c:d", "transfer_feature-3_from_b.c-d")
    assert (moved.inner.steps, moved.inner.step, moved.inner.stop) == (3, 2 / 255, "final")
    (sga,) = parse_attacks("sga:scales=0.5+1,noise=0.1,steps=3", {})
    assert (sga.label, sga.scales, sga.noise) == ("sga-3", (0.5, 1.0), 0.1)
