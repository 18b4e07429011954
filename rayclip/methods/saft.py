"""SAFT (Zhang et al. 2026, arXiv 2602.12461): semantic-aware adversarial fine-tuning, with M captions per class."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayclip.attacks.semantic import Objective, ensemble_loss
from rayclip.methods.base import Batch
from rayclip.methods.captioned import TEMPLATES, CaptionedMethod
from rayclip.methods.tga_zsr import TGAZSR
from rayclip.models import Clip
from rayclip.models.exact import cosine_logits
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class SAFT(TGAZSR, CaptionedMethod):
    """TGA-ZSR's three terms with CE averaged over M captions per class, on images made by the semantic-ensemble attack.
    The attention is that of the true class's captions: the mean of their cosine maps, then scaled (`models.attention`).
    Each image costs one forward pass for all captions.

    SAFT-L and SAFT-M differ in the source of the captions: a language model, or a multimodal one.

    Attributes:
        objective: of the attack, see `semantic.ensemble_loss`.
    """

    name: ClassVar[str] = "saft"

    objective: Objective = "cross_entropy"

    def captions_needed(self, bundled: str) -> str:
        if self.texts or self.captions == TEMPLATES:
            return ""
        if not (self.captions or bundled):
            raise UserError(
                "saft trains on captions of the classes: give saft:captions=FILE, a table as rayclip captions filter "
                "writes it, or saft:captions=templates to do without."
            )
        return self.captions or bundled

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        with torch.no_grad():
            text_PD = batch.texts.all()

        def objective(pixels: Tensor) -> Tensor:
            logits_BMK = cosine_logits(clip.encode_image(pixels), text_PD, clip.scale).unflatten(1, (self.sets, -1))
            return ensemble_loss(logits_BMK, batch.labels_B, self.objective)

        return self.perturb(clip, batch, objective)
