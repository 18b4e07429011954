"""FT-standard: ordinary fine-tuning on clean images, the baseline for adversarial training."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rayclip.methods.base import OWN, Batch, Method, Recipe
from rayclip.methods.losses import class_cross_entropy
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class FTStandard(Method):
    """CE of clean images over all class prompts.

    Trains both encoders (MMCoA's FT-standard), or the image encoder only with `trains=image` (TTC's CLIP-FT), which has
    a recipe of its own; the code of SAFT's and TTC's line has the contrastive loss there, `diagonal`.
    """

    name: ClassVar[str] = "ft-standard"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="adam", lr=1e-6, betas=(0.9, 0.98), adam_eps=1e-6, weight_decay=0.2, schedule="constant", epochs=30
    )
    image_recipe: ClassVar[Recipe] = Recipe(
        optimizer="sgd", lr=1e-4, momentum=0.9, warmup_steps=1000, batch_size=128, epochs=10
    )

    def recipe_for(self, patch: int | None) -> Recipe:
        return self.recipe if self.part == "all" else self.image_recipe

    def check_attack(self) -> None:
        if self.against != OWN:
            raise UserError("ft-standard trains on clean images: leave --attack away, or use tecoa.")

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        image_BD = clip.encode_image(batch.pixels_BCHW)
        loss = global_mean(class_cross_entropy(image_BD, batch.texts.all(), batch.labels_B, clip.scale), batch.total)
        return loss, {"loss": loss.detach()}
