"""CW (Carlini & Wagner 2017) with an l_inf budget: PGD on the logit margin loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayclip.attacks.pgd import PGD


@dataclass(frozen=True, kw_only=True)
class CW(PGD):
    """CW (l_inf): PGD on the logit margin (Carlini & Wagner 2017)."""

    name: ClassVar[str] = "cw"

    def loss(self, logits_AK: Tensor, labels_A: Tensor) -> Tensor:
        own = logits_AK.gather(1, labels_A[:, None]).squeeze(1)
        other = logits_AK.scatter(1, labels_A[:, None], -torch.inf).amax(1)
        return -(own - other + 50).relu()
