"""Recall at k in both directions, from embeddings of images and captions.

Text retrieval (TR): the query is an image, right if any of its captions is among the k nearest captions. Image
retrieval (IR): the query is a caption, right if its image is among the k nearest images. A query's rank is the number
of wrong candidates that score at least as high as its best right one, so ties count against it: a constant embedding
scores 0, not 100 %, and the order of rows does not matter.

Shapes: I images, T captions, D embedding, B a block of queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["tr", "ir"]

KS = (1, 5, 10)
_BLOCK = 256  # queries compared with all candidates at once: 256 × 25,000 fp32 are 26 MB


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Recall at `k` in one direction: `right` of `n` queries find a match among the `k` nearest."""

    direction: Direction
    k: int
    right: int
    n: int


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Normalised embeddings of images `(I, D)` and of all their captions `(T, D)`, and the index of each caption's
    image `(T,)`."""

    image_ID: Tensor
    text_TD: Tensor
    owner_T: Tensor


def recall_of(embedded: Embedded, ks: Sequence[int] = KS) -> tuple[Recall, ...]:
    """Compute TR at each k, then IR at each k, from inner products: one block of them at a time, on their device.

    Args:
        ks: values of k, each at least 1. A k above the number of candidates counts all of them.

    Raises:
        ValueError: an image without a caption, an owner that is no image, or a k below 1.
        FloatingPointError: similarities that are not finite.
    """
    image_ID, text_TD, owner_T = embedded.image_ID, embedded.text_TD, embedded.owner_T
    index_I = torch.arange(len(image_ID), device=owner_T.device)
    if not ks or min(ks) < 1:
        raise ValueError(f"recall wants k of at least 1, not {list(ks)}")
    if not torch.equal(owner_T.unique(), index_I):
        raise ValueError("every image needs a caption, and every caption an image")
    text_ranks, image_ranks = [], []
    for i in range(0, len(image_ID), _BLOCK):
        similarity_BT = _similarity(image_ID[i : i + _BLOCK], text_TD)
        own_BT = owner_T == index_I[i : i + _BLOCK, None]
        best_B = similarity_BT.masked_fill(~own_BT, -torch.inf).amax(1)
        text_ranks.append(((similarity_BT >= best_B[:, None]) & ~own_BT).sum(1))
    for i in range(0, len(text_TD), _BLOCK):
        similarity_BI = _similarity(image_ID, text_TD[i : i + _BLOCK]).T
        own_B = similarity_BI.gather(1, owner_T[i : i + _BLOCK, None])
        image_ranks.append((similarity_BI >= own_B).sum(1) - 1)  # its own image is counted too
    ranks: dict[Direction, Tensor] = {"tr": torch.cat(text_ranks), "ir": torch.cat(image_ranks)}
    return tuple(
        Recall(direction=direction, k=k, right=int((rank < k).sum()), n=len(rank))
        for direction, rank in ranks.items()
        for k in ks
    )


def _similarity(image_ID: Tensor, text_TD: Tensor) -> Tensor:
    similarity_IT = image_ID @ text_TD.T
    if not similarity_IT.isfinite().all():  # comparisons with NaN are false: it would count as a perfect rank
        raise FloatingPointError("similarities are not finite: the model gives NaN or infinite embeddings")
    return similarity_IT
