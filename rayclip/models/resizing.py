"""Resizes images to a model's input size inside its differentiable forward pass.

Shapes: B batch, C channels, H W any size, S side of the model's input.
"""

from typing import Literal, get_args

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
    return F.interpolate(pixels_BCHW, size=(side, side), mode="bicubic", antialias=how == "antialias")


def check_resize(how: str, resolution: str) -> None:
    """Raise a `UserError` for an unknown way to resize, or one that does not apply at this resolution."""
    if how not in get_args(Resize):
        raise UserError(f"resize '{how}' is none: use antialias or plain.")
    if how == "plain" and resolution != "native":
        raise UserError(
            "resize plain is how the papers' code enlarges images that it perturbs at their own size; at resolution "
            f"{resolution} they are resized before: leave --resize away, or choose --resolution native."
        )
