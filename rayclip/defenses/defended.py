"""A classifier behind test-time defences is a classifier again, to be judged and to be attacked through.

Shapes: B batch, K draws, V views of an image, C H W image, D embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rayclip.attacks import rng
from rayclip.defenses.base import Defense
from rayclip.models import ZeroShot

Gradient = Literal["ignore", "straight", "bpda"]
Chain = tuple[Defense, ...]


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What an attack on a defended classifier is aimed at (Athalye, Carlini & Wagner 2018).

    Attributes:
        gradient: `ignore`: the attack sees the undefended classifier, as in most papers. `straight`: it differentiates
            the defence as it is. `bpda`: on the way back the identity stands in for every defence that is not smooth.
        draws: of a random defence, averaged at every query of the attack (EOT): the logarithm of their mean
            probabilities is what it attacks. Each query draws anew.
    """

    gradient: Gradient = "ignore"
    draws: int = 1

    @property
    def label(self) -> str:
        """What follows the attack in metric names; nothing where it ignores the defence."""
        if self.gradient == "ignore":
            return ""
        return f"_{self.gradient}"

    def describe(self) -> dict[str, Any]:
        return {"aim": self.gradient} | ({} if self.gradient == "ignore" else {"draws": self.draws})


IGNORE = Aim()


class Defended(ZeroShot):
    """`victim` behind a chain of defences, for one batch.

    Without an aim it is what is judged: a sample meets the same draw of the defence's randomness whenever it is judged.
    With one it is what an attack attacks: every query draws anew, and never what the judge draws.

    Args:
        keys_B: one 64-bit key a sample (`attacks.rng.sample_keys`).
    """

    def __init__(self, victim: ZeroShot, chain: Chain, keys_B: Tensor, aim: Aim | None = None) -> None:
        vars(self).update(vars(victim))  # class weights and prompts are the victim's
        self._victim, self._chain, self._aim = victim, chain, aim
        self._keys_B = keys_B.to(victim.clip.device)
        self._asked_B = torch.zeros_like(self._keys_B)  # queries of each sample so far

    def embed_each(self, prompts: Sequence[str]) -> Tensor:
        return self._victim.embed_each(prompts)

    def embed(self, pixels_BCHW: Tensor, index: Tensor | None = None, *, normalize: bool = True) -> Tensor:
        if index is None and len(pixels_BCHW) != len(self._keys_B):
            raise ValueError(f"{len(pixels_BCHW)} images of a batch of {len(self._keys_B)}: pass their index")
        keys_BK = self._draw(slice(None) if index is None else index)
        views = self._views(pixels_BCHW.repeat_interleave(keys_BK.shape[1], 0), keys_BK.flatten())
        features = self._victim.embed(views.flatten(0, 1), normalize=normalize)
        features = features.view(len(pixels_BCHW), -1, features.shape[-1])
        return features.squeeze(1)

    def _draw(self, index: slice | Tensor) -> Tensor:
        """Keys of the draws that a query of these samples averages, `(B, K)`."""
        keys_B = self._keys_B[index]
        if self._aim is None:
            return rng.subkeys(keys_B, "judge")[:, None]
        first_B = self._asked_B[index] * self._aim.draws
        self._asked_B[index] += 1
        turns_BK = first_B[:, None] + torch.arange(self._aim.draws, device=keys_B.device)
        return rng.numbered(rng.subkeys(keys_B, "attack")[:, None], turns_BK)

    def _views(self, pixels: Tensor, keys: Tensor) -> Tensor:
        """The images `(B·K, C, H, W)` through all defences, `(B·K, V, C, H, W)`."""
        views = pixels[:, None]
        for place, defense in enumerate(self._chain):
            count = views.shape[1]
            own = torch.stack([rng.subkeys(keys, f"{defense.name} {place} {v}") for v in range(count)], 1).flatten()
            flat = views.flatten(0, 1)
            new = defense.views(self._victim, flat, own)
            if self._aim is not None and self._aim.gradient == "bpda" and not defense.smooth:
                new = flat[:, None] + (new - flat[:, None]).detach()
            views = new.unflatten(0, (len(pixels), count)).flatten(1, 2)
        return views


def is_random(chain: Chain) -> bool:
    return any(defense.random for defense in chain)


def chain_label(chain: Chain) -> str:
    """`ttc:tau=0.1+tte`, settings where they are not the defaults; `none` for no defence."""
    return "+".join(defense.label for defense in chain) or "none"


def describe_chain(chain: Chain) -> str:
    """The defences with all their settings, in order; `none` for no defence."""

    def one(defense: Defense) -> str:
        settings = ", ".join(f"{k} {v}" for k, v in defense.describe().items())
        return f"{defense.name} ({settings})" if settings else defense.name

    return " + ".join(map(one, chain)) or "none"
