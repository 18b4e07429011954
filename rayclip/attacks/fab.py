"""FAB-T: finds the smallest perturbation that changes the prediction, by projecting onto linearised decision
boundaries.

Croce & Hein 2020, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", in the targeted form
that AutoAttack uses (Croce & Hein 2020, "Reliable evaluation of adversarial robustness ...").

Shapes: B batch, A samples of it that are being attacked, C H W image, N = C·H·W, K classes, T targets.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from rayclip.attacks.base import Adversarial, Attack, Norm, Prompts, Samples, Stop
from rayclip.attacks.geometry import margin, per_image, sizes
from rayclip.models import ZeroShot
from rayclip.types import UserError

# Most steps of a projection: on images it takes 3 to 7, in l_2 more where less than a thousandth of the box is left
_NEWTON = {"linf": 12, "l2": 20}


@dataclass(frozen=True, kw_only=True)
class FABT(Attack):
    """FAB-T: a search for the nearest misclassified image; it counts if it lies in the eps ball, else the image stays
    unchanged.

    For each of the most likely wrong classes t, from the clean image x, with the boundary f_t = f_y linearised at x_i:
    `x' = (1 − α)·(x_i + η·δ_i) + α·(x + η·δ_0)`, where δ_i and δ_0 lead from x_i and from x to their nearest points on
    the boundary inside [0, 1], and `α = min(‖δ_i‖ / (‖δ_i‖ + ‖δ_0‖), α_max)`. If x' is misclassified, it is kept if it
    is the nearest to x so far, and the next iteration starts at `(1 − β)·x + β·x'`. At the end, `SEARCH` steps of the
    false position method search the segment from x to the best image for a margin of −`SLACK`.

    Iterates towards distant targets amplify rounding: if a sample's nearest adversarial image is about eps away, its
    verdict may depend on rounding within the batch. This concerns few samples, and none in float64.

    Attributes:
        iterations: per target.
        targets: number of wrong classes to try, the most likely at x first; at most K − 1 of them.
        alpha_max: largest weight of the step from x.
        eta: overshoot, in [1, inf).
        beta: how far towards a misclassified x' the next iteration starts, in (0, 1].
        norm: of the distance, in pixel units.
        stop: `first_success` (a sample leaves at its first adversarial image inside the ball) or `final` (the search
            for the nearest one goes on to the end).
    """

    name: ClassVar[str] = "fab-t"
    SEARCH: ClassVar[int] = 3
    SLACK: ClassVar[float] = 1e-3  # in logits: exactly on the boundary, rounding within the batch would decide

    iterations: int = 100
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    norm: Norm = "linf"
    stop: Stop = "first_success"

    def __post_init__(self) -> None:
        if not (0 <= self.alpha_max <= 1 and self.eta >= 1 and 0 < self.beta <= 1):
            raise UserError("fab-t wants alpha_max in [0, 1], eta of 1 or more and beta in (0, 1].")

    @property
    def label(self) -> str:
        return f"{self.name}-{self.iterations}" + ("" if self.norm == "linf" else f"_{self.norm}")

    @property
    def cost(self) -> int:
        return 3 * self.iterations * self.targets

    def to_last_step(self) -> Self:
        return replace(self, stop="final")

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        images, labels, _, todo = samples
        nearest = images.clone()
        everyone = torch.arange(len(images), device=images.device)
        steps_B, queries_B = torch.zeros_like(everyone), torch.zeros_like(everyone)
        distance_B = torch.full((len(images),), torch.inf, dtype=images.dtype, device=images.device)
        active = everyone if todo is None else todo.nonzero().squeeze(1)
        if not len(active):
            return Adversarial(images, None, steps_B, queries_B)
        with torch.no_grad():
            logits = victim(images[active], active)
        queries_B[active] += 1
        right = (logits.argmax(1) == labels[active]).nonzero().squeeze(1)
        active, logits = active[right], logits[right]
        wrong_only = logits.scatter(1, labels[active][:, None], -torch.inf)
        targets_AT = wrong_only.topk(min(self.targets, logits.shape[1] - 1)).indices
        attacked = active

        for turn in range(targets_AT.shape[1]):
            clean, label, target = images[active], labels[active], targets_AT[:, turn]
            point = clean
            for done in range(turn * self.iterations, (turn + 1) * self.iterations):
                if not len(active):
                    break
                point = self._step(clean, point, *_linearise(victim, point, active, label, target))
                with torch.no_grad():
                    broken = victim(point, active).argmax(1) != label
                queries_B[active] += 2
                size, before = sizes(point - clean, self.norm), distance_B[active]
                better = broken & (size < before)
                nearest[active] = torch.where(per_image(better), point, nearest[active])
                distance = torch.where(better, size, before)
                distance_B[active] = distance
                steps_B[active] = torch.where((before <= eps) & ~better, steps_B[active], done + 1)
                point = torch.where(per_image(broken), clean + self.beta * (point - clean), point)
                if self.stop == "first_success":
                    kept = (distance > eps).nonzero().squeeze(1)  # the only wait for the device in a step
                    if len(kept) < len(active):
                        clean, label, target, point = (x[kept] for x in (clean, label, target, point))
                        active, targets_AT = active[kept], targets_AT[kept]

        far = distance_B[attacked].isfinite()
        if self.stop == "first_success":
            far &= distance_B[attacked] > eps
        found = attacked[far]
        self._search(victim, images, labels, found, nearest, distance_B)
        queries_B[found] += 2 + self.SEARCH
        inside = distance_B <= eps
        return Adversarial(torch.where(per_image(inside), nearest, images), None, steps_B, queries_B)

    def _step(self, clean: Tensor, point: Tensor, gap_A: Tensor, normal: Tensor) -> Tensor:
        """Return x_{i+1} for x_i; `gap_A` and `normal` are f_t − f_y and its gradient at x_i."""
        gap_clean_A = gap_A + (normal * (clean - point)).flatten(1).sum(1)
        move = towards_plane(point, normal, gap_A, self.norm)
        move_clean = towards_plane(clean, normal, gap_clean_A, self.norm)
        size, size_clean = sizes(move, self.norm), sizes(move_clean, self.norm)
        alpha = (size / (size + size_clean).clamp_min(torch.finfo(size.dtype).tiny)).clamp(max=self.alpha_max)
        alpha = per_image(alpha)
        return ((1 - alpha) * (point + self.eta * move) + alpha * (clean + self.eta * move_clean)).clamp(0, 1)

    @torch.no_grad()
    def _search(
        self, victim: ZeroShot, images: Tensor, labels: Tensor, found: Tensor, nearest: Tensor, distance_B: Tensor
    ) -> None:
        """Move each adversarial image closer to the boundary, along the straight line to its clean image; in place."""
        if not len(found):
            return
        clean, label = images[found], labels[found]
        inner, outer = clean, nearest[found]
        margin_in, margin_out = (margin(victim(x, found), label) + self.SLACK for x in (inner, outer))
        for _ in range(self.SEARCH):
            share = (margin_out / (margin_out - margin_in)).nan_to_num(0).clamp(0, 1)
            middle = outer + per_image(share) * (inner - outer)
            margin_middle = margin(victim(middle, found), label) + self.SLACK
            broken = margin_middle <= 0
            outer, margin_out = torch.where(per_image(broken), middle, outer), margin_middle.where(broken, margin_out)
            inner, margin_in = torch.where(per_image(broken), inner, middle), margin_in.where(broken, margin_middle)
        size = sizes(outer - clean, self.norm)
        better = size < distance_B[found]
        nearest[found] = torch.where(per_image(better), outer, nearest[found])
        distance_B[found] = torch.where(better, size, distance_B[found])


def _linearise(victim: ZeroShot, point: Tensor, index: Tensor, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return f_t − f_y at each point, `(A,)`, and its gradient, `(A, C, H, W)`."""
    with torch.enable_grad():
        pixels = point.detach().requires_grad_()
        logits = victim(pixels, index)
        gap_A = (logits.gather(1, target[:, None]) - logits.gather(1, label[:, None])).squeeze(1)
        (normal,) = torch.autograd.grad(gap_A.sum(), pixels)
    return gap_A.detach(), normal


