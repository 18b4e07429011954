"""PGD (Madry et al. 2018): steps along the gradient of the cross-entropy over the clean class prompts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.base import Adversarial, GradientAttack, Norm, Prompts, Samples
from rayclip.models import Clip, ZeroShot
from rayclip.models.exact import cosine_logits
from rayclip.settings import FILLED_IN


@dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
    """PGD in l_inf or l_2, with either stop rule; settings in `GradientAttack`."""

    name: ClassVar[str] = "pgd"
    for_pairs: ClassVar[bool] = True
    for_training: ClassVar[bool] = True

    def loss(self, logits_AK: Tensor, labels_A: Tensor) -> Tensor:
        """Return the per-sample loss to maximise, `(A,)`; CW and similar attacks override it."""
        return F.cross_entropy(logits_AK, labels_A, reduction="none")

    def craft(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        def forward(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            logits, labels = victim(pixels, index), samples.labels_B[index]
            return self.loss(logits, labels), logits.argmax(1) != labels

        images, steps, queries = self.ascend(forward, samples, eps=eps, constant=victim.deterministic)
        return Adversarial(images, None, steps, queries)

    def training_objective(
        self, clip: Clip, images_BCHW: Tensor, labels_B: Tensor, texts: Callable[[], Tensor], texts_per_class: int
    ) -> Callable[[Tensor], Tensor]:
        """Return the loss over the class prompts; with M texts per class, the mean of the M losses."""
        with torch.no_grad():
            text_PD = texts()
        labels_BM = labels_B.repeat_interleave(texts_per_class)

        def objective(pixels: Tensor) -> Tensor:
            logits_BMK = cosine_logits(clip.encode_image(pixels), text_PD, clip.scale).unflatten(
                1, (texts_per_class, -1)
            )
            return self.loss(logits_BMK.flatten(0, 1), labels_BM).unflatten(0, (-1, texts_per_class)).mean(1)

        return objective


@dataclass(frozen=True, kw_only=True)
class PGDL2(PGD):
    """PGD in the l_2 ball, as an attack with its own name."""

    name: ClassVar[str] = "pgd-l2"
    for_training: ClassVar[bool] = False  # methods choose the norm by a setting of their own

    norm: Norm = field(default="l2", metadata=FILLED_IN)

    @property
    def label(self) -> str:
        return f"{self.name}-{self.suffix}"

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"norm": self.norm}
