"""Counterattacks, which perturb images whose features are suspiciously stable, a sign of an attack, away from these
features: TTC, and NAC and DOC, which differ from it in the direction of their steps.

Shapes: B batch, N steps, C H W image, D embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip import rng
from rayclip.attacks.feature import feature_distance
from rayclip.attacks.geometry import project, random_start, steepest
from rayclip.defenses.base import Candidates, GatedPurifier
from rayclip.models import ZeroShot, load_model
from rayclip.models.opening import load_once
from rayclip.settings import FILLED_IN

Encode = Callable[[Tensor], Tensor]

_STREAM = 16  # beyond the streams of the random start


def instability(clean_BD: Tensor, noisy_BD: Tensor) -> Tensor:
    """Return tau = ‖f(x + d⁰) − f(x)‖ / ‖f(x)‖ of un-normalised features, `(B,)`; low if an attack made them stable."""
    return (noisy_BD - clean_BD).norm(dim=1) / clean_BD.norm(dim=1)


def weighted(deltas: list[Tensor], beta: float) -> Tensor:
    """Return the mean of d⁰ .. d^N with weights softmax(beta·n)."""
    weights = (beta * torch.arange(len(deltas), dtype=torch.float64)).softmax(0).tolist()
    return sum((w * d for w, d in zip(weights[1:], deltas[1:], strict=True)), weights[0] * deltas[0])


@dataclass(frozen=True, kw_only=True)
class TTC(GatedPurifier):
    """Counterattack (Xing et al., CVPR 2025): d⁰ ~ U(-eps, eps); `steps` signed steps raise ‖f(x + d) − f(x)‖². If
    `instability` is `tau` or more, the image gets d⁰ alone, else the weighted mean of d⁰ .. d^N.

    Attributes:
        eps, step: in pixel units.
        steps: N.
        tau: threshold of the instability; with 0 it never counterattacks.
        beta: how much more the later perturbations weigh.
        original: model whose encoder measures the instability, as `load_model` takes it; empty uses the victim. The
            paper uses the original CLIP for adversarially fine-tuned victims.
    """

    name: ClassVar[str] = "ttc"
    random: ClassVar[bool] = True

    eps: float = 4 / 255
    step: float = 1 / 255
    steps: int = 2
    tau: float = 0.2
    beta: float = 2.0
    original: str = ""
    original_fingerprint: str = field(default="", metadata=FILLED_IN)

    def pinned(self) -> Self:
        if not self.original or self.original_fingerprint:
            return self
        return replace(self, original_fingerprint=load_model(self.original).fingerprint())

    def describe(self) -> dict[str, Any]:
        """Return the settings; `original` is the model's fingerprint, not the name that was given for it."""
        return super().describe() | {"original": self.pinned().original_fingerprint or "victim"}

    @property
    def cost(self) -> int:
        return 2 + 2 * self.steps + (2 if self.original else 0)

    def candidates(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Candidates:
        delta = random_start(pixels_BCHW, keys_B, self.eps, "linf")
        fixed, first = pixels_BCHW.detach(), delta.detach()
        with torch.no_grad():
            clean_BD = victim.embed(fixed, normalize=False)
        with torch.set_grad_enabled(self.through_gate):
            judged, encode = pixels_BCHW if self.through_gate else fixed, self._encoder(victim)
            known_BD = encode(judged) if self.original or self.through_gate else clean_BD
            tau_B = self.sensitivity(encode, judged, known_BD, first, keys_B)
        deltas, state = [delta], torch.zeros_like(fixed)
        for n in range(self.steps):
            moved = (fixed + delta.detach() + self.ahead(state)).requires_grad_()
            with torch.enable_grad():
                loss = feature_distance(clean_BD, victim.embed(moved, normalize=False), "squared").sum()
            (gradient,) = torch.autograd.grad(loss, moved)
            state = self.accumulate(state, gradient, rng.subkeys(keys_B, f"step {n}"))
            delta = project(delta + self.move(state), pixels_BCHW, self.eps, "linf")
            deltas.append(delta)
        kept, purified = ((pixels_BCHW + d).clamp(0, 1) for d in (deltas[0], weighted(deltas, self.beta)))
        return Candidates(kept, purified, self.tau - tau_B)

    def sensitivity(self, encode: Encode, pixels: Tensor, clean_BD: Tensor, delta: Tensor, keys_B: Tensor) -> Tensor:
        """Return how far the features `clean_BD` of images move under noise, `(B,)`, which `tau` is compared with."""
        return instability(clean_BD, encode(pixels + delta))

    def ahead(self, state: Tensor) -> Tensor | float:
        """Return how far ahead of the perturbation the gradient is taken."""
        return 0.0

    def accumulate(self, state: Tensor, gradient: Tensor, keys_B: Tensor) -> Tensor:
        """Return the state after a step, zeros at first: what `move` steps along."""
        return gradient

    def move(self, state: Tensor) -> Tensor:
        return self.step * state.sign()

    def _encoder(self, victim: ZeroShot) -> Encode:
        if not self.original:
            return lambda pixels: victim.embed(pixels, normalize=False)
        original = load_once(self.original, self.original_fingerprint, str(victim.clip.device))
        resized = original.with_resize(victim.clip.resize)
        return lambda pixels: resized.encode_image(pixels, normalize=False)


@dataclass(frozen=True, kw_only=True)
class NAC(TTC):
    """TTC with Nesterov momentum: the gradient is taken at x + d + momentum·v, and v <- momentum·v + step·sign(g) is
    added to d.

    Attributes:
        momentum: share of the previous step in the next; with 0 it is TTC.
    """

    name: ClassVar[str] = "nac"

    momentum: float = 0.9

    def ahead(self, state: Tensor) -> Tensor:
        return self.momentum * state

    def accumulate(self, state: Tensor, gradient: Tensor, keys_B: Tensor) -> Tensor:
        return self.momentum * state + self.step * gradient.sign()

    def move(self, state: Tensor) -> Tensor:
        return state


@dataclass(frozen=True, kw_only=True)
class DOC(TTC):
    """Directional orthogonal counterattack (AAAI 2026): steps along the sign of m <- momentum·m + (1 − momentum)·
    (g/‖g‖₂ + orthogonal·r), r a random direction of length 1 at right angles to g.

    The gate is soft. With τ̂ = 1 − mean of cos(f(x + n), f(x)) over `noises` random sign vectors n of size eps, the
    counterattack (TTC's weighted mean) has the share σ(gamma·(tau − τ̂)), d⁰ the rest. Paper: 4/255, four steps of
    3/255; the other defaults are those of a public implementation.

    Attributes:
        orthogonal: λ, length of the random direction.
        momentum: share of the former steps' direction.
        gamma: slope of the gate.
        noises: number of noisy images that τ̂ is measured on.
    """

    name: ClassVar[str] = "doc"

    step: float = 3 / 255
    steps: int = 4
    tau: float = 0.155
    orthogonal: float = 0.05
    momentum: float = 0.75
    gamma: float = 75.0
    noises: int = 5

    @property
    def cost(self) -> int:
        return super().cost + self.noises - 1

    def sensitivity(self, encode: Encode, pixels: Tensor, clean_BD: Tensor, delta: Tensor, keys_B: Tensor) -> Tensor:
        cosines, shape = [], tuple(pixels.shape[1:])
        for m in range(self.noises):
            signs = (rng.uniform(keys_B, shape, stream=_STREAM + m, dtype=pixels.dtype) - 0.5).sign()
            cosines.append(F.cosine_similarity(encode(pixels + self.eps * signs), clean_BD, dim=1))
        return 1 - torch.stack(cosines).mean(0)

    def accumulate(self, state: Tensor, gradient: Tensor, keys_B: Tensor) -> Tensor:
        along = steepest(gradient, "l2")
        noise = rng.gaussian(keys_B, tuple(gradient.shape[1:]), dtype=gradient.dtype)
        across = steepest(noise - (noise * along).sum((1, 2, 3), keepdim=True) * along, "l2")
        return self.momentum * state + (1 - self.momentum) * (along + self.orthogonal * across)

    def share(self, margin_B: Tensor) -> Tensor:
        return (self.gamma * margin_B).sigmoid()
