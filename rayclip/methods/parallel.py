"""Collective operations that make the loss over several workers equal the loss over one big batch.

Every rank computes the terms of its own samples; `global_mean` scales them so that DDP's average over ranks is the mean
over the global batch, even if ranks hold different numbers of samples.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) outside torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def local_count(total: int, rank: int, size: int) -> int:
    """Return how many samples of a global batch a rank holds if they are dealt out one by one."""
    return (total - rank + size - 1) // size


def global_mean(terms_B: Tensor, total: int) -> Tensor:
    """Return this rank's part of the mean over all `total` samples; the average over ranks is that mean."""
    return terms_B.sum() * (world()[1] / total)


def gather(rows_BD: Tensor, total: int) -> Tensor:
    """Return all ranks' rows in rank order, `(total, D)`; gradients flow back to the rank that owns a row."""
    size = world()[1]
    return rows_BD if size == 1 else _Gather.apply(rows_BD, [local_count(total, r, size) for r in range(size)])


def own_rows(total: int) -> slice:
    """Return the slice of this rank's rows in the result of `gather`."""
    rank, size = world()
    start = sum(local_count(total, r, size) for r in range(rank))
    return slice(start, start + local_count(total, rank, size))


class _Gather(torch.autograd.Function):
    """all_gather of unequal row counts; its backward sums every rank's gradient for the rows this rank owns."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[dist.get_rank()], None
