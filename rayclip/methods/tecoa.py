"""TeCoA (Mao et al., ICLR 2023): text-guided contrastive adversarial training of the image encoder."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayclip.methods.base import Batch, Method, Recipe, Trains
from rayclip.methods.losses import class_cross_entropy
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip


@dataclass(frozen=True, kw_only=True)
class TeCoA(Method):
    """CE(s·f(x')·T, y), on images that PGD made by maximising the same loss. The paper trains with 2 steps
    at lr 1e-5; the defaults of its code are 5 and 1e-7."""

    name: ClassVar[str] = "tecoa"
    recipe: ClassVar[Recipe] = Recipe(optimizer="sgd", lr=1e-5, momentum=0.9, warmup_steps=1000, epochs=10)

    steps: int = 2
    trains: Trains = "image"

    def temperature(self, clip: Clip) -> Tensor:
        """Return the factor that cosines are multiplied by, in the attack and in the loss."""
        return clip.scale

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        with torch.no_grad():
            text_KD, scale = self.class_texts(batch), self.temperature(clip)
        return self.perturb(
            clip,
            batch,
            lambda pixels: class_cross_entropy(clip.encode_image(pixels), text_KD, batch.labels_B, scale),
        )

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.adversarial_BCHW is not None
        image_BD = clip.encode_image(batch.adversarial_BCHW)
        terms_B = class_cross_entropy(image_BD, self.class_texts(batch), batch.labels_B, self.temperature(clip))
        loss = global_mean(terms_B, batch.total)
        return loss, {"loss": loss.detach()}
