"""Objectives of other attacks for the training attack, in place of the method's own.

Shapes: B batch, M texts per class, K classes, D embedding.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayclip.attacks.feature import FeatureAttack, feature_distance
from rayclip.attacks.pgd import PGD
from rayclip.attacks.registry import ATTACKS
from rayclip.models import Clip
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.methods.base import Batch

OWN = "own"  # the method's own


def check_objective(name: str, start: str) -> None:
    """Raise a `UserError` if no attack of that name can provide the training attack's objective."""
    if name not in _possible():
        raise UserError(f"--attack '{name}' is no training attack: use {OWN} or one of {', '.join(_possible())}.")
    if issubclass(ATTACKS.find(name), FeatureAttack) and start == "zero":
        raise UserError("the feature attack cannot start at zero, where its gradient vanishes: use --start random.")


def _possible() -> list[str]:
    """Return the attacks that are steps of PGD on a loss, in any norm."""
    return [
        name
        for name, kind in ATTACKS.items()
        if kind is FeatureAttack or (issubclass(kind, PGD) and "norm" in kind.settings())
    ]


def objective_of(name: str, clip: Clip, batch: "Batch", texts_per_class: int) -> Callable[[Tensor], Tensor]:
    """Return an attack's objective on this batch, `pixels (B, C, H, W) -> (B,)`; with several texts per class, their
    mean.

    Args:
        texts_per_class: M; `batch.texts` holds all classes' first texts, then all second ones, ...
    """
    kind = ATTACKS.find(name)
    if issubclass(kind, FeatureAttack):
        with torch.no_grad():
            clean_BD = clip.encode_image(batch.pixels_BCHW, normalize=False)
        return lambda pixels: feature_distance(clean_BD, clip.encode_image(pixels, normalize=False), "squared")
    attack = kind()
    assert isinstance(attack, PGD)
    with torch.no_grad():
        text_PD = batch.texts.all()
    labels_BM = batch.labels_B.repeat_interleave(texts_per_class)

    def objective(pixels: Tensor) -> Tensor:
        logits_BMK = (clip.scale * clip.encode_image(pixels) @ text_PD.T).unflatten(1, (texts_per_class, -1))
        return attack.loss(logits_BMK.flatten(0, 1), labels_BM).unflatten(0, (-1, texts_per_class)).mean(1)

    return objective
