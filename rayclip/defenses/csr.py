"""CSR, contrastive spectral rectification (arXiv 2601.19210, 2026): images that a low-pass filter changes too much are
moved toward their filtered form.

Shapes: B batch, C H W image, D embedding.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rayclip.attacks.geometry import per_image, project
from rayclip.defenses.base import Candidates, GatedPurifier
from rayclip.models import ZeroShot
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class CSR(GatedPurifier):
    """Where cos(f(x), f(low x)) < `threshold`, signed steps from d = 0 raise cos(f(x + d), f(low x)) − cos(f(x + d),
    f(x)); the other images stay as they are.

    Attributes:
        eps, step: in pixel units.
        steps: number of steps.
        threshold: of the cosine; with -1 no image is changed.
        radius: standard deviation of the gaussian filter in the frequency domain, as a share of the image's side: the
            public code's 40 at 224 pixels.
        keep: `best` iterate by the objective, as the public code, or the `last`, as the paper's formula.
    """

    name: ClassVar[str] = "csr"

    eps: float = 4 / 255
    step: float = 2 / 255
    steps: int = 3
    threshold: float = 0.85
    radius: float = 40 / 224
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise UserError(f"csr:radius={self.radius} is a share of the image's side: give one above 0, such as 0.18.")

    @property
    def cost(self) -> int:
        return 3 + 2 * self.steps

    def candidates(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Candidates:
        with torch.set_grad_enabled(self.through_gate):
            judged = pixels_BCHW if self.through_gate else pixels_BCHW.detach()
            image_BD, low_BD = victim.embed(judged), victim.embed(low_pass(judged, self.radius))
            margin_B = self.threshold - (image_BD * low_BD).sum(1)
        away_BD = (low_BD - image_BD).detach()  # cos(f, low) − cos(f, f(x)) is <f, low − f(x)>
        delta = best = torch.zeros_like(pixels_BCHW)
        highest_B = torch.full_like(margin_B, -torch.inf).detach()
        for n in range(self.steps + 1):
            moved = (pixels_BCHW + delta).detach().requires_grad_()
            with torch.enable_grad():
                score_B = (victim.embed(moved) * away_BD).sum(1)
                total = score_B.sum()
            better_B = score_B.detach() > highest_B
            best = torch.where(per_image(better_B), delta, best)
            highest_B = torch.where(better_B, score_B.detach(), highest_B)
            if n < self.steps:
                (gradient,) = torch.autograd.grad(total, moved)
                delta = project(delta + self.step * gradient.sign(), pixels_BCHW, self.eps, "linf")
        chosen = best if self.keep == "best" else delta
        return Candidates(pixels_BCHW, (pixels_BCHW + chosen).clamp(0, 1), margin_B)


def low_pass(pixels_BCHW: Tensor, radius: float) -> Tensor:
    """Return images with frequency (y, x) damped by exp(-(y² + x²) / 2r²), clipped to [0, 1].

    Args:
        radius: as a share of the image's side.
    """
    high, wide = pixels_BCHW.shape[-2:]
    # fftfreq counts cycles per pixel: frequencies as shares of the side
    y, x = (torch.fft.fftfreq(side, dtype=pixels_BCHW.dtype, device=pixels_BCHW.device) for side in (high, wide))
    mask = (-(y[:, None].square() + x.square()) / (2 * radius**2)).exp()
    return torch.fft.ifft2(torch.fft.fft2(pixels_BCHW) * mask).real.clamp(0, 1)
