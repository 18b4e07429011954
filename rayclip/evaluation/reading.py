"""Read batches of images in threads while earlier ones are attacked."""

import copy
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from rayclip.data import ImageSet, Resolution, batch_pixels
from rayclip.data.images import mixed_sizes


class Reading(NamedTuple):
    """Seconds of reading images.

    Attributes:
        decoding: of all threads together.
        waiting: in which the reader's user waited for images.
        threads: number of threads.
    """

    decoding: float
    waiting: float
    threads: int


NOT_READ = Reading(0.0, 0.0, 1)


class Reader:
    """Reads batches of images, the next one while this one is attacked.

    Args:
        threads: that decode the images of a batch; each has a copy of the data, which need not be thread-safe.
        pin: whether pixels go to a GPU.
    """

    def __init__(
        self, data: ImageSet, resolution: Resolution, image_size: int, *, threads: int = 1, pin: bool = False
    ) -> None:
        self._data = [data, *(copy.deepcopy(data) for _ in range(threads - 1))]
        self._resolution, self._size, self._pin = resolution, image_size, pin
        self._batches, self._decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)
        self._coming: tuple[Sequence[int], Future[Tensor]] | None = None
        self._decoding = [0.0] * threads
        self._waiting = 0.0

    def __call__(self, positions: Sequence[int], *, then: Sequence[int]) -> Tensor:
        """Return the pixels (uint8) of these images, and begin to read those that are likely to be wanted next."""
        if self._coming is None or self._coming[0] != positions:  # the first, or the size of batches has changed
            self._coming = positions, self._batches.submit(self._read, positions)
        _, found = self._coming
        self._coming = (then, self._batches.submit(self._read, then)) if then else None
        began = time.perf_counter()
        try:
            return found.result()
        finally:
            self._waiting += time.perf_counter() - began

    def take(self) -> Reading:
        """Return the seconds since this was last called."""
        found = Reading(sum(self._decoding), self._waiting, len(self._data))
        self._decoding, self._waiting = [0.0] * len(self._data), 0.0
        return found

    def _read(self, positions: Sequence[int]) -> Tensor:
        threads = min(len(self._data), len(positions))
        bounds = [len(positions) * i // threads for i in range(threads + 1)]
        shares = [positions[first:last] for first, last in itertools.pairwise(bounds)]
        parts = list(self._decoders.map(self._decode, range(threads), shares))
        if len({part.shape[1:] for part in parts}) > 1:
            raise mixed_sizes(self._data[0])
        pixels = parts[0] if threads == 1 else torch.cat(parts)
        return pixels.pin_memory() if self._pin else pixels

    def _decode(self, thread: int, positions: Sequence[int]) -> Tensor:
        began = time.perf_counter()
        found = batch_pixels(self._data[thread], positions, self._resolution, self._size)
        self._decoding[thread] += time.perf_counter() - began
        return found
