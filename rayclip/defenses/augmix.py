"""Random views of images: crops, and AugMix (Hendrycks et al., ICLR 2020) on them, as test-time prompt tuning has it.

Shapes: B batch, V views, N = B·V images, C H W image.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip import rng
from rayclip.attacks.geometry import per_image

Augment = Literal["augmix", "crops"]

OPERATIONS = (
    *("autocontrast", "equalize", "posterize", "rotate", "solarize"),
    *("shear-x", "shear-y", "translate-x", "translate-y"),
)
_TRIES, _BRANCHES, _DEPTH = 10, 3, 3
_CROP = 2 * _TRIES + 3  # random numbers of a crop
_PER_BRANCH = 1 + 3 * _DEPTH
_MIX = _BRANCHES + 1 + _BRANCHES * _PER_BRANCH


def random_views(pixels_BCHW: Tensor, keys_B: Tensor, count: int, augment: Augment) -> Tensor:
    """Return `count` views of each image, `(B, V, C, H, W)` in [0, 1].

    `crops`: 8 to 100 % of the area, sides as 3:4 to 4:3, resized to the image's size, half of them mirrored. `augmix`:
    such a crop mixed with three chains of one to three operations on it, severity 1. Derivatives of operations that
    have none (posterize, equalize) are the identity's.
    """
    numbers = rng.uniform(keys_B, (count, _CROP + _MIX), dtype=pixels_BCHW.dtype).flatten(0, 1)
    images = pixels_BCHW.repeat_interleave(count, 0)
    crops = _crop(images, numbers[:, :_CROP])
    if augment == "augmix":
        crops = _mix(crops, numbers[:, _CROP:])
    return crops.clamp(0, 1).unflatten(0, (-1, count))


def _crop(images: Tensor, numbers: Tensor) -> Tensor:
    """Return a crop of each image, resized bilinearly. The first of ten draws that fits counts; else the image."""
    height, width = images.shape[-2:]
    tries = numbers[:, : 2 * _TRIES].view(-1, _TRIES, 2)
    area = (0.08 + 0.92 * tries[..., 0]) * height * width
    ratio = ((2 * tries[..., 1] - 1) * math.log(4 / 3)).exp()
    wide, high = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (wide <= width) & (high <= height)
    first = fits.int().argmax(1, keepdim=True)
    whole = ~fits.any(1)
    share_x, share_y = (
        torch.where(whole, 1.0, size.gather(1, first).squeeze(1) / side)
        for size, side in ((wide, width), (high, height))
    )
    left, top, flip = numbers[:, 2 * _TRIES :].unbind(1)
    # In coordinates of [-1, 1], point o of the crop shows the image's point share·o + offset
    mirrored = torch.where(flip < 0.5, -share_x, share_x)
    zero = torch.zeros_like(share_x)
    matrix = torch.stack(
        (mirrored, zero, (2 * left - 1) * (1 - share_x), zero, share_y, (2 * top - 1) * (1 - share_y)), 1
    )
    return _warp(images, matrix, "border")


def _mix(crops: Tensor, numbers: Tensor) -> Tensor:
    """Return m·crop + (1 − m)·Σ w_i·chain_i(crop), m ~ U(0, 1), w ~ Dirichlet(1, 1, 1)."""
    weight = -(1 - numbers[:, :_BRANCHES]).log()
    weight = weight / weight.sum(1, keepdim=True)
    own = numbers[:, _BRANCHES]
    mixed = torch.zeros_like(crops)
    for branch, drawn in enumerate(numbers[:, _BRANCHES + 1 :].split(_PER_BRANCH, 1)):
        depth, changed = (drawn[:, 0] * _DEPTH).floor() + 1, crops
        for step in range(_DEPTH):
            kind, level, sign = drawn[:, 1 + 3 * step : 4 + 3 * step].unbind(1)
            operation, way = (kind * len(OPERATIONS)).floor(), torch.where(sign < 0.5, -1.0, 1.0)
            new = operate(changed, operation, 0.1 + 0.9 * level, way)
            changed = torch.where(per_image(step < depth), new, changed)
        mixed = mixed + per_image(weight[:, branch]) * changed
    return per_image(own) * crops + per_image(1 - own) * mixed


def operate(images: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Apply one operation to each image: AugMix's at severity 1, `level` in 0.1 to 1.

    Args:
        operation: index into `OPERATIONS`, `(N,)`.
        sign: -1 or 1, the direction of rotations, shears and translations.
    """

    def chosen(name: str) -> Tensor:
        return operation == OPERATIONS.index(name)

    one, zero = torch.ones_like(level), torch.zeros_like(level)
    angle = torch.where(chosen("rotate"), sign * (3 * level).floor() * math.pi / 180, zero)
    shear_x, shear_y = (torch.where(chosen(f"shear-{axis}"), sign * 0.03 * level, zero) for axis in "xy")
    shift_x, shift_y = (torch.where(chosen(f"translate-{axis}"), sign * level / 15, zero) for axis in "xy")
    matrix = torch.stack(
        (
            *(one * angle.cos(), shear_x - angle.sin(), shift_x + shear_x),
            *(shear_y + angle.sin(), one * angle.cos(), shift_y + shear_y),
        ),
        1,
    )
    result = _warp(images, matrix, "zeros")
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = high - low < 0.5 / 255
    stretched = torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low))
    limit = per_image((256 - (25.6 * level).floor()) / 255)
    for name, new in (
        ("autocontrast", stretched),
        ("posterize", _straight(images, (images * 255).round().div(16).floor() * 16 / 255)),
        ("solarize", torch.where(images < limit, images, 1 - images)),
        ("equalize", _straight(images, _equalized(images.detach()))),
    ):
        result = torch.where(per_image(chosen(name)), new, result)
    return result


def _equalized(images: Tensor) -> Tensor:
    """Return images whose channels' histograms, of 256 values, are as flat as can be."""
    from torchvision.transforms.v2 import functional

    return functional.equalize((images * 255).round().to(torch.uint8)).to(images.dtype) / 255


def _straight(images: Tensor, changed: Tensor) -> Tensor:
    return images + (changed - images).detach()


def _warp(images: Tensor, matrix: Tensor, outside: Literal["zeros", "border"]) -> Tensor:
    """Return images whose point o shows the point `matrix · (o, 1)` of the given ones; matrix `(N, 6)`."""
    grid = F.affine_grid(matrix.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=outside, align_corners=False)
