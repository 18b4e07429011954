"""RN: uniform noise, the simplest defence; the same as TTC's initial perturbation without its steps."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rayclip.attacks.geometry import random_start
from rayclip.defenses.base import Purifier
from rayclip.models import ZeroShot


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Purifier):
    """Uniform noise: x + d, d ~ U(-eps, eps), clipped to the image range.

    Attributes:
        eps: in pixel units.
    """

    name: ClassVar[str] = "rn"
    random: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    eps: float = 4 / 255

    def purify(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        return (pixels_BCHW + random_start(pixels_BCHW, keys_B, self.eps, "linf")).clamp(0, 1)
