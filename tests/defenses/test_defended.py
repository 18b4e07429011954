"""Attacks on a defended classifier: what they see, what they draw, and that the batch has no say."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from attacks.test_gradient import SETTINGS, balanced, batch, build
from rayclip import rng
from rayclip.attacks import Samples, make_attack
from rayclip.defenses import DEFENSES, Aim, Defended, Defense, Purifier, fitting, is_random, parse_aims, parse_defenses
from rayclip.defenses.defended import chain_label, describe_chain
from rayclip.models.zeroshot import merge_views
from rayclip.rng import sample_keys
from rayclip.types import UserError

EPS = 8 / 255
THROUGH = [
    ("straight", "rn", 1),
    ("straight", "tte", 1),
    ("bpda", "ttc", 2),
    ("straight", "ttc", 1),
    ("bpda", "rn+tte", 3),
    ("bpda", "hedge:steps=2", 1),
]


@pytest.fixture(scope="module")
def victim():
    return balanced(torch.float64)


def aimed(victim, chain, keys, gradient="bpda", draws=1):
    return Defended(victim, parse_defenses(chain)[0], keys, Aim(gradient=gradient, draws=draws))


@pytest.mark.parametrize(
    ("settings", "chain"),
    [(s, ("rn", "tte")[i % 2]) for i, s in enumerate(s for s in SETTINGS if s["name"] != "transfer")],
    ids=str,
)
def test_attacks_through_a_defence_do_not_depend_on_the_batch(victim, settings, chain):
    attack, (images, labels, todo, keys) = build(settings), batch(victim)
    prompts = attack.prepare(victim)

    def run(rows):
        target = aimed(victim, chain, keys[rows], draws=2)
        samples = Samples(images[rows], labels[rows], keys[rows], todo[rows])
        return attack.run(target, samples, eps=EPS, prompts=prompts)

    whole = run(slice(None))
    parts = [run(slice(0, 7)), run(slice(7, None))]
    together, apart = whole.images_BCHW, torch.cat([p.images_BCHW for p in parts])
    assert torch.allclose(together, apart, rtol=0, atol=1e-9)
    assert torch.equal(whole.queries_B, torch.cat([p.queries_B for p in parts]))
    assert (together - images).abs().amax() <= EPS + 1e-9 or getattr(attack, "norm", "linf") == "l2"


@pytest.mark.parametrize("gradient, chain, draws", THROUGH)
def test_attacks_through_a_defence_raise_the_defended_loss(victim, gradient, chain, draws):
    images, labels, todo, keys = batch(victim)
    attack = make_attack("pgd", steps=5, step=2 / 255, stop="final")
    result = attack.run(aimed(victim, chain, keys, gradient, draws), Samples(images, labels, keys, todo), eps=EPS)
    judge = Defended(victim, parse_defenses(chain)[0], keys)
    with torch.no_grad():
        before, after = (F.cross_entropy(judge(x), labels) for x in (images, result.images_BCHW))
    assert after > before


class Wall(Purifier):
    """Rounds to 16 levels: its derivative is zero."""

    name = "wall"

    def purify(self, victim, pixels_BCHW, keys_B):
        return (pixels_BCHW * 15).round() / 15


def test_bpda_is_the_identity_on_the_way_back_and_straight_is_the_truth(victim):
    images, labels, _, keys = batch(victim)
    rounded = (images * 15).round() / 15

    def gradient(classifier, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(classifier(x), labels, reduction="sum"), x)[0]

    through = {g: gradient(Defended(victim, (Wall(),), keys, Aim(gradient=g)), images) for g in ("straight", "bpda")}
    assert torch.equal(through["straight"], torch.zeros_like(images))
    assert torch.allclose(through["bpda"], gradient(victim, rounded), rtol=1e-9, atol=1e-12)


def test_draws_are_averaged_as_probabilities(victim):
    """Of three draws the mean softmax; its gradient is that of the mean."""
    images, labels, _, keys = batch(victim, n=4)
    noise = DEFENSES["rn"](eps=0.2)
    drawn = []

    class Watched(type(noise)):
        def purify(self, victim, pixels_BCHW, keys_B):
            drawn.append(keys_B)
            return super().purify(victim, pixels_BCHW, keys_B)

    target = Defended(victim, (Watched(eps=0.2),), keys, Aim(gradient="straight", draws=3))
    x = images.clone().requires_grad_()
    found = target(x)
    (slope,) = torch.autograd.grad(found.gather(1, labels[:, None]).sum(), x)
    for i in range(4):
        own = drawn[0][3 * i : 3 * i + 3]
        assert len(set(own.tolist())) == 3
        y = images[i].clone().requires_grad_()
        each = torch.stack([noise.purify(victim, y[None], k[None])[0] for k in own])
        mean = victim(each).softmax(1).mean(0)
        assert torch.allclose(found[i].exp(), mean, rtol=1e-9)
        (wanted,) = torch.autograd.grad(mean[labels[i]].log(), y)
        assert torch.allclose(slope[i], wanted, rtol=1e-6, atol=1e-9)


def test_every_query_draws_anew_and_the_judge_never(victim):
    images, _, _, keys = batch(victim)
    chain = parse_defenses("rn:eps=32/255")[0]
    target, judge = Defended(victim, chain, keys, Aim(gradient="bpda")), Defended(victim, chain, keys)
    with torch.no_grad():
        first, second, verdict, again = target(images), target(images), judge(images), judge(images)
    assert torch.equal(verdict, again)
    assert not torch.allclose(first, second) and not torch.allclose(first, verdict)
    rows = torch.tensor([5, 2])
    with torch.no_grad():
        assert torch.allclose(judge(images[rows], rows), verdict[rows], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="index"):
        judge(images[rows])


def test_attacks_through_a_defence_that_draws_take_every_step(victim):
    """They never know what a former image would bring; without the defence the same attack is over sooner."""
    images, labels, _, keys = batch(victim, 6)
    attack = build({"name": "pgd", "steps": 33, "step": 2 / 255, "stop": "final"})
    samples, targets = Samples(images, labels, keys), (victim, aimed(victim, "rn", keys))
    spent = [attack.run(target, samples, eps=2 / 255).queries_B for target in targets]
    assert (spent[0] < 33).any() and (spent[1] == 33).all()


def test_a_chain_passes_images_on(victim):
    images, _, _, keys = batch(victim, n=5)
    with torch.no_grad():
        walled = Defended(victim, (Wall(), DEFENSES["tte"]()), keys)(images)
        alone = Defended(victim, (DEFENSES["tte"](),), keys)((images * 15).round() / 15)
        views = Defended(victim, (DEFENSES["tte"](), DEFENSES["rn"]()), keys).embed(images)
    assert torch.allclose(walled, alone, rtol=1e-9)
    assert views.shape[:2] == (5, 10)
    assert (views[:, 0] - views[:, 1]).abs().max() > 0


def test_chains_as_they_are_written():
    chains = parse_defenses("none, ttc:eps=2/255,steps=3+tte,rn+ttc:tau=0.1,beta=1")
    assert [chain_label(c) for c in chains] == ["none", "ttc:eps=2/255,steps=3+tte", "rn+ttc:tau=0.1,beta=1.0"]
    assert [is_random(c) for c in chains] == [False, True, True] and not is_random(parse_defenses("tte")[0])
    assert parse_defenses(chain_label(chains[1])) == [chains[1]]
    assert "original victim" in describe_chain(chains[1]) and "steps 3" in describe_chain(chains[1])
    assert describe_chain(parse_defenses("anti-adversary:preset=ttc")[0]) == (
        "anti-adversary (eps 4/255, steps 2, step 38.25/255)"
    )
    assert [a.label for a in parse_aims("ignore,straight,bpda,bpda", 4)] == ["", "_straight", "_bpda"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("magic", "unknown defence 'magic'"),
        ("ttc:colour=red", "no setting 'colour'"),
        ("ttc:eps=4", "write 4/255"),
        ("ttc:steps=0", "at least 1"),
        ("tte:crop=2", "share of the image's side"),
        ("rn,rn", "twice"),
        ("rn+", "empty name"),
        ("anti-adversary:preset=mine", "use one of paper, ttc"),
        ("rn+none", "unknown defence 'none'"),
        ("", "empty name"),
    ],
)
def test_wrong_chains_are_one_sentence(text, said):
    with pytest.raises(UserError, match=said) as caught:
        parse_defenses(text)
    assert "\n" not in str(caught.value)


def test_wrong_aims_are_one_sentence():
    with pytest.raises(UserError, match="bpda"):
        parse_aims("ignore,sideways", 1)


def test_keys_of_samples_alone_decide(victim):
    images, _, _, _ = batch(victim, n=3)
    chain = parse_defenses("rn")[0]
    with torch.no_grad():
        one, other = (Defended(victim, chain, sample_keys(range(3), seed))(images) for seed in (0, 1))
    assert not torch.allclose(one, other)


@dataclass(frozen=True, kw_only=True)
class Everything(Defense):
    """Uses each hook: two views, noisy embeddings, class weights of each sample, a vote, and bounded logits."""

    name = "everything"
    random = True

    def views(self, victim, pixels_BCHW, keys_B):
        return torch.stack([pixels_BCHW, pixels_BCHW.flip(-1)], 1)

    def embeddings(self, victim, image_BVD, keys_B):
        return F.normalize(
            image_BVD + 0.1 * rng.gaussian(keys_B, (1, image_BVD.shape[2]), dtype=image_BVD.dtype), dim=-1
        )

    def class_weights(self, victim, image_BVD, text_KD):
        return F.normalize(text_KD + 0.3 * image_BVD.detach().mean(1, keepdim=True), dim=-1)

    def ensemble(self, victim, logits_BVK, image_BVD):
        return 0.7 * logits_BVK[:, 0] + 0.3 * logits_BVK[:, 1]

    def logits(self, logits_BK):
        return logits_BK.tanh()


HOOKS = {"all": Everything(), "rn": DEFENSES["rn"](eps=0.1), "tte": DEFENSES["tte"]()}


def by_hand(victim, chain, image, keys):
    """One image behind `all` or `rn+all`, the mean of its draws' probabilities."""
    scale, probabilities = victim.clip.scale, []
    for key in keys:
        place = len(chain) - 1
        moved = HOOKS["rn"].purify(victim, image[None], rng.subkeys(key[None], "rn 0 0"))[0] if place else image
        noise = rng.gaussian(rng.subkeys(key[None], f"everything {place} 0"), (16,), dtype=image.dtype)[0]
        views = [victim.embed(view[None])[0] for view in (moved, moved.flip(-1))]
        f = [F.normalize(view + 0.1 * noise, dim=0) for view in views]
        texts = [F.normalize(text + 0.3 * (f[0] + f[1]) / 2, dim=0) for text in victim.text_KD]
        scores = [torch.stack([scale * view @ text for text in texts]) for view in f]
        probabilities.append((0.7 * scores[0] + 0.3 * scores[1]).tanh().softmax(0))
    return (sum(probabilities) / len(probabilities)).log()