@torch.no_grad()
def towards_plane(points: Tensor, normals: Tensor, gaps_A: Tensor, norm: Norm) -> Tensor:
    """Return the smallest move of each point x onto the plane `gap + <normal, z − x> = 0` that stays in [0, 1].

    Every coordinate moves in the direction that closes the gap until it reaches the edge of [0, 1]: at the same speed
    in l_inf, at speed |normal| in l_2. The gap closed after a time τ, `Σ |w|·min(speed·τ, room)`, is concave and
    piecewise linear with a bend where a coordinate reaches its edge, so that Newton's method rises to the τ that closes
    the gap, and ends there exactly. If the box ends before the plane, the move goes to the corner of the box that is
    nearest to the plane. Computed in float64, as the sums run over all pixels.

    Args:
        points, normals: `(A, ...)`, points in [0, 1].
        gaps_A: the linearised function at the points.

    Returns:
        Moves `(A, ...)`, zero where the normal is.
    """
    x, w, gap = points.flatten(1).double(), normals.flatten(1).double(), gaps_A.double()
    tiny = torch.finfo(torch.float64).tiny
    peak = w.abs().amax(1).clamp_min(tiny)
    w, gap = w / peak[:, None], (gap / peak)[:, None]
    direction = -gap.sign() * w.sign()
    room = torch.where(direction > 0, 1 - x, x).clamp_min(0)
    w = w.abs()
    speed = w if norm == "l2" else (w != 0).double()
    bends = torch.where(speed > 0, room / speed.clamp_min(tiny), 0)
    rates, at_edges, end = w * speed, w * room, bends.amax(1, keepdim=True)
    time = torch.zeros_like(gap)
    for _ in range(_NEWTON[norm]):
        moving = bends > time
        closed = torch.where(moving, 0, at_edges).sum(1, keepdim=True)  # by coordinates that reached their edges
        rate = torch.where(moving, rates, 0).sum(1, keepdim=True).clamp_min(tiny)
        before, time = time, torch.minimum(torch.maximum((gap.abs() - closed) / rate, time), end)
        if time.is_cpu and torch.equal(before, time):  # on a GPU, finding out would make the host wait
            break
    return (direction * torch.minimum(speed * time, room)).to(points.dtype).view_as(points)
