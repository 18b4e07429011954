"""Variants of gradient attacks for better transfer: they change the gradient, never the verdict.

MI (Dong et al. 2018, equation 6), DI (Xie et al. 2019) and SI (Lin et al. 2020, equation 7), alone or combined. They
use two hooks of the loop in `base`: `views` chooses the images at which the loss is taken, `accumulate` the direction
that is followed.

Shapes: A samples that are being attacked, C H W image.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip import rng

Variant = Literal["plain", "mi", "di", "si", "mi-di", "mi-si", "di-si", "mi-di-si"]

# (pixels_ACHW, indices_A into the batch) -> (loss_A to maximise, broken_A)
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

DECAY = 1.0  # MI's mu
PROBABILITY = 0.5  # DI's p
SMALLEST = 299 / 330  # DI's smallest side, as a share of the canvas
SCALES = 5  # SI's m

_STREAM = 1 << 20  # beyond the streams of random starts


def views(
    variant: Variant, forward: Forward, keys_A: Tensor, step: int, *, judge: bool
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]:
    """Wrap `forward` for a variant: `(pixels, indices) -> (loss_A, broken_A, forward passes per sample)`.

    Args:
        step: number of the step; DI draws new random numbers in each.
        judge: whether `broken_A` is needed; if not, DI saves the forward pass of the image itself.
    """

    def look(pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor, int]:
        diverse = "di" in variant
        losses, broken = [], None
        if diverse and judge:
            with torch.no_grad():
                _, broken = forward(pixels, index)
        count = SCALES if "si" in variant else 1
        for i in range(count):
            view = pixels / 2**i
            if diverse:
                view = resize_and_pad(view, keys_A, stream=_STREAM + step * SCALES + i)
            loss, verdict = forward(view, index)
            losses.append(loss)
            broken = verdict if broken is None else broken
        assert broken is not None
        return torch.stack(losses).mean(0), broken, count + int(diverse and judge)

    return look if variant != "plain" else lambda pixels, index: (*forward(pixels, index), 1)


def accumulate(variant: Variant, direction: Tensor, gradient: Tensor) -> Tensor:
    """Return the direction that a step follows: the gradient, or with MI `g <- mu·g + gradient / ‖gradient‖_1`."""
    if "mi" not in variant:
        return gradient
    length = gradient.abs().sum((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    return DECAY * direction + gradient / length


def resize_and_pad(pixels_ACHW: Tensor, keys_A: Tensor, *, stream: int) -> Tensor:
    """Apply DI: with probability p, shrink each image to a random share of its canvas, at a random place, padded with
    zeros.

    The paper enlarges the canvas instead; here the model would resize that back, as CLIP's input has one size. Side and
    place are continuous, and every image has its own, so one warp serves the whole batch.
    """
    chosen, side, left, top = rng.uniform(keys_A, (4,), stream=stream, dtype=pixels_ACHW.dtype).unbind(1)
    share = SMALLEST + (1 - SMALLEST) * side
    zero = torch.zeros_like(share)
    # In coordinates of [-1, 1], point o on the canvas shows the image's point (o + 1 - 2·offset) / share - 1.
    shift_x, shift_y = ((1 - 2 * place * (1 - share)) / share - 1 for place in (left, top))
    matrix = torch.stack((1 / share, zero, shift_x, zero, 1 / share, shift_y), 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(pixels_ACHW.shape), align_corners=False)
    warped = F.grid_sample(pixels_ACHW, grid, padding_mode="zeros", align_corners=False)
    return torch.where((chosen < PROBABILITY).view(-1, 1, 1, 1), warped, pixels_ACHW)
