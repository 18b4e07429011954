"""A classifier behind test-time defences, itself a classifier that can be evaluated and attacked through.

Shapes: B batch, K draws or classes, V views of an image, C H W image, D embedding.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rayclip import rng
from rayclip.defenses.base import Defense
from rayclip.models import ZeroShot
from rayclip.models.zeroshot import ImageViewWrapper

Gradient = Literal["ignore", "straight", "bpda"]
Chain = tuple[Defense, ...]


@dataclass(frozen=True, kw_only=True)
class Aim:
    """Settings of an attack on a defended classifier (Athalye, Carlini & Wagner 2018).

    Attributes:
        gradient: `ignore`: the attack sees the undefended classifier, as in most papers. `straight`: it differentiates
            through the defence as it is. `bpda`: the backward pass replaces every defence that is not smooth by the
            identity.
        draws: number of draws of a random defence that are averaged at every query of the attack (EOT); the attack gets
            the logarithm of their mean probabilities. Each query draws anew.
    """

    gradient: Gradient = "ignore"
    draws: int = 1

    @property
    def label(self) -> str:
        """Suffix of the attack in metric names; empty if the attack ignores the defence."""
        if self.gradient == "ignore":
            return ""
        return f"_{self.gradient}"

    def describe(self) -> dict[str, Any]:
        return {"aim": self.gradient} | ({} if self.gradient == "ignore" else {"draws": self.draws})


IGNORE = Aim()


class Defended(ImageViewWrapper):
    """`victim` behind a chain of defences, for one batch.

    Without an aim, it is the classifier for evaluation: a sample gets the same draw of the defence's randomness at
    every evaluation. With an aim, it is the classifier for an attack: every query draws anew, and never the same
    numbers as the evaluation.

    Args:
        keys_B: one 64-bit key per sample (`rng.sample_keys`).
    """

    def __init__(self, victim: ZeroShot, chain: Chain, keys_B: Tensor, aim: Aim | None = None) -> None:
        super().__init__(victim)
        self._chain, self._aim = chain, aim
        self.deterministic = victim.deterministic and not is_random(chain)
        draws = 1 if aim is None else aim.draws
        self._draws = rng.Draws(keys_B.to(victim.clip.device), attacked=aim is not None, count=draws)

    def embed(self, pixels_BCHW: Tensor, index: Tensor | None = None, *, normalize: bool = True) -> Tensor:
        keys_BK = self._draws.of(index, len(pixels_BCHW))
        draws = keys_BK.shape[1]
        views = self._views(pixels_BCHW.repeat_interleave(draws, 0), keys_BK.flatten())
        everyone = torch.arange(len(pixels_BCHW), device=pixels_BCHW.device) if index is None else index
        owners = everyone.repeat_interleave(draws * views.shape[1])
        features = self.inner.embed(views.flatten(0, 1), owners, normalize=normalize)
        features = features.view(len(pixels_BCHW), -1, features.shape[-1])
        return features.squeeze(1)

    def logits(self, image_BD: Tensor, text_KD: Tensor | None = None) -> Tensor:
        return self._logits(super().logits(image_BD, text_KD))

    def logits_with_own(self, image_BD: Tensor, own_BD: Tensor, labels_B: Tensor) -> Tensor:
        return self._logits(super().logits_with_own(image_BD, own_BD, labels_B))

    def _logits(self, logits_BK: Tensor) -> Tensor:
        """Pass logits through all defences."""
        for defense in self._chain:
            logits_BK = self._backward_as_identity(defense, logits_BK, defense.logits(logits_BK))
        return logits_BK

    def _backward_as_identity(self, defense: Defense, old: Tensor, new: Tensor) -> Tensor:
        """Return `new` with the gradient of `old` if BPDA replaces this defence on the way back."""
        if new is old or self._aim is None or self._aim.gradient != "bpda" or defense.smooth:
            return new
        return old + (new - old).detach()

    def _views(self, pixels: Tensor, keys: Tensor) -> Tensor:
        """Pass images `(B·K, C, H, W)` through all defences, `(B·K, V, C, H, W)`."""
        views = pixels[:, None]
        for place, defense in enumerate(self._chain):
            count = views.shape[1]
            own = torch.stack([rng.subkeys(keys, f"{defense.name} {place} {v}") for v in range(count)], 1).flatten()
            flat = views.flatten(0, 1)
            new = self._backward_as_identity(defense, flat[:, None], defense.views(self.inner.plain, flat, own))
            views = new.unflatten(0, (len(pixels), count)).flatten(1, 2)
        return views


def is_random(chain: Chain) -> bool:
    return any(defense.random for defense in chain)


def chain_label(chain: Chain) -> str:
    """Return `ttc:tau=0.1+tte`, with settings that differ from the defaults; `none` for no defence."""
    return "+".join(defense.label for defense in chain) or "none"


def describe_chain(chain: Chain) -> str:
    """Return the defences with all their settings, in order; `none` for no defence."""

    def one(defense: Defense) -> str:
        settings = ", ".join(f"{k} {v}" for k, v in defense.describe().items())
        return f"{defense.name} ({settings})" if settings else defense.name

    return " + ".join(map(one, chain)) or "none"
