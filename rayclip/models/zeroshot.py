"""Zero-shot classification: one text embedding a class, computed once per (model, class set) and reused.

Shapes: B batch, K classes, D embedding.
"""

import copy
from collections.abc import Sequence
from typing import ClassVar, Self

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

    Attributes:
        deterministic: whether the logits are a function of the pixels alone; attacks use that (`GradientAttack`).
    """

    deterministic: ClassVar[bool] = True

    def __init__(self, clip: Clip, class_names: Sequence[str], template: str = TEMPLATE) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.class_names, self.template = tuple(class_names), template
        self._start(class_prompts(class_names, template))

    def _start(self, prompts: Sequence[str]) -> None:
        self.prompts = list(prompts)
        self._embedded: tuple[Sequence[str], Tensor] | None = None
        with torch.no_grad():
            self.text_KD = self.embed_prompts(self.prompts)
            self._scale = self.clip.scale

    def embed_each(self, prompts: Sequence[str]) -> Tensor:
        """Normalised embeddings of prompts, `(P, D)`. Those of the last list stay: every batch asks for the same."""
        if self._embedded is None or self._embedded[0] is not prompts:
            with torch.no_grad():
                self._embedded = prompts, self.clip.embed_texts(prompts)
        return self._embedded[1]

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text weights of the classes, `(K, D)`; of one prompt a class they are normalised."""
        return self.pool(self.embed_each(prompts))

    def pool(self, values_PD: Tensor) -> Tensor:
        """What belongs to prompts as what belongs to classes, `(K, D)`: here a class has one prompt."""
        return values_PD

    def prompts_of(self, label: int) -> list[str]:
        return [self.prompts[label]]

    def seen_by(self, clip: Clip) -> Self:
        """The same classifier, with the same class weights, that looks at images through another model."""
        other = copy.copy(self)
        other.clip = clip
        return other

    def embed(self, pixels_BCHW: Tensor, *, normalize: bool = True) -> Tensor:
        return self.clip.encode_image(pixels_BCHW, normalize=normalize)

    def logits(self, image_BD: Tensor, text_KD: Tensor | None = None) -> Tensor:
        """`s · <f(x), t_c>`, `(B, K)`, against the clean class prompts unless other text weights are given."""
        return self._scale * image_BD @ (self.text_KD if text_KD is None else text_KD).T

    def logits_with_own(self, image_BD: Tensor, own_BD: Tensor, labels_B: Tensor) -> Tensor:
        """`(B, K)`: each image's true class has text weights of its own, the other classes their clean ones."""
        own_B = self._scale * (image_BD * own_BD).sum(1)
        return self.logits(image_BD).scatter(1, labels_B[:, None], own_B[:, None])

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        return self.logits(self.embed(pixels_BCHW))
