"""Defences that take signed gradient steps on the classifier's own predictions: anti-adversary and hedge defence.

Shapes: B batch, C H W image, K classes.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.geometry import project
from rayclip.defenses.base import Purifier
from rayclip.models import ZeroShot
from rayclip.units import format_budget

Preset = Literal["paper", "ttc"]

_TTC = 4 / 255  # the budget of every defence in TTC's comparison


@dataclass(frozen=True, kw_only=True)
class SignedSteps(Purifier):
    """Purifier that takes `steps` signed steps from d = 0, raising `objective` inside the eps ball and image range.

    Attributes:
        preset: `paper` uses the defence's own eps, `ttc` the 4/255 of TTC's comparison; steps and step are the paper's.
        eps: in pixel units, replaces the preset's.
        steps: number of steps.
        step: length of a step, in pixel units.
    """

    PAPER_EPS: ClassVar[float]

    preset: Preset = "paper"
    eps: float | None = None
    steps: int
    step: float

    @property
    def ball(self) -> float:
        """The eps in effect."""
        return self.eps if self.eps is not None else self.PAPER_EPS if self.preset == "paper" else _TTC

    def describe(self) -> dict[str, Any]:
        rest = {k: v for k, v in super().describe().items() if k != "preset"}
        return rest | {"eps": format_budget(self.ball)}

    @property
    def cost(self) -> int:
        return 2 * self.steps + 1

    @abstractmethod
    def objective(self, logits_BK: Tensor, predicted_B: Tensor) -> Tensor:
        """Return the objective that the steps raise, `(B,)`; `predicted_B` are the predicted classes of the unmodified
        inputs."""

    def purify(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        delta, predicted_B = torch.zeros_like(pixels_BCHW), None
        for _ in range(self.steps):
            moved = (pixels_BCHW + delta).detach().requires_grad_()
            with torch.enable_grad():
                logits_BK = victim(moved)
                predicted_B = logits_BK.argmax(1) if predicted_B is None else predicted_B
                loss = self.objective(logits_BK, predicted_B).sum()
            (gradient,) = torch.autograd.grad(loss, moved)
            delta = project(delta + self.step * gradient.sign(), pixels_BCHW, self.ball, "linf")
        return (pixels_BCHW + delta).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class AntiAdversary(SignedSteps):
    """Anti-adversary (Alfarra et al., AAAI 2022): K = 2 steps of 0.15 that LOWER the cross-entropy of the class
    predicted for the unmodified input. The paper's own setting has no ball: 0.3 is what two steps can reach."""

    name: ClassVar[str] = "anti-adversary"
    PAPER_EPS: ClassVar[float] = 0.3

    steps: int = 2
    step: float = 0.15

    def objective(self, logits_BK: Tensor, predicted_B: Tensor) -> Tensor:
        return -F.cross_entropy(logits_BK, predicted_B, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Hedge(SignedSteps):
    """Hedge defence (Wu et al. 2021): 20 steps of 4/255 inside 8/255 that RAISE the sum of the cross-entropies over all
    classes, away from regions where one class is certain."""

    name: ClassVar[str] = "hedge"
    PAPER_EPS: ClassVar[float] = 8 / 255

    steps: int = 20
    step: float = 4 / 255

    def objective(self, logits_BK: Tensor, predicted_B: Tensor) -> Tensor:
        return -logits_BK.log_softmax(1).sum(1)
