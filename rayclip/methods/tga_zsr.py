"""TGA-ZSR (Yu et al., NeurIPS 2024): TeCoA that keeps text-guided attention close to the original model's.

Shapes: B this worker's samples, M texts per class, K classes, D embedding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayclip.attacks.semantic import ensemble_loss
from rayclip.methods.base import Batch, Recipe
from rayclip.methods.losses import weighted_sum
from rayclip.methods.tecoa import TeCoA
from rayclip.models import Clip
from rayclip.models.attention import encode_with_patches, patch_tower, text_guided_attention
from rayclip.models.exact import cosine_logits


@dataclass(frozen=True, kw_only=True)
class TGAZSR(TeCoA):
    """`CE(x') + 0.08·‖A(x') − A₀(x)‖₂ + 0.05·‖A(x) − A₀(x)‖₂`, batch mean; the examples are TeCoA's.

    A is the attention guided by the true class's text (`models.attention`), A₀ the original model's.

    Attributes:
        lambda_adversarial, lambda_clean: weights of the two attention terms, in that order.
    """

    name: ClassVar[str] = "tga-zsr"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="sgd", lr=1e-4, momentum=0.9, warmup_steps=1000, batch_size=128, epochs=10
    )
    needs_original: ClassVar[bool] = True

    lambda_adversarial: float = 0.08
    lambda_clean: float = 0.05

    def check(self, clip: Clip) -> None:
        super().check(clip)
        patch_tower(clip)

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return CE and attention terms, averaged over the M texts per class (one here). Each image costs one forward
        pass whatever M is."""
        sets = self.texts_per_class
        assert batch.adversarial_BCHW is not None and batch.original is not None
        text_MKD = batch.texts.all().unflatten(0, (sets, -1))
        own_BMD = text_MKD[:, batch.labels_B].transpose(0, 1)

        adversarial_BD, patches_BTD = encode_with_patches(clip, batch.adversarial_BCHW)
        logits_BMK = cosine_logits(adversarial_BD, text_MKD.flatten(0, 1), clip.scale).unflatten(1, (sets, -1))
        adversarial = text_guided_attention(clip, patches_BTD, own_BMD)
        clean = text_guided_attention(clip, encode_with_patches(clip, batch.pixels_BCHW)[1], own_BMD)
        original = original_attention(batch, sets)
        return weighted_sum(
            {
                "loss_adversarial": (1.0, ensemble_loss(logits_BMK, batch.labels_B, "cross_entropy")),
                "attention_adversarial": (self.lambda_adversarial, (adversarial - original).norm(dim=1)),
                "attention_clean": (self.lambda_clean, (clean - original).norm(dim=1)),
            },
            batch.total,
        )


@torch.no_grad()
def original_attention(batch: Batch, sets: int) -> Tensor:
    """Return A₀(x), `(B, image_size²)`, from the original model's embeddings of images and texts."""
    assert batch.original is not None
    f0 = batch.original.clip
    own_BMD = batch.original.texts.all().unflatten(0, (sets, -1))[:, batch.labels_B].transpose(0, 1)
    return text_guided_attention(f0, encode_with_patches(f0, batch.pixels_BCHW)[1], own_BMD)
