"""FGSM (Goodfellow et al. 2015): one step of length eps along the sign of the cross-entropy gradient."""

from dataclasses import dataclass
from typing import ClassVar

from rayclip.attacks.base import Adversarial, Attack, Prompts, Samples
from rayclip.attacks.pgd import PGD
from rayclip.models import ZeroShot


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """FGSM: x' = clip(x + eps·sign(∇ CE(x, y)), 0, 1)."""

    name: ClassVar[str] = "fgsm"

    @property
    def cost(self) -> int:
        return 2

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        return PGD(steps=1, step=eps, start="zero").craft(victim, samples, eps=eps)
