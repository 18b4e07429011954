"""No attack: clean accuracy, the first column of every table."""

from dataclasses import dataclass
from typing import ClassVar

from rayclip.attacks.base import Adversarial, Attack, Prompts, Samples
from rayclip.models import ZeroShot


@dataclass(frozen=True, kw_only=True)
class Clean(Attack):
    name: ClassVar[str] = "clean"
    needs_eps: ClassVar[bool] = False
    asks_victim: ClassVar[bool] = False
    for_pairs: ClassVar[bool] = True

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        return Adversarial.untouched(samples.images_BCHW)
