"""Sep-Attack: the papers' "multimodal" attack. Each modality is attacked on its own, and both are evaluated
together."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.base import Samples
from rayclip.attacks.joint import JointAttack, Objective
from rayclip.models import ZeroShot


@dataclass(frozen=True, kw_only=True)
class SepAttack(JointAttack):
    """Sep-Attack: the image maximises the cross-entropy against the CLEAN class prompts; BERT-Attack changes every
    class prompt; the adversarial image is classified against the adversarial prompts (MMCoA, section III-A)."""

    name: ClassVar[str] = "sep"

    @property
    def label(self) -> str:
        return f"sep_pgd-{self.suffix}" + ("" if self.norm == "linf" else f"_{self.norm}")

    def objective(self, victim: ZeroShot, samples: Samples, text_PD: Tensor) -> Objective:
        def climb(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            features = victim.embed(pixels, index)
            return features, F.cross_entropy(victim.logits(features), samples.labels_B[index], reduction="none")

        return climb
