"""Zero-shot classification: one text embedding a class, computed once per (model, class set) and reused.

Shapes: B batch, K classes, D embedding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayclip.models.clip import Clip

TEMPLATE = "This is a photo of a {}"  # no full stop: SAFT, TTC, MMCoA and TeCoA all use this one


def clean_name(name: str) -> str:
    """Lower-case, with `_`, `-` and `/` as blanks: what the papers' code does to every class name."""
    return " ".join(name.lower().translate(str.maketrans("_-/", "   ")).split())


def class_prompts(class_names: Sequence[str], template: str = TEMPLATE) -> list[str]:
    return [template.format(clean_name(name)) for name in class_names]


class ZeroShot:
    """A frozen CLIP as a classifier over `class_names`.

    `classifier(pixels)` gives logits; `embed` and `logits` are its two halves, so that an attack on several text sets
    pays for one image forward.
    """

    def __init__(self, clip: Clip, class_names: Sequence[str], template: str = TEMPLATE) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.class_names, self.template = tuple(class_names), template
        self.prompts = class_prompts(class_names, template)
        with torch.no_grad():
            self.text_KD = self.embed_prompts(self.prompts)
            self._scale = clip.scale

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text weights of one prompt a class, `(K, D)`, normalised."""
        with torch.no_grad():
            return self.clip.embed_texts(prompts)

    def embed(self, pixels_BCHW: Tensor, *, normalize: bool = True) -> Tensor:
        return self.clip.encode_image(pixels_BCHW, normalize=normalize)

    def logits(self, image_BD: Tensor, text_KD: Tensor | None = None) -> Tensor:
        """`s · <f(x), t_c>`, `(B, K)`, against the clean class prompts unless other text weights are given."""
        return self._scale * image_BD @ (self.text_KD if text_KD is None else text_KD).T

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        return self.logits(self.embed(pixels_BCHW))
