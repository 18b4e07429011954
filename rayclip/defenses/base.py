"""The interface of test-time defences: each replaces the pixels that the classifier gets, or changes its logits.

Shapes: B batch, V views of an image, C H W image, K classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from rayclip.models import ZeroShot
from rayclip.settings import Configurable, format_changes, format_value


@dataclass(frozen=True, kw_only=True)
class Defense(Configurable):
    """A defence with its settings. Subclasses are frozen dataclasses, one file each.

    A defence belongs to no model: it gets the undefended classifier with every batch, and may query it freely.
    """

    noun: ClassVar[str] = "defence"
    random: ClassVar[bool] = False  # whether it uses random numbers
    smooth: ClassVar[bool] = False  # whether its derivative is useful to attacks; for the others BPDA replaces it

    def pinned(self) -> Self:
        """Return the defence with the fingerprints of the files that its predictions depend on filled in."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return the settings that a result's protocol must state."""
        return {name: format_value(name, getattr(self, name)) for name in self.settings()}

    @property
    def label(self) -> str:
        """Name, and the settings that differ from the defaults, as a user would write them."""
        return format_changes(self)

    @property
    def cost(self) -> int:
        """Approximate number of forward and backward passes per image beyond the prediction's own."""
        return 0

    def views(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        """Return the images that the classifier gets instead, `(B, V, C, H, W)` in [0, 1]; by default the images.

        Args:
            victim: the undefended classifier.
            pixels_BCHW: in [0, 1].
            keys_B: one 64-bit key per sample, the source of all randomness (`rng`).
        """
        return pixels_BCHW[:, None]

    def logits(self, logits_BK: Tensor) -> Tensor:
        """Return the logits in place of the classifier's, `(B, K)`, a function of these alone; by default unchanged."""
        return logits_BK


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
