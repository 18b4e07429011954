"""FAB-T: its projections against a general solver, its distances against the closed form on a linear classifier."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from attacks.test_gradient import balanced, batch
from rayclip.attacks import Samples, make_attack
from rayclip.attacks.fab import towards_plane
from rayclip.rng import sample_keys
from rayclip.types import UserError


class Linear:
    """A classifier `W·x + b` in place of a victim."""

    def __init__(self, weights, bias):
        self.weights, self.bias = weights, bias

    def __call__(self, pixels, index=None):
        return pixels.flatten(1) @ self.weights.T + self.bias


def problems(n, size, seed):
    """Points (some at walls), normals (some zeros), and gaps from easy to beyond the box."""
    g = torch.Generator().manual_seed(seed)
    x = (1.4 * torch.rand(n, size, generator=g, dtype=torch.float64) - 0.2).clamp(0, 1)
    w = torch.randn(n, size, generator=g, dtype=torch.float64) * (torch.rand(n, size, generator=g) > 0.2)
    gap = 4 * torch.randn(n, generator=g, dtype=torch.float64) * torch.rand(n, generator=g).double()
    return x, w, gap


def reachable(x, w, gap):
    """How much of the gap the box lets one close: going to the best corner."""
    direction = -np.sign(gap) * np.sign(w)
    return float(np.abs(w) @ np.where(direction > 0, 1 - x, x))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_linf_projection_is_the_linear_programs_optimum(scale):
    x, w, gap = problems(60, 7, 1)
    moves = towards_plane(x, w * scale, gap * scale, "linf")
    inside = 0
    for xi, wi, gi, move in zip(x.numpy(), w.numpy(), gap.numpy(), moves.numpy(), strict=True):
        z = xi + move
        assert z.min() >= -1e-12 and z.max() <= 1 + 1e-12
        if reachable(xi, wi, gi) < abs(gi):
            continue
        inside += 1
        # variables: move (7), t; minimise t with |move_i| <= t
        n = len(xi)
        bounds = [(-a, 1 - a) for a in xi] + [(0, None)]
        ones = np.ones((n, 1))
        sides = np.block([[np.eye(n), -ones], [-np.eye(n), -ones]])
        best = linprog(
            np.r_[np.zeros(n), 1], A_ub=sides, b_ub=np.zeros(2 * n), A_eq=[np.r_[wi, 0]], b_eq=[-gi], bounds=bounds
        )
        assert best.status == 0
        assert abs(gi + wi @ move) < 1e-9
        assert abs(np.abs(move).max() - best.fun) < 1e-8
    assert 20 < inside < 60


def test_l2_projection_is_the_quadratic_programs_optimum():
    x, w, gap = problems(40, 6, 2)
    moves = towards_plane(x, w, gap, "l2")
    inside = 0
    for xi, wi, gi, move in zip(x.numpy(), w.numpy(), gap.numpy(), moves.numpy(), strict=True):
        z = xi + move
        assert z.min() >= -1e-12 and z.max() <= 1 + 1e-12
        if reachable(xi, wi, gi) < 1.01 * abs(gi):
            continue
        inside += 1
        assert abs(gi + wi @ move) < 1e-9
        best = minimize(
            lambda m: m @ m,
            np.zeros(len(xi)),
            jac=lambda m: 2 * m,
            bounds=[(-a, 1 - a) for a in xi],
            constraints={"type": "eq", "fun": lambda m, wi=wi, gi=gi: gi + wi @ m, "jac": lambda m, wi=wi: wi},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 300},
        )
        assert best.success
        assert abs(move @ move - best.fun) < 1e-6
    assert 15 < inside < 40


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_plane_outside_the_box_is_approached_as_far_as_the_box_goes(norm):
    x, w, _ = problems(30, 7, 3)
    moves = towards_plane(x, w, torch.full((30,), 100.0, dtype=torch.float64), norm)
    corner = torch.where(w > 0, 0.0, torch.where(w < 0, 1.0, x))
    assert torch.allclose(x + moves, corner, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("peak", "gap"), [(0.0, 1.0), (1.0, 0.0), (1e-38, 1e-38), (1e38, 1e38), (1e-30, 1e30)])
def test_projections_are_finite_at_the_ends_of_float32(norm, peak, gap):
    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    w = peak * torch.linspace(-1, 1, 48).view(1, 3, 4, 4).expand(3, -1, -1, -1)
    moves = towards_plane(x, w, torch.full((3,), gap), norm)
    assert moves.isfinite().all() and moves.dtype == torch.float32
    assert (x + moves).min() >= -1e-6 and (x + moves).max() <= 1 + 1e-6
    if not peak or not gap:
        assert not moves.any()


def linear_problem(norm, n=12, classes=4):
    """Images, labels, a linear classifier and each image's distance to its nearest boundary, in float64.

    Small biases put all images near the boundaries, so that the box plays no part.
    """
    g = torch.Generator().manual_seed(5)
    weights = torch.randn(classes, 27, generator=g, dtype=torch.float64)
    images = 0.3 + 0.4 * torch.rand(n, 3, 3, 3, generator=g, dtype=torch.float64)
    bias = -(weights @ images.flatten(1).mean(0))
    victim = Linear(weights, bias)
    logits = victim(images)
    labels = logits.argmax(1)
    distances = []
    for z, y in zip(logits, labels, strict=True):
        others = [t for t in range(classes) if t != y]
        dual = (
            (weights[y] - weights[others]).abs().sum(1)
            if norm == "linf"
            else (weights[y] - weights[others]).norm(dim=1)
        )
        distances.append(float(((z[y] - z[others]) / dual).min()))
    return victim, images, labels, torch.tensor(distances, dtype=torch.float64)


def lengths(delta, norm):
    return delta.flatten(1).norm(dim=1) if norm == "l2" else delta.flatten(1).abs().amax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_classifier_the_distance_is_the_closed_form(norm):
    victim, images, labels, distances = linear_problem(norm)
    attack = make_attack("fab-t", norm=norm, iterations=10, stop="final")
    samples = Samples(images, labels, sample_keys(range(len(images)), "t"))
    result = attack.run(victim, samples, eps=0.99)
    found = lengths(result.images_BCHW - images, norm)
    assert (victim(result.images_BCHW).argmax(1) != labels).all()
    assert (found >= distances - 1e-12).all() and (found <= 1.01 * distances).all()
    # what lies in the ball counts, and nothing else
    eps = float(distances.median()) * 1.02
    for stop in ("final", "first_success"):
        attack = make_attack("fab-t", norm=norm, iterations=10, stop=stop)
        broken = (attack.run(victim, samples, eps=eps).images_BCHW != images).flatten(1).any(1)
        assert torch.equal(broken, distances < eps)
        assert 0 < broken.sum() < len(broken)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_follow_the_formula(norm):
    """Several steps towards one target, written out with the projections in closed form (no wall is met)."""
    victim, images, labels, _ = linear_problem(norm)
    attack = make_attack("fab-t", norm=norm)
    for x, y in zip(images.flatten(1), labels.tolist(), strict=True):
        z = victim(x.view(1, 3, 3, 3))[0]
        t = max((c for c in range(4) if c != y), key=lambda c: float(z[c]))
        w = victim.weights[t] - victim.weights[y]
        b = victim.bias[t] - victim.bias[y]

        def to_plane(p, w=w, b=b):
            return -(w @ p + b) * (w / (w @ w) if norm == "l2" else w.sign() / w.abs().sum())

        def size(v):
            return v.norm() if norm == "l2" else v.abs().max()

        plain, ours = x, x.view(1, 3, 3, 3)
        for _ in range(3):
            move, move_0 = to_plane(plain), to_plane(x)
            alpha = min(float(size(move) / (size(move) + size(move_0))), 0.1)
            plain = (1 - alpha) * (plain + 1.05 * move) + alpha * (x + 1.05 * move_0)
            gap = victim(ours)[:, t] - victim(ours)[:, y]
            ours = attack._step(x.view(1, 3, 3, 3), ours, gap, w.view(1, 3, 3, 3))
            assert plain.min() > 0 and plain.max() < 1
            assert (ours.flatten() - plain).abs().max() < 1e-12
            plain, ours = x + 0.9 * (plain - x), x.view(1, 3, 3, 3) + 0.9 * (ours - x.view(1, 3, 3, 3))


def test_no_more_targets_than_wrong_classes():
    victim, images, labels, _ = linear_problem("linf", classes=2)
    result = make_attack("fab-t", iterations=3, stop="final").run(
        victim, Samples(images, labels, sample_keys(range(12), "t")), eps=0.99
    )
    assert (result.queries_B == 1 + 2 * 3 + 2 + 3).all()


def test_images_that_are_wrong_leave_at_once_even_if_all_are_to_be_attacked():
    victim, images, labels, _ = linear_problem("linf")
    result = make_attack("fab-t").run(victim, Samples(images, (labels + 1) % 4, sample_keys(range(12), "t")), eps=0.99)
    assert torch.equal(result.images_BCHW, images) and (result.queries_B == 1).all() and not result.steps_B.any()


@pytest.mark.parametrize("settings", [{"alpha_max": 1.5}, {"eta": 0.9}, {"beta": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="alpha_max"):
        make_attack("fab-t", **settings)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_in_float64_the_batch_does_not_matter(norm):
    victim = balanced(torch.float64)
    images, labels, _, keys = batch(victim, n=12)
    attack = make_attack("fab-t", norm=norm, iterations=15, targets=3)
    eps = 0.012 if norm == "linf" else 0.1
    whole = attack.run(victim, Samples(images, labels, keys), eps=eps)
    cut = [slice(0, 1), slice(1, 6), slice(6, 12)]
    parts = [attack.run(victim, Samples(images[c], labels[c], keys[c]), eps=eps) for c in cut]
    assert torch.equal(whole.queries_B, torch.cat([p.queries_B for p in parts]))
    assert torch.allclose(whole.images_BCHW, torch.cat([p.images_BCHW for p in parts]), atol=1e-9)
    broken = (whole.images_BCHW != images).flatten(1).any(1)
    assert 0 < broken.sum() < 12
    with torch.no_grad():
        assert torch.equal(victim(whole.images_BCHW).argmax(1) != labels, broken)
