"""Any function from pixels to logits as a classifier that attacks on images can take: a CNN, a language model's eye.

Shapes: B batch, C H W image, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rayclip.models.clip import Clip
from rayclip.models.zeroshot import ZeroShot
from rayclip.types import UserError


class FunctionClassifier(ZeroShot):
    """A function from pixels to logits, `(B, C, H, W)` -> `(B, K)`, differentiable in the pixels for attacks that need
    gradients.

    Its embeddings are its logits. It has no text encoder: `clip` raises a `UserError` that says so, and that is what
    attacks on texts get.
    """

    deterministic = False  # nobody knows

    def __init__(self, function: Callable[[Tensor], Tensor], classes: int, dtype: torch.dtype = torch.float32) -> None:
        """
        Args:
            classes: K.
            dtype: of the pixels that the function takes; attacks work in fp32 at least."""
        self._function, self._dtype = function, dtype
        self.class_names, self.template = tuple(map(str, range(classes))), ""
        self.text_KD = torch.empty(classes, 0)

    @property
    def clip(self) -> Clip:  # type: ignore[override]
        raise UserError(
            "this attack needs a CLIP's text encoder, and a function of pixels has none: give a classifier, such as "
            "rayclip.load(MODEL).zero_shot([...]), or take an attack on images alone, such as pgd."
        )

    def embed(self, pixels_BCHW: Tensor, index: Tensor | None = None, *, normalize: bool = True) -> Tensor:
        logits_BK = self._function(pixels_BCHW.to(self._dtype))
        return logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))

    def logits(self, image_BD: Tensor, text_KD: Tensor | None = None) -> Tensor:
        return image_BD
