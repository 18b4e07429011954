"""What a test-time defence is: it looks at other pixels than it was given.

Shapes: B batch, V views of an image, C H W image.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from rayclip.models import ZeroShot
from rayclip.settings import settable, with_changes, written


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A defence with its settings. Subclasses are frozen dataclasses, one file each.

    A defence belongs to no model: it gets the undefended classifier with every batch, and may ask it anything.
    """

    name: ClassVar[str]
    random: ClassVar[bool] = False  # whether it draws numbers
    smooth: ClassVar[bool] = False  # whether its derivative is worth following; BPDA stands in for those that are not

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The names and types of what a user may set."""
        return settable(cls)

    def pinned(self) -> Self:
        """The defence with the fingerprints of the files that its predictions depend on filled in."""
        return self

    def describe(self) -> dict[str, Any]:
        """The settings that a result's protocol must state."""
        return {name: written(name, getattr(self, name)) for name in self.settings()}

    @property
    def label(self) -> str:
        """Its name, and the settings that are not the defaults, as a user would write them."""
        return with_changes(self)

    @property
    def cost(self) -> int:
        """Forwards and backwards per image beyond the prediction's own, roughly."""
        return 0

    @abstractmethod
    def views(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        """What the classifier is to look at instead, `(B, V, C, H, W)` in [0, 1].

        Args:
            victim: the undefended classifier.
            pixels_BCHW: in [0, 1].
            keys_B: one 64-bit key a sample, the source of all randomness (`rng`).
        """


@dataclass(frozen=True, kw_only=True)
class Purifier(Defense):
    """A defence that adds a perturbation of its own to the image.

    Its steps follow signs of gradients. Their derivative is zero wherever it exists, so that no gradient of a gradient
    is ever needed: the one straight through a purifier is the identity where nothing is clipped to the image range.
    """

    @abstractmethod
    def purify(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        """The perturbed images, `(B, C, H, W)` in [0, 1]."""

    def views(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        return self.purify(victim, pixels_BCHW, keys_B)[:, None]
