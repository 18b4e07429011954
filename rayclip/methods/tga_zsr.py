"""TGA-ZSR (Yu et al., NeurIPS 2024): TeCoA that keeps text-guided attention close to the original model's.

Shapes: B this worker's samples, M texts per class, K classes, P texts of all classes, D embedding, T patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayclip.attacks.semantic import ensemble_loss
from rayclip.methods.base import Batch, Recipe
from rayclip.methods.losses import weighted_sum
from rayclip.methods.tecoa import TeCoA
from rayclip.models import Clip, class_prompts
from rayclip.models.attention import encode_with_patches, patch_tower, text_guided_attention
from rayclip.models.exact import cosine_logits

COMPLEMENT = "This is not a photo of a {}"


@dataclass(frozen=True, kw_only=True)
class TGAZSR(TeCoA):
    """`CE(x') + 0.08·‖A(x') − A₀(x)‖₂ + 0.05·‖A(x) − A₀(x)‖₂`, batch mean; the examples are TeCoA's.

    A is the attention guided by the true class's text (`models.attention`), A₀ the original model's. The published
    code, and SAFT's, normalises patches over the wrong axis, which moves the gradient by 2 %; here each patch is.

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
        assert batch.adversarial_BCHW is not None and batch.original is not None
        f0, texts_PD = batch.original.clip, batch.texts.all()
        adversarial_BD, patches_BTD = encode_with_patches(clip, batch.adversarial_BCHW)
        logits_BPK = cosine_logits(adversarial_BD, self.class_texts(batch), clip.scale)
        adversarial = self.attention(clip, patches_BTD, texts_PD, batch.labels_B)
        clean = self.attention(clip, encode_with_patches(clip, batch.pixels_BCHW)[1], texts_PD, batch.labels_B)
        with torch.no_grad():
            patches_BTD = encode_with_patches(f0, batch.pixels_BCHW)[1]
            original = self.attention(f0, patches_BTD, batch.original.texts.all(), batch.labels_B)
        logits_BMK = logits_BPK.unflatten(1, (self.texts_per_class, -1))
        return weighted_sum(
            {
                "loss_adversarial": (1.0, ensemble_loss(logits_BMK, batch.labels_B, "cross_entropy")),
                "attention_adversarial": (self.lambda_adversarial, (adversarial - original).norm(dim=1)),
                "attention_clean": (self.lambda_clean, (clean - original).norm(dim=1)),
            },
            batch.total,
        )

    def attention(self, clip: Clip, patches_BTD: Tensor, texts_PD: Tensor, labels_B: Tensor) -> Tensor:
        """Return A, `(B, image_size²)`, of images given their patches and the embeddings of `prompts`."""
        own_BMD = texts_PD.unflatten(0, (self.texts_per_class, -1))[:, labels_B].transpose(0, 1)
        return text_guided_attention(clip, patches_BTD, own_BMD)


@dataclass(frozen=True, kw_only=True)
class CompTGA(TGAZSR):
    """TGA-ZSR with the attention A·(1 − A′), A′ that guided by the text "This is not a photo of a {class}": what the
    complement looks at does not count. Weights 0.10 and 0.07 (the same authors' `Comp-TGA`)."""

    name: ClassVar[str] = "comp-tga"

    lambda_adversarial: float = 0.10
    lambda_clean: float = 0.07

    def prompts(self, class_names: Sequence[str], template: str) -> list[str]:
        """Return the class prompts, then those of the complements."""
        return [*super().prompts(class_names, template), *class_prompts(class_names, COMPLEMENT)]

    def class_texts(self, batch: Batch) -> Tensor:
        return batch.texts.all().chunk(2)[0]

    def attention(self, clip: Clip, patches_BTD: Tensor, texts_PD: Tensor, labels_B: Tensor) -> Tensor:
        own, complement = (super(CompTGA, self).attention(clip, patches_BTD, t, labels_B) for t in texts_PD.chunk(2))
        return own * (1 - complement)
