"""PGD (Madry et al. 2018): steps along the gradient of the cross-entropy over the clean class prompts."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.base import Adversarial, GradientAttack
from rayclip.models import ZeroShot


@dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
    """l_inf or l_2, both stop rules; settings in `GradientAttack`."""

    name: ClassVar[str] = "pgd"

    def loss(self, logits_AK: Tensor, labels_A: Tensor) -> Tensor:
        """Per-sample loss to raise, `(A,)`: the hook in which CW and its kin differ."""
        return F.cross_entropy(logits_AK, labels_A, reduction="none")

    def run(
        self,
        victim: ZeroShot,
        images_BCHW: Tensor,
        labels_B: Tensor,
        todo_B: Tensor,
        *,
        eps: float,
        keys_B: Tensor,
        prompts: tuple[str, ...] | None = None,
    ) -> Adversarial:
        def forward(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            logits, labels = victim(pixels), labels_B[index]
            return self.loss(logits, labels), logits.argmax(1) != labels

        images, steps, queries = self.ascend(forward, images_BCHW, todo_B, eps=eps, keys_B=keys_B)
        return Adversarial(images, None, steps, queries)
