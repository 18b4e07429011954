"""Resizes images to a model's input size inside its differentiable forward pass.

On a GPU by two small matrix products: the gradient of torch's anti-aliasing kernel is summed there in another order
each time, and takes seven times as long. Values differ in the last bits, so that a CPU keeps the kernel.

Shapes: B batch, C channels, H W any size, S side of the model's input.
"""

import functools
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.types import UserError

Resize = Literal["antialias", "plain"]


def resized(pixels_BCHW: Tensor, side: int, how: Resize) -> Tensor:
    """Resize bicubically, `(B, C, side, side)`; images of that size are returned unchanged.

    Args:
        how: `antialias` as PIL does it (a = -0.5, the kernel widened by the factor of reduction); `plain` as the code
            of TeCoA and MMCoA does it (torch's bicubic kernel, a = -0.75, without anti-aliasing). Enlarged images
            differ too, because the kernels do.
    """
    if pixels_BCHW.shape[-2:] == (side, side):
        return pixels_BCHW
    if pixels_BCHW.is_cuda:
        return resized_by_products(pixels_BCHW, side, how)
    return F.interpolate(pixels_BCHW, size=(side, side), mode="bicubic", antialias=how == "antialias")


def resized_by_products(pixels_BCHW: Tensor, side: int, how: Resize) -> Tensor:
    """Return `resized` up to rounding, by a matrix that mixes rows and one that mixes columns."""
    kind = how, pixels_BCHW.dtype, pixels_BCHW.device
    rows_SH, columns_SW = (_mixing(size, side, *kind) for size in pixels_BCHW.shape[-2:])
    with torch.autocast(pixels_BCHW.device.type, enabled=False):
        return rows_SH @ pixels_BCHW @ columns_SW.T


@functools.lru_cache(maxsize=64)
def _mixing(size: int, side: int, how: Resize, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights of `size` rows in each of `side` rows, `(side, size)`: what an identity matrix becomes."""
    identity = torch.eye(size, dtype=torch.float64)[None, None]
    weights = F.interpolate(identity, size=(side, size), mode="bicubic", antialias=how == "antialias")
    return weights[0, 0].to(device, dtype)


def check_resize(how: str, resolution: str) -> None:
    """Raise a `UserError` for an unknown way to resize, or one that does not apply at this resolution."""
    if how not in get_args(Resize):
        raise UserError(f"resize '{how}' is none: use antialias or plain.")
    if how == "plain" and resolution != "native":
        raise UserError(
            "resize plain is how the papers' code enlarges images that it perturbs at their own size; at resolution "
            f"{resolution} they are resized before: leave --resize away, or choose --resolution native."
        )
