"""VP, robust visual prompting: a learned frame around every image, trained on adversarial images, CLIP frozen.

The frame is Bahng et al.'s (arXiv 2203.17274), its adversarial training Mao et al.'s (TeCoA, ICLR 2023).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayclip.methods.base import Batch, PromptMethod, Recipe
from rayclip.methods.losses import class_cross_entropy
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip
from rayclip.models.prompts import WithFrame


@dataclass(frozen=True, kw_only=True)
class VP(PromptMethod):
    """CE(s·f(x' + frame)·T, y), on images that PGD made by raising the same loss, through the frame."""

    name: ClassVar[str] = "vp"
    recipe: ClassVar[Recipe] = Recipe(optimizer="sgd", lr=40.0, momentum=0.9, warmup_steps=1000, epochs=10)
    # The learning rate was chosen on the digits' train split
    small: ClassVar[Recipe] = Recipe(optimizer="adam", lr=0.5, batch_size=128, epochs=8)

    steps: int = 2

    def dressed(self, clip: Clip, seed: int) -> Clip:
        return WithFrame.begin(clip)

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        with torch.no_grad():
            text_KD = batch.texts.all()
        return self.perturb(
            batch, lambda pixels: class_cross_entropy(clip.encode_image(pixels), text_KD, batch.labels_B, clip.scale)
        )

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.adversarial_BCHW is not None
        image_BD = clip.encode_image(batch.adversarial_BCHW)
        loss = global_mean(class_cross_entropy(image_BD, batch.texts.all(), batch.labels_B, clip.scale), batch.total)
        return loss, {"loss": loss.detach()}
