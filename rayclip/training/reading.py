"""Read batches of decoded images, optionally ahead of time in separate processes."""

import multiprocessing
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rayclip.data import ImageSet, Resolution, batch_pixels
from rayclip.types import UserError


def read_batches(
    data: ImageSet,
    batches: Iterable[np.ndarray],
    *,
    resolution: Resolution,
    image_size: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pixels (uint8, `(B, 3, H, W)`) and positions of each batch, in order.

    Args:
        batches: positions in `data`; may cover the whole run, since it is consumed lazily.
        workers: processes that decode; they live until the last batch. 0 decodes in this process.

    Raises:
        UserError, OSError: an image could not be read, in this or a decoding process.
    """
    context = None
    if workers:
        # A plain fork would copy this process with the locks that its threads (Ray's, CUDA's) hold at that moment
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    loader = DataLoader(
        _Decoded(data, resolution, image_size),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        pin_memory=pin_memory,
    )
    for found in loader:
        if isinstance(found, Exception):
            raise found
        yield found


class TimedBatches:
    """Iterates over batches, and counts the seconds that its user waits for them."""

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        self._batches, self._waited = batches, 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            began = time.monotonic()
            batch = next(self._batches, None)
            self._waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def take(self) -> float:
        """Return the seconds since this was last called."""
        found, self._waited = self._waited, 0.0
        return found


class _Decoded(Dataset):
    """A dataset whose items are whole decoded batches: the sampler yields arrays of positions.

    An error is returned as an item: torch would wrap a worker's exception into one with a traceback as its message.
    """

    def __init__(self, data: ImageSet, resolution: Resolution, image_size: int) -> None:
        self._data, self._resolution, self._image_size = data, resolution, image_size

    def __getitem__(self, positions: np.ndarray) -> tuple[Tensor, Tensor] | Exception:
        try:
            pixels = batch_pixels(self._data, positions.tolist(), self._resolution, self._image_size)
        except (UserError, OSError) as error:
            return error
        return pixels, torch.from_numpy(positions)
