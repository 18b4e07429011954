"""VP, robust visual prompting: a learned frame around every image, trained on adversarial images; CLIP is frozen.

The frame is Bahng et al.'s (arXiv 2203.17274), its adversarial training Mao et al.'s (TeCoA, ICLR 2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rayclip.methods.base import PromptMethod, Recipe
from rayclip.methods.tecoa import TeCoA
from rayclip.models import Clip
from rayclip.models.prompts import WithFrame, WithFrameAndTokens, token_width
from rayclip.settings import FromZero
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class VP(PromptMethod, TeCoA):
    """TeCoA with the frame: CE(s·f(x' + frame)·T, y), on images that PGD made by maximising the same loss.

    Attributes:
        frame: initial frame: `empty`, which leaves the model unchanged, or `normal`, drawn from N(0, 1), as in the
            published code; for few images or few steps use `empty`.
        tokens: number of additional learned vectors, which the image tower reads after its patches.
    """

    name: ClassVar[str] = "vp"
    recipe: ClassVar[Recipe] = Recipe(optimizer="sgd", lr=40.0, momentum=0.9, warmup_steps=1000, epochs=10)
    # The learning rate was chosen on the digits' train split
    small: ClassVar[Recipe] = Recipe(optimizer="adam", lr=0.5, batch_size=128, epochs=8)

    published: ClassVar[Mapping[str, Any]] = {"frame": "normal", "tokens": 10}

    frame: Literal["empty", "normal"] = "empty"
    tokens: FromZero = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UserError(f"vp: tokens={self.tokens} must be at least 0.")

    def check(self, clip: Clip) -> None:
        super().check(clip)
        if self.tokens:
            token_width(clip)

    def wrap_model(self, clip: Clip, seed: int) -> Clip:
        drawn = seed if self.frame == "normal" else None
        return WithFrameAndTokens.begin(clip, drawn, self.tokens) if self.tokens else WithFrame.begin(clip, drawn)
