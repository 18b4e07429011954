"""Square: its schedule and proposals against the paper's formulas; models that give scores and nothing else."""

import math

import pytest
import torch

import naive
from attacks.test_gradient import CLASSES, balanced, batch
from rayclip.attacks import Samples, make_attack
from rayclip.attacks.square import _propose_l2, _propose_linf, pattern
from rayclip.models import ZeroShot
from rayclip.rng import sample_keys
from rayclip.types import UserError


@pytest.mark.parametrize("queries", [10000, 5000, 1000])
def test_the_published_schedule(queries):
    attack = make_attack("square", queries=queries)
    for query in range(0, queries, 7):
        share = 0.8
        for halving in (10, 50, 200, 1000, 2000, 4000, 6000, 8000):
            if query >= halving * queries / 10000:
                share /= 2
        assert attack.side(query, 224, 224) == round(math.sqrt(share * 224 * 224))
    assert attack.side(queries - 1, 4, 4) == 1, "never less than a pixel"
    assert make_attack("square", p_init=1.0).side(0, 10, 40) == 10, "never more than the shorter side"


@pytest.mark.parametrize("queries", [5000, 300])
def test_the_schedule_of_the_official_code(queries):
    """Halved once more, after 500 proposals, and at the same proposals however many there are."""
    attack = make_attack("square", queries=queries, schedule="official")
    for proposal in range(queries - 1):
        share = 0.8
        for halving in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
            if proposal > halving:
                share /= 2
        assert attack.side(1 + proposal, 224, 224) == round(math.sqrt(share * 224 * 224))


@pytest.mark.parametrize("side", range(1, 12))
def test_the_pattern_is_equation_2(side):
    def bump(r, s, h1, h2):  # 1-based
        n = h1 // 2
        m = n - max(abs(r - n - 1), abs(s - h2 // 2 - 1))
        return sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))

    left = side // 2
    for r in range(1, side + 1):
        for s in range(1, side + 1):
            plain = bump(r, s, side, left) if s <= left else -bump(r, s - left, side, side - left)
            assert abs(float(pattern(side)[r - 1, s - 1]) - plain) < 1e-12


def proposal(n=6, size=9):
    g = torch.Generator().manual_seed(0)
    clean = torch.rand(n, 3, size, size, generator=g, dtype=torch.float64)
    return clean, torch.rand(n, 8, generator=g, dtype=torch.float64)


def test_a_linf_proposal_is_the_formula():
    clean, draws = proposal()
    eps, side = 0.1, 4
    best = make_attack("square")._initial(clean, sample_keys(range(6), "t"), eps)
    ours = _propose_linf(clean, best, draws[:, :5], side, eps)
    for b in range(6):
        plain = best[b].clone()
        r, s = int(draws[b, 0] * 6), int(draws[b, 1] * 6)
        for c in range(3):
            rho = -2 * eps if draws[b, 2 + c] < 0.5 else 2 * eps
            for i in range(r, r + side):
                for j in range(s, s + side):
                    x = float(clean[b, c, i, j])
                    plain[c, i, j] = min(max(float(best[b, c, i, j]) + rho, x - eps, 0), x + eps, 1)
        assert (ours[b] - plain).abs().max() < 1e-12


def test_an_l2_proposal_is_algorithm_3():
    clean, draws = proposal()
    eps, side, size = 0.8, 4, 9
    best = make_attack("square", norm="l2")._initial(clean, sample_keys(range(6), "t"), eps)
    for _ in range(3):
        ours = _propose_l2(clean, best, draws, side, eps)
        for b in range(6):
            nu = (best[b] - clean[b]).clone()
            r1, s1, r2, s2 = (int(draws[b, k] * (size - side + 1)) for k in range(4))
            first, second = torch.zeros(size, size, dtype=torch.bool), torch.zeros(size, size, dtype=torch.bool)
            first[r1 : r1 + side, s1 : s1 + side] = True
            second[r2 : r2 + side, s2 : s2 + side] = True
            eta = pattern(side).T if draws[b, 4] < 0.5 else pattern(side)
            unused = eps**2 - nu.pow(2).sum()
            for c in range(3):
                rho = -1 if draws[b, 5 + c] < 0.5 else 1
                budget = (nu[c][first | second].pow(2).sum() + unused / 3).sqrt()
                old = nu[c][first].view(side, side)
                fresh = rho * eta / eta.norm() + old / old.norm()
                nu[c][second] = 0
                nu[c][first] = (fresh / fresh.norm() * budget).flatten()
            assert abs(nu.norm() - eps) < 1e-9, "the whole budget is spent"
            assert (ours[b] - (clean[b] + nu).clamp(0, 1)).abs().max() < 1e-9
        best, draws = ours, draws.roll(1, dims=1)


