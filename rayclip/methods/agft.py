"""AGFT (CVPR 2026, arXiv 2603.29410): TeCoA whose targets are the original model's predictions, made smoother."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayclip.methods.base import Batch, Recipe
from rayclip.methods.parallel import global_mean
from rayclip.methods.tecoa import TeCoA
from rayclip.models import Clip
from rayclip.models.exact import cosine_logits


@dataclass(frozen=True, kw_only=True)
class AGFT(TeCoA):
    """`−Σ q log softmax(k·s·f(x')·T)` with q = softmax(gamma·k·s₀·f₀(x)·T₀) of the clean image, on images that PGD made
    by raising the same loss. No labels are used. The paper trains the image encoder, with 2 steps.

    Attributes:
        gamma: how much smoother the targets are than the predictions, in (0, 1].
        sharpness: k, a factor on the model's own scale s: with CLIP's 100, the paper's τ is 1/180.
    """

    name: ClassVar[str] = "agft"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="sgd", lr=4e-4, momentum=0.9, warmup_steps=1000, batch_size=256, epochs=10
    )
    needs_original: ClassVar[bool] = True

    gamma: float = 0.4
    sharpness: float = 1.8

    def temperature(self, clip: Clip) -> Tensor:
        return self.sharpness * clip.scale

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        targets_BK, text_KD = self.targets(batch), batch.texts.all().detach()
        return self.perturb(clip, batch, lambda pixels: self.terms(clip, pixels, text_KD, targets_BK))

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.adversarial_BCHW is not None
        terms_B = self.terms(clip, batch.adversarial_BCHW, batch.texts.all(), self.targets(batch))
        loss = global_mean(terms_B, batch.total)
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """Return q, `(B, K)`."""
        assert batch.original is not None
        image_BD, f0 = batch.original.encode_image(batch.pixels_BCHW), batch.original
        return cosine_logits(image_BD, f0.texts.all(), self.gamma * self.temperature(f0.clip)).softmax(1)

    def terms(self, clip: Clip, pixels_BCHW: Tensor, text_KD: Tensor, targets_BK: Tensor) -> Tensor:
        """Return the loss of each image, `(B,)`."""
        logits_BK = cosine_logits(clip.encode_image(pixels_BCHW), text_KD, self.temperature(clip))
        return -(targets_BK * logits_BK.log_softmax(1)).sum(1)
