"""Sep-Attack: the papers' "multimodal" attack. Each modality is attacked on its own, both are judged together."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.base import Adversarial, GradientAttack, Prompts, Samples
from rayclip.attacks.bert import TextAttack
from rayclip.models import ZeroShot


@dataclass(frozen=True, kw_only=True)
class SepAttack(TextAttack, GradientAttack):
    """The image climbs the cross-entropy against the CLEAN class prompts; BERT-Attack changes every class prompt; the
    prediction is of the adversarial image against the adversarial prompts (MMCoA, section III-A).

    Under `first_success` an image whose clean pixels already fail against the adversarial prompts is not touched.
    """

    name: ClassVar[str] = "sep"

    @property
    def label(self) -> str:
        return f"sep_pgd-{self.suffix}" + ("" if self.norm == "linf" else f"_{self.norm}")

    def run(self, victim: ZeroShot, samples: Samples, *, eps: float, prompts: Prompts = None) -> Adversarial:
        assert prompts is not None, "call prepare first"
        text_KD = victim.embed_prompts(prompts)
        if self.stop == "first_success":
            with torch.no_grad():
                holds_B = victim.logits(victim.embed(samples.images_BCHW), text_KD).argmax(1) == samples.labels_B
            samples = samples._replace(todo_B=holds_B if samples.todo_B is None else samples.todo_B & holds_B)

        def forward(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            features, labels = victim.embed(pixels), samples.labels_B[index]
            loss = F.cross_entropy(victim.logits(features), labels, reduction="none")
            return loss, victim.logits(features, text_KD).argmax(1) != labels

        images, steps, queries = self.ascend(forward, samples, eps=eps)
        return Adversarial(images, text_KD, steps, queries)
