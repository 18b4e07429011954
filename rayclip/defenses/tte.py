"""TTE, test-time transformations ensembling (Pérez et al. 2021): the mean prediction over flips and crops."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.defenses.base import Defense
from rayclip.models import ZeroShot
from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class TTE(Defense):
    """Ten views: the image and its four corner crops, resized to the image's size, and the mirror image of each; the
    prediction is the mean of their softmax (`models.zeroshot.merge_views`).

    Attributes:
        crop: side of a crop, as a share of the image's side.
    """

    name: ClassVar[str] = "tte"
    smooth: ClassVar[bool] = True

    crop: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise UserError(f"tte:crop={self.crop} is a share of the image's side: give one in (0, 1], such as 0.875.")

    @property
    def view_count(self) -> int:
        return 10

    def views(self, victim: ZeroShot, pixels_BCHW: Tensor, keys_B: Tensor) -> Tensor:
        size = tuple(pixels_BCHW.shape[-2:])
        height, width = (max(1, round(side * self.crop)) for side in size)
        corners = [
            pixels_BCHW[..., top : top + height, left : left + width]
            for top in (0, size[0] - height)
            for left in (0, size[1] - width)
        ]
        crops = [F.interpolate(c, size=size, mode="bicubic", antialias=True).clamp(0, 1) for c in corners]
        upright = torch.stack([pixels_BCHW, *crops], 1)
        return torch.cat([upright, upright.flip(-1)], 1)
