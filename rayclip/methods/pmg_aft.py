"""PMG-AFT (Wang et al., CVPR 2024): TeCoA guided by the predictions of the pre-trained model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.methods.base import Batch, Recipe
from rayclip.methods.losses import divergence, weighted_sum
from rayclip.methods.tecoa import TeCoA
from rayclip.models import Clip
from rayclip.models.exact import cosine_logits


@dataclass(frozen=True, kw_only=True)
class PMGAFT(TeCoA):
    """TeCoA + KL(softmax f₀-logits(x') ‖ softmax logits(x')) + KL(softmax logits(x) ‖ softmax logits(x')).

    The examples are TeCoA's. f₀'s logits use its own texts; the last term has gradients through both sides.

    Attributes:
        form: `scaled`: logits are CLIP's, and all terms are means over the batch. `published`: as in the paper's code,
            which divides the temperature out of the logits, in the attack too, and sums the divergences over the batch.
            The learning rate of `recipe` is meant for `published`, whose gradient is an order of magnitude smaller.
        lambda_original, lambda_clean: weights of the two divergences, in that order.
    """

    name: ClassVar[str] = "pmg-aft"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="sgd", lr=5e-5, momentum=0.9, warmup_steps=1000, batch_size=256, epochs=10
    )
    published: ClassVar[Mapping[str, Any]] = {"form": "published"}
    needs_original: ClassVar[bool] = True

    form: Literal["scaled", "published"] = "scaled"
    lambda_original: float = 1.0
    lambda_clean: float = 1.0

    def temperature(self, clip: Clip) -> Tensor:
        return clip.scale if self.form == "scaled" else 1 + 0 * clip.scale  # DDP requires all parameters to take part

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.adversarial_BCHW is not None and batch.original is not None
        text_KD = batch.texts.all()
        scale = self.temperature(clip)
        adversarial_BK = cosine_logits(clip.encode_image(batch.adversarial_BCHW), text_KD, scale)
        clean_BK = cosine_logits(clip.encode_image(batch.pixels_BCHW), text_KD, scale)
        f0, f0_texts = batch.original.clip, batch.original.texts
        with torch.no_grad():
            image_BD = batch.original.encode_image(batch.adversarial_BCHW)
            original_BK = cosine_logits(image_BD, f0_texts.all(), self.temperature(f0))
        summed = batch.total if self.form == "published" else 1
        return weighted_sum(
            {
                "loss_adversarial": (1.0, F.cross_entropy(adversarial_BK, batch.labels_B, reduction="none")),
                "loss_original": (summed * self.lambda_original, divergence(original_BK, adversarial_BK)),
                "loss_clean": (summed * self.lambda_clean, divergence(clean_BK, adversarial_BK)),
            },
            batch.total,
        )
