"""A classifier behind test-time defences, itself a classifier that can be evaluated and attacked through.

Shapes: B batch, K draws or classes, V views of an image, C H W image, D embedding; N rows: the images that a defence of
the chain gets, of all draws.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip import rng
from rayclip.defenses.base import Defense, mean_prediction
from rayclip.models import ZeroShot
from rayclip.models.zeroshot import ImageViewWrapper

Gradient = Literal["ignore", "straight", "bpda", "gate"]
Chain = tuple[Defense, ...]


@dataclass(frozen=True, kw_only=True)
class Aim:
    """Settings of an attack on a defended classifier (Athalye, Carlini & Wagner 2018).

    Attributes:
        gradient: `ignore`: the attack sees the undefended classifier, as in most papers. `straight`: it differentiates
            through the defence as it is. `bpda`: the backward pass replaces every defence that is not smooth by the
            identity. `gate`: the same, and the gradient of the defence's own decision is added (`Defense.relaxed`).
        draws: number of draws of a random defence that are averaged at every query of the attack (EOT); the attack gets
            the logarithm of their mean probabilities. Each query draws anew.
        source: the defence that the attack goes through in place of the one that judges (transfer from another defended
            classifier); empty for that itself.
    """

    gradient: Gradient = "ignore"
    draws: int = 1
    source: Chain = ()

    @property
    def name(self) -> str:
        return f"from-{'-'.join(defense.name for defense in self.source)}" if self.source else self.gradient

    @property
    def label(self) -> str:
        """Suffix of the attack in metric names; empty if the attack ignores the defence."""
        return "" if self.gradient == "ignore" else f"_{self.name}"

    @property
    def is_adaptive(self) -> bool:
        """Return whether the attack goes through the defence that judges."""
        return self.gradient != "ignore" and not self.source

    def describe(self) -> dict[str, Any]:
        draws = {} if self.gradient == "ignore" else {"draws": self.draws}
        return {"aim": self.name} | draws | ({"source_defense": describe_chain(self.source)} if self.source else {})


IGNORE = Aim()


def fitting(aim: Aim, chain: Chain) -> Aim:
    """Return the aim without what makes no difference for this chain: draws of a chain that is not random, the gate of
    one that has none, and a source that is the chain itself."""
    source = () if aim.source == chain else aim.source
    attacked = source or chain
    gradient = "bpda" if aim.gradient == "gate" and all(d.relaxed() is d for d in attacked) else aim.gradient
    return Aim(gradient=gradient, draws=aim.draws if is_random(attacked) else 1, source=source)


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
        self._gradient = None if aim is None else aim.gradient
        self._chain = tuple(d.relaxed() for d in chain) if self._gradient == "gate" else chain
        self._through_gate = tuple(a is not b for a, b in zip(chain, self._chain, strict=True))
        self.deterministic = victim.deterministic and not is_random(chain)
        draws = 1 if aim is None else aim.draws
        self._draws = rng.Draws(keys_B.to(victim.clip.device), attacked=aim is not None, count=draws)
        self._counts = [1] * len(chain)  # each defence's views of an image that it gets

    def embed(self, pixels_BCHW: Tensor, index: Tensor | None = None, *, normalize: bool = True) -> Tensor:
        keys_BK = self._draws.of(index, len(pixels_BCHW))
        draws = keys_BK.shape[1]
        views, keys = self._views(pixels_BCHW.repeat_interleave(draws, 0), keys_BK.flatten())
        everyone = torch.arange(len(pixels_BCHW), device=pixels_BCHW.device) if index is None else index
        owners = everyone.repeat_interleave(len(views) // len(everyone))
        features = self._purify_embeddings(self.inner.embed(views, owners, normalize=normalize), keys, normalize)
        features = features.view(len(pixels_BCHW), -1, features.shape[-1])
        return features.squeeze(1)

    def scores(self, image_BD: Tensor, text_KD: Tensor | None = None) -> Tensor:
        if text_KD is not None:
            return super().scores(image_BD, text_KD)
        text, flat = self.text_KD, image_BD.flatten(0, -2)
        for place, defense in enumerate(self._chain):
            image_NVD = self._of_views(flat, place)
            if text.ndim == 3:
                text = text.repeat_interleave(len(image_NVD) // len(text), 0)
            text = self._replaced(place, text, defense.class_weights(self.inner.plain, image_NVD, text))
        if text.ndim == 2:
            return super().scores(image_BD, text)
        scores = self._scale * flat.unflatten(0, (len(text), -1)) @ text.mT
        return scores.view(*image_BD.shape[:-1], -1)

    def decide(self, image_BD: Tensor, scores: Tensor) -> Tensor:
        """Pass the logits of all views through the defences, from the last to the first; then average the draws."""
        logits, image_MD = scores.flatten(0, -2), image_BD.flatten(0, -2)
        for place, defense in reversed(list(enumerate(self._chain))):
            logits_NVK = logits.unflatten(0, (-1, self._counts[place]))
            chosen = defense.ensemble(self.inner.plain, logits_NVK, self._of_views(image_MD, place))
            if self._needs_stand_in(place):
                chosen = self._replaced(place, mean_prediction(logits_NVK), chosen)
            logits = self._replaced(place, chosen, defense.logits(chosen))
        return mean_prediction(logits.unflatten(0, (len(scores), -1)))

    def _views(self, pixels: Tensor, keys: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pass images of all draws, `(N, C, H, W)`, through all defences; return the views, and for each defence the
        keys of the images that it got."""
        views, got = pixels, list[Tensor]()
        for place, defense in enumerate(self._chain):
            count = len(views) // len(keys)
            own = torch.stack([rng.subkeys(keys, f"{defense.name} {place} {v}") for v in range(count)], 1).flatten()
            new = self._replaced(place, views[:, None], defense.views(self.inner.plain, views, own))
            self._counts[place] = new.shape[1]
            views = new.flatten(0, 1)
            got.append(own)
        return views, got

    def _purify_embeddings(self, features: Tensor, keys: list[Tensor], normalize: bool) -> Tensor:
        """Pass the views' embeddings through the defences, from the last to the first; their lengths stay."""
        unit = before = features if normalize else F.normalize(features, dim=-1)
        for place, defense in reversed(list(enumerate(self._chain))):
            image_NVD = unit.unflatten(0, (len(keys[place]), -1))
            new = self._replaced(place, image_NVD, defense.embeddings(self.inner.plain, image_NVD, keys[place]))
            unit = unit if new is image_NVD else new.flatten(0, 1)
        if normalize or unit is before:
            return unit if normalize else features
        return features.norm(dim=-1, keepdim=True) * unit

    def _of_views(self, image_MD: Tensor, place: int) -> Tensor:
        """Return the embeddings of a defence's views, `(N, V, D)`; for views that later defences multiplied, their
        normalised mean."""
        later = math.prod(self._counts[place + 1 :])
        own_MD = image_MD if later == 1 else F.normalize(image_MD.unflatten(0, (-1, later)).mean(1), dim=-1)
        return own_MD.unflatten(0, (-1, self._counts[place]))

    def _needs_stand_in(self, place: int) -> bool:
        return self._gradient in ("bpda", "gate") and not self._chain[place].smooth

    def _replaced(self, place: int, old: Tensor, new: Tensor) -> Tensor:
        """Return `new`, on the way back with the gradient of `old` if BPDA replaces this defence; that of its gate is
        added if the attack goes through it."""
        if new is old or not self._needs_stand_in(place):
            return new
        if self._through_gate[place]:
            return old + (new - old.detach())
        return old + (new - old).detach()


def pinned(chain: Chain) -> Chain:
    """Return the chain with the fingerprints of the files that its predictions depend on filled in."""
    return tuple(defense.pinned() for defense in chain)


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
