"""ET3 (CVPR 2026): moves the image to lower energy before it is classified."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rayclip.defenses.signed import SignedSteps


@dataclass(frozen=True, kw_only=True)
class ET3(SignedSteps):
    """2 steps of 2.5/255 inside 5/255 that lower the energy −logsumexp(logits), of CLIP's scaled logits."""

    name: ClassVar[str] = "et3"
    PAPER_EPS: ClassVar[float] = 5 / 255

    steps: int = 2
    step: float = 2.5 / 255

    def objective(self, logits_BK: Tensor, predicted_B: Tensor) -> Tensor:
        return logits_BK.logsumexp(1)
