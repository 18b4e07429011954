"""APT (Li et al., CVPR 2024, arXiv 2403.01849): adversarial training of the text side's context of a frozen CLIP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rayclip.methods.advpt import AdvPT
from rayclip.methods.base import Batch, PromptMethod, Recipe
from rayclip.methods.losses import class_cross_entropy
from rayclip.methods.parallel import gather, world
from rayclip.methods.tecoa import TeCoA
from rayclip.models import Clip
from rayclip.models.prompts import WithContext

TEMPLATE = "a photo of a {}"


@dataclass(frozen=True, kw_only=True)
class APT(PromptMethod, TeCoA):
    """TeCoA with a learned context v in front of each class name: CE(s·f(x')·T(v), y), on images that PGD made by
    raising the same loss. All classes share the context (the paper's unified one); the names have no full stop behind
    them, which in the code they have. The paper tunes models that TeCoA has hardened before.

    Attributes:
        context: M, the number of learned tokens; at most half of what the text tower reads.
        prompting: texts that PGD raises the loss of: `on-the-fly`, with the context of now; `constant`,
            "a photo of a CLASS"; `perturbed`, with a context that itself climbs the batch's loss with PGD, from the one
            of now in steps of `context_step` times the gradient.
        context_step: for `perturbed`; the code has no default.
    """

    name: ClassVar[str] = "apt"
    recipe: ClassVar[Recipe] = AdvPT.recipe
    # The learning rate was chosen on the digits' train split
    small: ClassVar[Recipe] = Recipe(optimizer="adam", lr=5e-3, batch_size=128, epochs=20)

    steps: int = 3
    context: int = 16
    prompting: Literal["on-the-fly", "constant", "perturbed"] = "on-the-fly"
    context_step: float = 1.0

    @property
    def step_length(self) -> float:
        """⅔·eps unless given, as in the published code; its steps are 3."""
        return 2 * self.eps / 3 if self.step is None else self.step

    @property
    def trains_texts(self) -> bool:
        return True

    @property
    def compares_samples(self) -> bool:
        return self.prompting == "perturbed"

    def check(self, clip: Clip) -> None:
        super().check(clip)
        WithContext.shape(clip, self.context)

    def wrap_model(self, clip: Clip, seed: int) -> Clip:
        return WithContext.begin(clip, self.context, seed)

    def attack(self, clip: Clip, batch: Batch) -> Batch:
        if self.prompting == "on-the-fly":
            return super().attack(clip, batch)
        if self.prompting == "perturbed":
            return self.perturb(clip, batch, self._climbing(clip, batch))
        text_KD, labels_B = batch.texts.without_learned(TEMPLATE), batch.labels_B
        return self.perturb(
            clip, batch, lambda pixels: class_cross_entropy(clip.encode_image(pixels), text_KD, labels_B, clip.scale)
        )

    def _climbing(self, clip: Clip, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Return the loss of each image, `(B,)`; at each call its context climbs the mean over the global batch."""
        assert isinstance(clip, WithContext)
        context_NW, tokens_KL = clip.learned.detach(), clip.tokenize(batch.texts.prompts)

        def loss(pixels_BCHW: Tensor) -> Tensor:
            nonlocal context_NW
            context_NW = context_NW.requires_grad_()
            text_KD = clip.encode_behind(context_NW, tokens_KL)
            terms_B = class_cross_entropy(clip.encode_image(pixels_BCHW), text_KD, batch.labels_B, clip.scale)
            (gradient_NW,) = torch.autograd.grad(terms_B.sum(), context_NW, retain_graph=True)
            summed = gather(gradient_NW.flatten()[None], world()[1]).sum(0).view_as(context_NW)
            context_NW = context_NW.detach() + self.context_step / batch.total * summed
            return terms_B

        return loss
