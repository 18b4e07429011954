"""How many images go through a model at once: found as cells run, by the memory that their batches took."""

from collections.abc import Hashable
from typing import Protocol

import torch

CPU_BATCH = 128  # images per forward; more are no faster on a CPU
GPU_BATCHES = 128, 1024  # the first batch that is tried, and the largest: beyond it a large GPU gains nothing
CPU_SHARD = 256  # images per result file, at most
_ENOUGH = 0.9  # share of the memory that a batch may take: what is free is in pieces


class Memory(Protocol):
    """The memory that batches run in."""

    def begin(self) -> None:
        """Begin to watch a batch."""

    def has_room_for_twice(self) -> bool:
        """Return whether a batch of twice the size of the last one would fit."""


class CudaMemory:
    """Memory of a GPU, or of a worker's share of it."""

    def __init__(self, device: torch.device, share: float) -> None:
        self._device, self._share, self._before = device, min(1.0, share), 0

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def has_room_for_twice(self) -> bool:
        free, total = torch.cuda.mem_get_info(self._device)
        room = min(self._share * total, free + torch.cuda.memory_reserved(self._device))
        batch = torch.cuda.max_memory_allocated(self._device) - self._before
        return self._before + 2 * batch <= _ENOUGH * room


class BatchSizes:
    """Sizes of batches, for each kind of work: given, or doubled as long as memory allows; halved where it is short.

    Args:
        given: images per batch; None finds them.
        memory: None gives batches of a size that is good on CPUs.
    """

    def __init__(self, given: int | None, memory: Memory | None) -> None:
        self._memory = None if given else memory
        self._first = given or (GPU_BATCHES[0] if memory else CPU_BATCH)
        self._sizes: dict[Hashable, int] = {}
        self._largest: dict[Hashable, int] = {}  # that was done
        self._full: set[Hashable] = set()  # kinds whose batches cannot grow

    def begin(self, kind: Hashable) -> int:
        """Return the size of the next batch of this kind."""
        if self._memory is not None:
            self._memory.begin()
        return self._sizes.get(kind, self._first)

    def fitted(self, kind: Hashable, images: int) -> None:
        """Record that a batch of so many images was done."""
        size = self._sizes.get(kind, self._first)
        self._largest[kind] = max(images, self._largest.get(kind, 0))
        if self._memory is None or kind in self._full or images < size:
            return
        if 2 * size <= GPU_BATCHES[1] and self._memory.has_room_for_twice():
            self._sizes[kind] = 2 * size
        else:
            self._full.add(kind)

    def halve(self, kind: Hashable, images: int) -> None:
        """Record that memory was short for a batch of so many images: the next is half as large, or the largest that
        was done."""
        largest = self._largest.pop(kind, 0)
        self._sizes[kind] = max(1, images // 2, largest if largest < images else 0)
        self._full.add(kind)
