"""The interface of test-time defences: hooks for pixels, embeddings, class weights and logits.

Shapes: B batch, V views of an image, C H W image, D embedding, K classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from rayclip.attacks.geometry import per_image
from rayclip.models import Clip, ZeroShot
from rayclip.models.zeroshot import merge_views
from rayclip.settings import FILLED_IN, Configurable, format_changes, format_value


@dataclass(frozen=True, kw_only=True)
class Defense(Configurable):
    """A defence with its settings. Subclasses are frozen dataclasses, one file each, and override any of the hooks
    `views`, `embeddings`, `class_weights`, `ensemble` and `logits`, which run in this order.

    A defence belongs to no model: it gets the undefended classifier with every batch, and may query it freely. What it
    makes of a sample must depend on that sample and its key alone.
    """

    noun: ClassVar[str] = "defence"
    random: ClassVar[bool] = False  # whether it uses random numbers
    smooth: ClassVar[bool] = False  # whether its derivative is useful to attacks; for the others BPDA replaces it

    def pinned(self) -> Self:
        """Return the defence with the fingerprints of the files that its predictions depend on filled in."""
        return self

    def relaxed(self) -> Self:
        """Return the defence for attacks on its own decision: with the same outputs, but gradients through its gate,
        and no others. A defence without a gate returns itself."""
        return self

    def check(self, clip: Clip) -> None:
        """Raise a `UserError` if it cannot defend this model, before any work starts."""

    def describe(self) -> dict[str, Any]:
        """Return the settings that a result's protocol must state."""
        return {name: format_value(name, getattr(self, name)) for name in self.settings()}

    @property
    def label(self) -> str:
        """Name, and the settings that differ from the defaults, as a user would write them."""
        return format_changes(self)

    @property
    def view_count(self) -> int:
        """Number of images that `views` makes of one, V."""
        return 1

    @property
    def cost(self) -> int:
        """Approximate number of forward and backward passes per image beyond the prediction's own."""
        return self.view_count - 1

    def views(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        """Return the images that the classifier gets instead, `(B, V, C, H, W)` in [0, 1]; by default the images.

        Args:
            victim: the undefended classifier.
            pixels_BCHW: in [0, 1].
            keys_B: one 64-bit key per sample, the source of all randomness (`rng`).
        """
        return pixels_BCHW[:, None]

    def embeddings(self, victim: ZeroShot, image_BVD: Tensor, keys_B: Tensor) -> Tensor:
        """Return the embeddings in place of those of its views, `(B, V, D)`, both normalised; by default unchanged."""
        return image_BVD

    def class_weights(self, victim: ZeroShot, image_BVD: Tensor, text_KD: Tensor) -> Tensor:
        """Return the class weights of each sample, `(B, K, D)` or, if all samples share them, `(K, D)`; by default
        unchanged. Adversarial class prompts go past this hook.

        Args:
            image_BVD: the normalised embeddings of its views.
            text_KD: the weights in effect, `(K, D)` or `(B, K, D)`.
        """
        return text_KD

    def ensemble(self, victim: ZeroShot, logits_BVK: Tensor, image_BVD: Tensor) -> Tensor:
        """Return the logits of images, given those of its views, `(B, K)`; by default the logarithm of the views' mean
        probabilities. Decisions between views belong here, too: the embeddings show what the views look like."""
        return mean_prediction(logits_BVK)

    def logits(self, logits_BK: Tensor) -> Tensor:
        """Return the logits in place of the images', `(B, K)`, a function of these alone; by default unchanged."""
        return logits_BK


def mean_prediction(logits_BVK: Tensor) -> Tensor:
    """Return `merge_views`; a single view's logits stay as they are."""
    return logits_BVK.squeeze(1) if logits_BVK.shape[1] == 1 else merge_views(logits_BVK)


@dataclass(frozen=True, kw_only=True)
class Purifier(Defense, ABC):
    """A defence that adds a perturbation of its own to the image.

    Its steps follow signs of gradients. The derivative of a sign is zero wherever it exists, so second-order gradients
    are never needed: the gradient straight through a purifier is the identity wherever nothing is clipped to the image
    range.
    """

    @abstractmethod
    def purify(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        """Return the perturbed images, `(B, C, H, W)` in [0, 1]."""

    def views(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        return self.purify(victim, pixels_BCHW, keys_B)[:, None]


class Candidates(NamedTuple):
    """Both outcomes of a gate, of which it chooses one for each image.

    Attributes:
        kept_BCHW: the images that pass, in [0, 1].
        purified_BCHW: the images that do not.
        margin_B: positive where the gate purifies.
    """

    kept_BCHW: Tensor
    purified_BCHW: Tensor
    margin_B: Tensor


@dataclass(frozen=True, kw_only=True)
class GatedPurifier(Purifier):
    """A purifier that decides for each image whether to purify it. Attacks may aim at this decision: with
    `through_gate` the outputs are the same, and the only gradient is that of the decision, as if it were
    `sigmoid(SLOPE·margin)`.
    """

    SLOPE: ClassVar[float] = 20.0

    through_gate: bool = field(default=False, metadata=FILLED_IN)

    def relaxed(self) -> Self:
        return replace(self, through_gate=True)

    @abstractmethod
    def candidates(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Candidates:
        """Return both outcomes; with `through_gate`, the margin has to be differentiable in the pixels."""

    def share(self, margin_B: Tensor) -> Tensor:
        """Return the share of the purified image in the result, `(B,)` in [0, 1]: here all or nothing."""
        return (~(margin_B <= 0)).to(margin_B.dtype)

    def purify(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        kept, purified, margin_B = self.candidates(victim, pixels_BCHW, keys_B)
        share = per_image(self.share(margin_B.detach()))
        chosen = torch.where(share == 0, kept, torch.where(share == 1, purified, kept + share * (purified - kept)))
        if not self.through_gate:
            return chosen
        soft = per_image((self.SLOPE * margin_B).sigmoid())
        return chosen.detach() + (purified - kept).detach() * (soft - soft.detach())
