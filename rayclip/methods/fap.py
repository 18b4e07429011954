"""FAP (Zhou et al., NeurIPS 2024, arXiv 2403.14774): tokens in both towers of a frozen CLIP, trained adversarially."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayclip.methods.base import OWN, Batch, PromptMethod, Recipe
from rayclip.methods.losses import class_cross_entropy, divergence, weighted_sum
from rayclip.models import Clip
from rayclip.models.coupled import WithCoupledTokens
from rayclip.models.exact import cosine_logits
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class FAP(PromptMethod):
    """CE(s·z·T, y) + weight·(cos(z, z') + 1)·KL(softmax s·z·T ‖ softmax s·z'·T) of each image (equation 7), with
    embeddings z = f(x) and z' = f(x') and class weights T of a model with learned tokens in both towers
    (`WithCoupledTokens`). PGD makes x' by raising the divergence, with z fixed (equation 8).

    The paper's text tokens are maps of the image tower's; in the code, and here, the first block's are the other way
    round. The code leaves its template's "of a {}." between tokens and class; here it is "of a CLASS".

    Attributes:
        weight: λ.
        tokens: number of learned tokens in a block, 1 to 4.
        depth: number of blocks with tokens of their own, at most those of the shallower tower.
        aware: whether the divergence has the factor cos(z, z') + 1, which keeps z and z' apart (equation 6).
    """

    name: ClassVar[str] = "fap"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="sgd",
        lr=3.5e-3,
        momentum=0.9,
        weight_decay=5e-4,
        warmup_epochs=1,
        warmup_lr=1e-5,
        batch_size=4,
        epochs=10,
    )
    # The learning rate was chosen on the digits' train split
    small: ClassVar[Recipe] = Recipe(optimizer="adam", lr=0.02, batch_size=128, epochs=20)

    steps: int = 2
    weight: float = 1.5
    tokens: int = 2
    depth: int = 9
    aware: bool = True

    @property
    def trains_texts(self) -> bool:
        return True

    def check(self, clip: Clip) -> None:
        super().check(clip)
        self.wrap_model(clip, 0)
        if self.start == "zero" and self.against == OWN:
            raise UserError("fap's attack cannot start at zero, where its gradient vanishes: use --start random.")

    def wrap_model(self, clip: Clip, seed: int) -> Clip:
        return WithCoupledTokens.begin(clip, self.tokens, self.depth, seed)

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        with torch.no_grad():
            text_KD = batch.texts.all()
            clean_BK = cosine_logits(clip.encode_image(batch.pixels_BCHW), text_KD, clip.scale)
        return self.perturb(
            clip,
            batch,
            lambda pixels: divergence(clean_BK, cosine_logits(clip.encode_image(pixels), text_KD, clip.scale)),
        )

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.adversarial_BCHW is not None
        text_KD = batch.texts.all()
        clean_BD, made_BD = clip.encode_image(batch.pixels_BCHW), clip.encode_image(batch.adversarial_BCHW)
        clean_BK, made_BK = (cosine_logits(image_BD, text_KD, clip.scale) for image_BD in (clean_BD, made_BD))
        apart_B = divergence(clean_BK, made_BK)
        if self.aware:
            apart_B = apart_B * ((clean_BD * made_BD).sum(1) + 1)
        natural_B = class_cross_entropy(clean_BD, text_KD, batch.labels_B, clip.scale)
        return weighted_sum({"loss_natural": (1.0, natural_B), "loss_adversarial": (self.weight, apart_B)}, batch.total)
