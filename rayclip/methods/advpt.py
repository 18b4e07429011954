"""AdvPT (Zhang et al., ECCV 2024, arXiv 2311.11261): adversarial prompt tuning of the text side of a frozen CLIP."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.attacks.feature import feature_distance
from rayclip.methods.base import OWN, Batch, PromptMethod, Recipe
from rayclip.methods.losses import class_cross_entropy
from rayclip.methods.parallel import global_mean
from rayclip.models import Clip
from rayclip.models.prompts import WithContext
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class AdvPT(PromptMethod):
    """CE(s·z'·T(v), y) with a learned context v in front of each class name; z' = f(x') is made once, before training.

    x' maximises KL(softmax f(x) ‖ softmax f(x')) of the un-normalised embeddings, which do not depend on the context.

    Attributes:
        context: number of learned tokens; at most half of what the text tower reads.
    """

    name: ClassVar[str] = "advpt"
    recipe: ClassVar[Recipe] = Recipe(
        optimizer="sgd",
        lr=2e-3,
        momentum=0.9,
        weight_decay=5e-4,
        warmup_epochs=1,
        warmup_lr=1e-5,
        batch_size=32,
        epochs=200,
    )
    published: ClassVar[Mapping[str, Any]] = {"eps": 8 / 255, "steps": 10, "context": 32}
    # The learning rate was chosen on the digits' train split
    small: ClassVar[Recipe] = Recipe(optimizer="adam", lr=0.02, batch_size=128, epochs=20)
    prepares: ClassVar[bool] = True

    context: int = 16

    def recipe_for(self, patch: int | None) -> Recipe:
        """Return the recipe: 100 epochs on B/16 and L/14, 200 on B/32."""
        return replace(self.recipe, epochs=100) if patch in (14, 16) else self.recipe

    @property
    def step_length(self) -> float:
        """1.25·eps/steps unless given, as in the published code."""
        return 1.25 * self.eps / self.steps if self.step is None else self.step

    @property
    def trains_texts(self) -> bool:
        return True

    def check(self, clip: Clip) -> None:
        super().check(clip)
        WithContext.shape(clip, self.context)
        if self.against != OWN:
            raise UserError("advpt makes its images without class prompts, before training: leave --attack away.")
        if self.start == "zero":
            raise UserError("advpt's attack cannot start at zero, where its gradient vanishes: use --start random.")

    def wrap_model(self, clip: Clip, seed: int) -> Clip:
        return WithContext.begin(clip, self.context, seed)

    def prepare(self, clip: Clip, batch: Batch) -> Tensor:
        with torch.no_grad():
            clean_BD = clip.encode_image(batch.pixels_BCHW, normalize=False)
        made = self.perturb(
            clip, batch, lambda pixels: feature_distance(clean_BD, clip.encode_image(pixels, normalize=False), "kl")
        )
        assert made.adversarial_BCHW is not None
        with torch.no_grad():
            return F.normalize(clip.encode_image(made.adversarial_BCHW, normalize=False), dim=-1)

    def loss(self, clip: Clip, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.prepared_BD is not None
        terms_B = class_cross_entropy(batch.prepared_BD, batch.texts.all(), batch.labels_B, clip.scale)
        loss = global_mean(terms_B, batch.total)
        return loss, {"loss": loss.detach()}