def test_the_starts():
    clean, _ = proposal(size=11)
    keys = sample_keys(range(6), "t")
    stripes = make_attack("square")._initial(0.2 + 0.6 * clean, keys, 0.1) - (0.2 + 0.6 * clean)
    assert (stripes.std(dim=2) < 1e-12).all() and torch.allclose(stripes.abs(), torch.full_like(clean, 0.1))
    assert torch.equal(stripes[2, :, :1].sign(), 1 - 2 * (naive.uniforms(int(keys[2]), (3, 1, 11)) < 0.5).double())
    tiles = make_attack("square", norm="l2")._initial(0.2 + 0.6 * clean, keys, 0.1) - (0.2 + 0.6 * clean)
    assert torch.allclose(tiles.flatten(1).norm(dim=1), torch.full((6,), 0.1, dtype=torch.float64))
    first, second = tiles[:, :, :2, :2], tiles[:, :, 2:4, 4:6]
    assert torch.allclose(first.abs(), second.abs()), "the same pattern in every tile, up to its sign"


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("scores only")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_model_that_gives_scores_only(norm):
    whole = balanced()

    class ScoresOnly(ZeroShot):
        def embed(self, pixels, index=None, *, normalize=True):
            assert not torch.is_grad_enabled()
            return NoBackward.apply(super().embed(pixels, index, normalize=normalize))

    victim = ScoresOnly(whole.clip, CLASSES)
    victim.text_KD = whole.text_KD
    images, labels, todo, keys = batch(whole)
    attack = make_attack("square", norm=norm, queries=100)
    eps = 16 / 255 if norm == "linf" else 1.0
    result = attack.run(victim, Samples(images, labels, keys, todo), eps=eps)
    with torch.no_grad():
        right = whole(result.images_BCHW).argmax(1) == labels
    assert 0 < right.sum() < len(labels)
    assert (result.queries_B[right] == 100).all() and (result.queries_B[~right] <= 100).all()
    assert not result.steps_B.any()


def test_the_margin_never_rises():
    """More queries never leave an image safer; what 10 queries break, 100 of the same schedule's start break."""
    victim = balanced()
    images, labels, todo, keys = batch(victim)
    margins = []
    for block in range(3):
        seen = []

        class Watching(ZeroShot):
            def embed(self, pixels, index=None, *, normalize=True, seen=seen):
                seen.append(len(pixels))
                return super().embed(pixels, index, normalize=normalize)

        watching = Watching(victim.clip, CLASSES)
        watching.text_KD = victim.text_KD
        attack = make_attack("square", queries=[1, 65, 130][block])
        result = attack.run(watching, Samples(images, labels, keys, todo), eps=4 / 255)
        assert sum(seen) == result.queries_B.sum() and seen == sorted(seen, reverse=True)
        with torch.no_grad():
            logits = victim(result.images_BCHW)
        own = logits.gather(1, labels[:, None])[:, 0]
        margins.append((own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)).clamp_min(0))
    assert (margins[1] <= margins[0] + 1e-4).all(), "the first query is the same stripes"
    assert margins[2].mean() < margins[0].mean()


@pytest.mark.parametrize("p_init", [0.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(p_init):
    with pytest.raises(UserError, match="share"):
        make_attack("square", p_init=p_init)