@pytest.mark.parametrize("chain", ["all", "rn+all", "all+tte", "all+all"])
def test_all_hooks_work_alone_and_in_chains(victim, chain):
    images, _, _, keys = batch(victim, n=4)
    links, aim = chain.split("+"), Aim(gradient="straight", draws=2)
    defenses, rows = tuple(HOOKS[link] for link in links), torch.tensor([2, 0])
    with torch.no_grad():
        drawn = rng.Draws(keys, attacked=True, count=2).of(None, 4)
        attacked = Defended(victim, defenses, keys, aim)(images)
        fewer = Defended(victim, defenses, keys[rows], aim)(images[rows])
        judged = Defended(victim, defenses, keys)(images)
        alone = torch.cat([Defended(victim, defenses, keys[i : i + 1])(images[i : i + 1]) for i in range(4)])
        if links[-1] == "all" and len(set(links)) == len(links):
            wanted = torch.stack([by_hand(victim, links, *each) for each in zip(images, drawn, strict=True)])
            assert torch.allclose(attacked, wanted, rtol=0, atol=1e-9)
    assert torch.allclose(attacked[rows], fewer, rtol=0, atol=1e-9) and torch.allclose(judged, alone, rtol=0, atol=1e-9)


def test_bpda_stands_in_for_each_hook(victim):
    """On the way back embeddings are those of the image, and the vote is the mean of the views."""

    @dataclass(frozen=True, kw_only=True)
    class Broken(Everything):
        def embeddings(self, victim, image_BVD, keys_B):
            return (super().embeddings(victim, image_BVD, keys_B) * 8).round() / 8

        def class_weights(self, victim, image_BVD, text_KD):
            return text_KD

        def ensemble(self, victim, logits_BVK, image_BVD):
            return super().ensemble(victim, logits_BVK, image_BVD).round()

        def logits(self, logits_BK):
            return logits_BK.round()

    images, _, _, keys = batch(victim, n=4)
    x, plain = images.clone().requires_grad_(), images.clone().requires_grad_()
    bpda = Defended(victim, (Broken(),), keys, Aim(gradient="bpda"))(x)
    straight = Defended(victim, (Broken(),), keys, Aim(gradient="straight"))(images.clone().requires_grad_())
    assert torch.equal(bpda, straight), "the way there is the same"
    coefficients = torch.rand(bpda.shape, dtype=bpda.dtype)
    (found,) = torch.autograd.grad((coefficients * bpda).sum(), x)
    keys_ = rng.subkeys(rng.Draws(keys, attacked=True).of(None, 4)[:, 0], "everything 0 0")
    there = Broken().views(victim, images, keys_)
    f = [victim.embed(plain + (view - images)) for view in there.unbind(1)]
    moved = Broken().embeddings(victim, torch.stack(f, 1).detach(), keys_)
    f = [own + (to - own).detach() for own, to in zip(f, moved.unbind(1), strict=True)]
    mean = merge_views(victim.clip.scale * torch.stack(f, 1) @ victim.text_KD.T)
    (wanted,) = torch.autograd.grad((coefficients * mean).sum(), plain)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, settings", [("ttc", {"tau": 0.05}), ("csr", {"radius": 0.1, "threshold": 0.97}), ("doc", {"tau": 0.01})]
)
def test_attacks_at_the_gate_see_the_same_image_and_the_gates_gradient(victim, name, settings):
    images, _, _, keys = batch(victim, n=6)
    images = images.clamp(0.02, 0.98)  # nothing is clipped to the range, where the gradient has no say
    defense, keys = DEFENSES[name](**settings), rng.subkeys(keys, "gate")
    x = images.clone().requires_grad_()
    relaxed = defense.relaxed()
    found = relaxed.purify(victim, x, keys)
    assert torch.equal(found, defense.purify(victim, images, keys)) and relaxed.label == defense.label
    kept, purified, _ = defense.candidates(victim, images, keys)
    coefficients = (purified - kept).sign()
    (gradient,) = torch.autograd.grad((coefficients * found).sum(), x)
    slope, step = torch.rand(images.shape, dtype=images.dtype), 1e-5

    def value(pixels):
        """The soft gate with both outcomes held."""
        margin = relaxed.candidates(victim, pixels, keys).margin_B
        share = (20 * margin).sigmoid()[:, None, None, None]
        return float((coefficients * share * (purified - kept)).sum())

    wanted = (value(images + step * slope) - value(images - step * slope)) / (2 * step)
    assert float((gradient * slope).sum()) == pytest.approx(wanted, rel=1e-4) and abs(wanted) > 1e-7
    through = Defended(victim, (defense,), keys, Aim(gradient="gate"))
    y = images.clone().requires_grad_()
    (both,) = torch.autograd.grad((through(y) * torch.rand(6, 5, dtype=y.dtype)).sum(), y)
    assert both.isfinite().all() and both.abs().sum() > 0
    assert [fitting(Aim(gradient="gate", draws=3), chain).label for chain in ((defense,), (HOOKS["tte"],))] == [
        "_gate",
        "_bpda",
    ]
