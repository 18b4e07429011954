"""TTC, test-time counterattacks (Xing et al., CVPR 2025): perturbs images whose features are suspiciously stable, a
sign of an attack, away from their current features.

Shapes: B batch, N steps, C H W image, D embedding.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rayclip.attacks.feature import feature_distance
from rayclip.attacks.geometry import per_image, project, random_start
from rayclip.defenses.base import Purifier
from rayclip.models import ZeroShot, load_model
from rayclip.models.opening import load_once
from rayclip.settings import FILLED_IN


def instability(clean_BD: Tensor, noisy_BD: Tensor) -> Tensor:
    """Return tau = ‖f(x + d⁰) − f(x)‖ / ‖f(x)‖ of un-normalised features, `(B,)`; low if an attack made them stable."""
    return (noisy_BD - clean_BD).norm(dim=1) / clean_BD.norm(dim=1)


def weighted(deltas: list[Tensor], beta: float) -> Tensor:
    """Return the mean of d⁰ .. d^N with weights softmax(beta·n)."""
    weights = (beta * torch.arange(len(deltas), dtype=torch.float64)).softmax(0).tolist()
    return sum((w * d for w, d in zip(weights[1:], deltas[1:], strict=True)), weights[0] * deltas[0])


@dataclass(frozen=True, kw_only=True)
class TTC(Purifier):
    """Counterattack: d⁰ ~ U(-eps, eps); `steps` signed steps raise ‖f(x + d) − f(x)‖². If `instability` is `tau` or
    more, the image gets d⁰ alone, else the weighted mean of d⁰ .. d^N.

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

    def purify(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        delta = random_start(pixels_BCHW, keys_B, self.eps, "linf")
        fixed, first = pixels_BCHW.detach(), delta.detach()
        with torch.no_grad():
            clean_BD = victim.embed(fixed, normalize=False)
            tau_B = self._instability(victim, fixed, first, clean_BD)
        deltas = [delta]
        for _ in range(self.steps):
            moved = (fixed + delta.detach()).requires_grad_()
            with torch.enable_grad():
                loss = feature_distance(clean_BD, victim.embed(moved, normalize=False), "squared").sum()
            (gradient,) = torch.autograd.grad(loss, moved)
            delta = project(delta + self.step * gradient.sign(), pixels_BCHW, self.eps, "linf")
            deltas.append(delta)
        chosen = torch.where(per_image(tau_B >= self.tau), deltas[0], weighted(deltas, self.beta))
        return (pixels_BCHW + chosen).clamp(0, 1)

    def _instability(self, victim: ZeroShot, pixels: Tensor, delta: Tensor, clean_BD: Tensor) -> Tensor:
        if not self.original:
            return instability(clean_BD, victim.embed(pixels + delta, normalize=False))
        original = load_once(self.original, self.original_fingerprint, str(pixels.device))
        encode = original.with_resize(victim.clip.resize).encode_image
        return instability(encode(pixels, normalize=False), encode(pixels + delta, normalize=False))
