"""VP, robust visual prompting: a learned frame around every image, trained on adversarial images, CLIP frozen.

The frame is Bahng et al.'s (arXiv 2203.17274), its adversarial training Mao et al.'s (TeCoA, ICLR 2023).
"""

from dataclasses import dataclass
from typing import ClassVar

from rayclip.methods.base import PromptMethod, Recipe
from rayclip.methods.tecoa import TeCoA
from rayclip.models import Clip
from rayclip.models.prompts import WithFrame


@dataclass(frozen=True, kw_only=True)
class VP(PromptMethod, TeCoA):
    """TeCoA through the frame: CE(s·f(x' + frame)·T, y), on images that PGD made by raising the same loss."""

    name: ClassVar[str] = "vp"
    recipe: ClassVar[Recipe] = Recipe(optimizer="sgd", lr=40.0, momentum=0.9, warmup_steps=1000, epochs=10)
    # The learning rate was chosen on the digits' train split
    small: ClassVar[Recipe] = Recipe(optimizer="adam", lr=0.5, batch_size=128, epochs=8)

    def dressed(self, clip: Clip, seed: int) -> Clip:
        return WithFrame.begin(clip)
