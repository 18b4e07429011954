"""Sim-CLIP (arXiv 2407.14971): Siamese adversarial training, an image and its adversarial form drawn to each other."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rayclip.methods.base import SMALL_MODEL, Batch, Recipe
from rayclip.methods.fare import FARE
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip


@dataclass(frozen=True, kw_only=True)
class SimCLIP(FARE):
    """`−½·cos(f(x'), sg f(x)) − ½·cos(f(x), sg f(x'))`, sg stops the gradient; the images are made by FARE's attack, on
    the distance from the original model's features. Nothing else holds the features in their place."""

    name: ClassVar[str] = "sim-clip"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="adamw", lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4, warmup_steps=1400, batch_size=128, epochs=2
    )
    # Nothing keeps images apart: on a fifth of the digits' train split, features begin to become one at 7e-5, and at
    # the other methods' 1e-3 they are one
    small: ClassVar[Recipe] = replace(SMALL_MODEL, lr=5e-5)

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.adversarial_BCHW is not None
        clean_BD, adversarial_BD = map(clip.encode_image, (batch.pixels_BCHW, batch.adversarial_BCHW))
        first_B = F.cosine_similarity(adversarial_BD, clean_BD.detach(), dim=1)
        second_B = F.cosine_similarity(clean_BD, adversarial_BD.detach(), dim=1)
        terms_B = -(first_B + second_B) / 2
        loss = global_mean(terms_B, batch.total)
        return loss, {"loss": loss.detach()}
