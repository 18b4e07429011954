"""CLIPure-Cos (ICLR 2025): moves an image's embedding toward what all images have in common, by the text encoder.

Shapes: B batch, V views, D embedding.
"""

from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.defenses.base import Defense
from rayclip.models import Clip, ZeroShot

_TINY = 1e-12  # an embedding that is the texts' direction has no gradient

_anchors: WeakKeyDictionary[Clip, Tensor] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class CLIPureCos(Defense):
    """`steps` times u <- normalise(u + length·g/‖g‖) along the gradient g of cos(u, t̄), with t̄ the mean of the
    normalised embeddings of the 80 ImageNet templates with an empty class name.

    The published code divides by the norm of its whole batch's gradient, so that an image's verdict depends on its
    batch; here each image has its own. A step then turns u by arctan(length), with the published 30 by 88 degrees: past
    t̄, and the next one back. CLIP's images and texts are closer than that, and after ten such steps u is what it was.
    `length=0.1` moves it for good.

    Attributes:
        steps: number of steps.
        length: of a step, where u has length 1.
    """

    name: ClassVar[str] = "clipure-cos"

    steps: int = 10
    length: float = 30.0

    def embeddings(self, victim: ZeroShot, image_BVD: Tensor, keys_B: Tensor) -> Tensor:
        anchor_D = anchor(victim.clip).to(image_BVD.dtype)
        for _ in range(self.steps):
            # Of unit vectors: the derivative of the cosine is the part of the anchor at right angles
            gradient = anchor_D - (image_BVD @ anchor_D)[..., None] * image_BVD
            length = gradient.norm(dim=-1, keepdim=True).clamp_min(_TINY)
            image_BVD = F.normalize(image_BVD + self.length * gradient / length, dim=-1)
        return image_BVD


def anchor(clip: Clip) -> Tensor:
    """Return t̄ / ‖t̄‖, `(D,)`; embedded once per model."""
    if clip not in _anchors:
        import open_clip

        with torch.no_grad():
            texts_TD = clip.embed_texts([make("") for make in open_clip.OPENAI_IMAGENET_TEMPLATES])
        _anchors[clip] = F.normalize(texts_TD.mean(0), dim=0)
    return _anchors[clip]
