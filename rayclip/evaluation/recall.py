"""Recall at k in both directions, from embeddings of images and captions.

Text retrieval (TR): the query is an image, right if any of its captions is among the k nearest captions. Image
retrieval (IR): the query is a caption, right if its image is among the k nearest images. A query's rank is the number
of wrong candidates that score at least as high as its best right one, so ties count against it: a constant embedding
scores 0, not 100 %, and the order of rows does not matter.

Shapes: I images, T captions, D embedding, B a block of queries.
"""

from collections.abc import Callable, Sequence
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
    """Normalised embeddings of images `(I, D)` and of all their captions `(T, D)`.

    Attributes:
        owner_T: index of each caption's image, `(T,)` int64 in 0..I-1.
    """

    image_ID: Tensor
    text_TD: Tensor
    owner_T: Tensor


def recall_at(similarity_IT: Tensor, owner_T: Tensor, ks: Sequence[int] = KS) -> tuple[Recall, ...]:
    """Compute recall from all similarities.

    Args:
        similarity_IT: `(I, T)`, larger is nearer.
        owner_T: `(T,)` int64, index of each caption's image; every image has at least one caption.
        ks: values of k, each at least 1. A k above the number of candidates counts all of them.

    Returns:
        TR at each k, then IR at each k.

    Raises:
        ValueError: an image without a caption, an owner that is no image, or a k below 1.
        FloatingPointError: similarities that are not finite.
    """
    images = similarity_IT.shape[0]
    return _recalls(lambda s: similarity_IT[s], lambda s: similarity_IT[:, s], owner_T, images, ks)


def recall_of(embedded: Embedded, ks: Sequence[int] = KS) -> tuple[Recall, ...]:
    """Compute `recall_at` of the inner products, one block of them at a time, on the embeddings' device."""
    image_ID, text_TD = embedded.image_ID, embedded.text_TD
    return _recalls(
        lambda s: image_ID[s] @ text_TD.T, lambda s: image_ID @ text_TD[s].T, embedded.owner_T, len(image_ID), ks
    )


def _recalls(
    rows: Callable[[slice], Tensor],
    columns: Callable[[slice], Tensor],
    owner_T: Tensor,
    images: int,
    ks: Sequence[int],
) -> tuple[Recall, ...]:
    """Compute recall from blocks of similarities: some images with all captions, and all images with some captions."""
    captions = len(owner_T)
    if not ks or min(ks) < 1:
        raise ValueError(f"recall wants k of at least 1, not {list(ks)}")
    if not torch.equal(owner_T.unique().cpu(), torch.arange(images)):
        raise ValueError("every image needs a caption, and every caption an image")
    blocks_I = [slice(i, i + _BLOCK) for i in range(0, images, _BLOCK)]
    blocks_T = [slice(i, i + _BLOCK) for i in range(0, captions, _BLOCK)]
    ranks: dict[Direction, Tensor] = {
        "tr": torch.cat([_text_ranks(rows(s), owner_T, s.start) for s in blocks_I]),
        "ir": torch.cat([_image_ranks(columns(s), owner_T[s]) for s in blocks_T]),
    }
    return tuple(
        Recall(direction=direction, k=k, right=int((rank < k).sum()), n=len(rank))
        for direction, rank in ranks.items()
        for k in ks
    )


def _text_ranks(similarity_BT: Tensor, owner_T: Tensor, first: int) -> Tensor:
    """Return for images `first`, `first + 1`, … how many captions of others score no lower than their own best one."""
    _check_finite(similarity_BT)
    own_BT = owner_T == torch.arange(first, first + len(similarity_BT), device=owner_T.device)[:, None]
    best_B = similarity_BT.masked_fill(~own_BT, -torch.inf).amax(1)
    return ((similarity_BT >= best_B[:, None]) & ~own_BT).sum(1)


def _image_ranks(similarity_IB: Tensor, owner_B: Tensor) -> Tensor:
    """Return for each caption how many other images score no lower than its own."""
    _check_finite(similarity_IB)
    own_B = similarity_IB.gather(0, owner_B[None])
    return (similarity_IB >= own_B).sum(0) - 1  # its own image is counted too


def _check_finite(similarity: Tensor) -> None:
    if not similarity.isfinite().all():  # comparisons with NaN are false: it would count as a perfect rank
        raise FloatingPointError("similarities are not finite: the model gives NaN or infinite embeddings")
