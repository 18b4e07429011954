"""APGD (Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks"): PGD with momentum and an adaptive step size. Names follow the paper's Algorithm 1.

Shapes: B batch, A samples of it that are not broken yet, C H W image, K classes, T targets.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.base import Adversarial, Attack, Norm, Prompts, Samples, Stop
from rayclip.attacks.geometry import margin, per_image, project, random_start, steepest
from rayclip.models import ZeroShot
from rayclip.settings import leave_out
from rayclip.types import UserError

ALPHA = 0.75  # weight of the gradient step; the rest is momentum
RHO = 0.75  # smallest share of steps that must raise the loss between two checkpoints
_TINY = 1e-12  # lower bound on denominators, which are 0 if the largest logits are equal

# (logits_AK, indices_A into the batch) -> loss_A to raise
Loss = Callable[[Tensor, Tensor], Tensor]


def checkpoints(steps: int) -> list[int]:
    """Return W of Algorithm 1: `w_j = ceil(p_j·N)`, `p_1 = 0.22`, `p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06)`.

    Computed in whole hundredths, since 0.41·100 is more than 41 in floating point.
    """
    before, p, found = 0, 22, set()
    while p <= 100:
        found.add(-(-p * steps // 100))
        before, p = p, p + max(p - before - 3, 6)
    return sorted(found)


def dlr(logits_AK: Tensor, labels_A: Tensor) -> Tensor:
    """Return the difference of logits ratio, `(A,)`: `−(z_y − max_{i≠y} z_i) / (z_π1 − z_π3)`, π sorting from largest
    to smallest."""
    top = logits_AK.topk(3).values
    return -margin(logits_AK, labels_A) / (top[:, 0] - top[:, 2]).clamp_min(_TINY)


def targeted_dlr(logits_AK: Tensor, labels_A: Tensor, targets_A: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio, `(A,)`: `−(z_y − z_t) / (z_π1 − (z_π3 + z_π4)/2)`."""
    top = logits_AK.topk(4).values
    own, target = (logits_AK.gather(1, c[:, None]).squeeze(1) for c in (labels_A, targets_A))
    return -(own - target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(_TINY)


class State(NamedTuple):
    """The algorithm's state for each sample that is not broken yet; no sample's state depends on another sample.

    Attributes:
        at: the sample's index in the batch.
        clean: the image; x, x_before and x_max are perturbations of it.
        f, gradient: of the loss, at x. After a restart x and the gradient are those of x_max, and f stays the value
            that the previous step reached.
        eta: step size.
        x_max, f_max, gradient_max: point, loss and gradient where the loss was highest so far.
        rises: number of steps since the last checkpoint that raised f.
        f_max_before: f_max at the last checkpoint.
        halved: whether eta was halved at the last checkpoint.
    """

    at: Tensor
    clean: Tensor
    x: Tensor
    x_before: Tensor
    f: Tensor
    gradient: Tensor
    eta: Tensor
    x_max: Tensor
    f_max: Tensor
    gradient_max: Tensor
    rises: Tensor
    f_max_before: Tensor
    halved: Tensor

    def of(self, rows: Tensor) -> "State":
        return State(*(column[rows] for column in self))


def halving(s: State, steps: int) -> Tensor:
    """Return whether conditions 1 or 2 hold at a checkpoint `steps` after the previous one, bool `(A,)`.

    1. Fewer than rho of the steps raised the loss.
    2. Neither eta nor f_max changed since the last checkpoint.
    """
    return (s.rises < RHO * steps) | (~s.halved & (s.f_max == s.f_max_before))


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Algorithm 1 from one or more random starts; subclasses choose the losses. A sample leaves at its first
    adversarial point; an unbroken one ends at the point of the highest loss over all restarts.

    Both conditions look at x(0) .. x(w_j), as in the paper. Whether a step raised the loss is judged at the point that
    it reached itself, even if a restart then replaces that point.

    Attributes:
        iterations: N, steps of each restart; a sample that is not broken costs N + 1 queries.
        restarts: number of runs, each from a random start of its own.
        norm: `linf`, or `l2` over all pixels and channels of an image. The first step is 2·eps long.
        stop: with `final` a sample stays to the end of the run that breaks it, and ends at the adversarial point of the
            highest loss, for classifiers that are not the one that judges.
    """

    iterations: int = 100
    restarts: int = 1
    norm: Norm = "linf"
    stop: Stop = "first_success"

    @property
    def label(self) -> str:
        restarts = "" if self.restarts == 1 else f"x{self.restarts}"
        return f"{self.name}-{self.iterations}{restarts}" + ("" if self.norm == "linf" else f"_{self.norm}")

    @property
    def cost(self) -> int:
        return 2 * self.iterations * self.restarts

    @property
    def stops_early(self) -> bool:
        return self.stop == "first_success"

    def to_last_step(self) -> Self:
        return replace(self, stop="final")

    def describe(self) -> dict[str, Any]:
        return leave_out(super().describe(), stop="first_success")

    @abstractmethod
    def losses(self, victim: ZeroShot, samples: Samples) -> list[Loss]:
        """Return the loss that each run of Algorithm 1 raises, in order."""

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        attack = self.for_classes(len(victim.text_KD))
        images_BCHW, labels_B, _, todo_B = samples
        made = Adversarial.untouched(images_BCHW.clone())
        samples = samples._replace(keys_B=samples.keys_B.to(images_BCHW.device, non_blocking=True))
        highest_B = torch.full_like(images_BCHW[:, 0, 0, 0], -torch.inf)
        holds = torch.arange(len(images_BCHW), device=images_BCHW.device) if todo_B is None else todo_B.nonzero()[:, 0]
        for turn, loss in enumerate(attack.losses(victim, samples)):
            if not len(holds):
                break

            def forward(pixels: Tensor, index: Tensor, loss: Loss = loss) -> tuple[Tensor, Tensor]:
                logits = victim(pixels, index)
                return loss(logits, index), logits.argmax(1) != labels_B[index]

            s = attack._climb(forward, samples, holds, made, eps, turn)
            holds, better = s.at, s.f_max > highest_B[s.at]
            highest_B[holds] = torch.where(better, s.f_max, highest_B[holds])
            end = (s.clean + s.x_max).clamp(0, 1)
            made.images_BCHW[holds] = torch.where(per_image(better), end, made.images_BCHW[holds])
        return made

    def _climb(
        self,
        forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        samples: Samples,
        index: Tensor,
        made: Adversarial,
        eps: float,
        turn: int,
    ) -> State:
        """Run Algorithm 1 once. Writes adversarial images, steps and queries to `made`; returns the samples that are
        not broken."""
        highest_B = torch.full_like(samples.images_BCHW[:, 0, 0, 0], -torch.inf)  # of adversarial points

        def visit(index: Tensor, pixels: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
            """Return the rows that are not broken, and their losses and gradients. The last point needs no gradient."""
            with torch.set_grad_enabled(not last):
                f, broken = forward(pixels.requires_grad_(not last), index)
            made.queries_B[index] += 1
            if self.stops_early:
                rows = (~broken).nonzero().squeeze(1)  # the only wait for the device in a step
            else:
                rows = torch.arange(len(index), device=index.device)
                broken = broken & (f.detach() > highest_B[index])
                highest_B[index] = torch.where(broken, f.detach(), highest_B[index])
            if len(rows) < len(index) or not self.stops_early:
                kept = made.images_BCHW[index]
                made.images_BCHW[index] = torch.where(per_image(broken), pixels.detach(), kept)
            if last or not len(rows):
                return rows, f.detach()[rows], torch.zeros_like(pixels)[rows]
            return rows, f.detach()[rows], torch.autograd.grad(f[rows].sum(), pixels)[0][rows]

        def project_S(x: Tensor, clean: Tensor) -> Tensor:  # noqa: N802 (the paper's P_S)
            return project(x, clean, eps, self.norm)

        clean = samples.images_BCHW[index]
        x = random_start(clean, samples.keys_B[index], eps, self.norm, stream=4 * turn)
        rows, f, gradient = visit(index, (clean + x).clamp(0, 1), last=False)
        index, clean, x = index[rows], clean[rows], x[rows]
        eta, no = torch.full_like(f, 2 * eps), torch.zeros_like(f, dtype=torch.bool)
        s = State(index, clean, x, x, f, gradient, eta, x, f, gradient, no.long(), f, no)
        marks, mark = checkpoints(self.iterations), 0

        for k in range(self.iterations):
            if not len(s.at):
                break
            z = project_S(s.x + per_image(s.eta) * steepest(s.gradient, self.norm), s.clean)
            ahead = project_S(s.x + ALPHA * (z - s.x) + (1 - ALPHA) * (s.x - s.x_before), s.clean) if k else z
            if k in marks:
                s = s._replace(halved=halving(s, k - mark), rises=torch.zeros_like(s.rises), f_max_before=s.f_max)
                mark = k

            rows, f, gradient = visit(s.at, (s.clean + ahead).clamp(0, 1), last=k + 1 == self.iterations)
            made.steps_B[s.at] += 1
            if len(rows) < len(s.at):
                s, ahead = s.of(rows), ahead[rows]
            better = f > s.f_max
            x_max = torch.where(per_image(better), ahead, s.x_max)
            gradient_max = torch.where(per_image(better), gradient, s.gradient_max)
            restart = s.halved if k in marks else torch.zeros_like(s.halved)
            s = s._replace(
                x=torch.where(per_image(restart), x_max, ahead),
                x_before=s.x,
                f=f,
                gradient=torch.where(per_image(restart), gradient_max, gradient),
                eta=torch.where(restart, s.eta / 2, s.eta),
                x_max=x_max,
                f_max=torch.where(better, f, s.f_max),
                gradient_max=gradient_max,
                rises=s.rises + (f > s.f),
            )
        return s if self.stops_early else s.of((highest_B[s.at] == -torch.inf).nonzero().squeeze(1))


@dataclass(frozen=True, kw_only=True)
class APGDCE(APGD):
    """APGD on the cross-entropy."""

    name: ClassVar[str] = "apgd-ce"

    def losses(self, victim: ZeroShot, samples: Samples) -> list[Loss]:
        return [lambda z, index: F.cross_entropy(z, samples.labels_B[index], reduction="none")] * self.restarts


@dataclass(frozen=True, kw_only=True)
class APGDDLR(APGD):
    """APGD on the difference of logits ratio, which needs at least three classes."""

    name: ClassVar[str] = "apgd-dlr"

    def for_classes(self, count: int) -> Self:
        if count < 3:
            raise UserError(f"attack 'apgd-dlr' needs 3 classes, and the data has {count}: use apgd-ce.")
        return self

    def losses(self, victim: ZeroShot, samples: Samples) -> list[Loss]:
        return [lambda z, index: dlr(z, samples.labels_B[index])] * self.restarts


@dataclass(frozen=True, kw_only=True)
class APGDT(APGD):
    """APGD on the targeted DLR, one run per target: the wrong classes in order of their likelihood for the clean image.

    Attributes:
        targets: number of wrong classes to try; at most K − 1 of them.
    """

    name: ClassVar[str] = "apgd-t"

    targets: int = 9

    @property
    def cost(self) -> int:
        return super().cost * self.targets

    def for_classes(self, count: int) -> Self:
        if count < 4:
            instead = "apgd-dlr" if count == 3 else "apgd-ce"
            raise UserError(f"attack 'apgd-t' needs 4 classes, and the data has {count}: use {instead}.")
        return replace(self, targets=min(self.targets, count - 1))

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        made = super().craft(victim, samples, eps=eps)
        ordered = torch.ones_like(made.queries_B) if samples.todo_B is None else samples.todo_B.long()
        return made._replace(queries_B=made.queries_B + ordered)  # the forward pass that ranks the targets

    def losses(self, victim: ZeroShot, samples: Samples) -> list[Loss]:
        images, labels_B, _, todo_B = samples
        at = torch.arange(len(labels_B), device=labels_B.device) if todo_B is None else todo_B.nonzero().squeeze(1)
        if not len(at):
            return []
        with torch.no_grad():
            wrong = victim(images[at], at).scatter(1, labels_B[at][:, None], -torch.inf)
        targets_BT = labels_B[:, None].repeat(1, self.targets)
        targets_BT[at] = wrong.topk(self.targets).indices

        def toward(turn: int) -> Loss:
            return lambda z, index: targeted_dlr(z, labels_B[index], targets_BT[index, turn % self.targets])

        return [toward(turn) for turn in range(self.targets * self.restarts)]
