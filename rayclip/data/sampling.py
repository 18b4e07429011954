"""Which images are used, and in which order: k-shot subsets and epochs of shuffled batches, to train; draws, to test.

All are fixed by the seed and independent of the cluster.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rayclip.data.images import ImageSet
from rayclip.types import UserError

Subset = Literal["even", "robustvlm"]  # the images that a limit keeps: evenly spaced, or RobustVLM's draw
_READERS, _BUFFER, _BATCH = 4, 10_000, 50  # of RobustVLM's code


def webdataset_draw(archives: Sequence[int], count: int, seed: int = 0) -> np.ndarray:
    """Return the positions, ascending, of the `count` images that RobustVLM's code draws from a WebDataset.

    Four readers share the archives in turn. Each shuffles its images in a buffer of 10,000, with Python's generator of
    this seed, and gives batches of 50, which are taken in turn (`CLIP_benchmark/clip_benchmark/cli.py` of
    chs20/RobustVLM, with webdataset 0.2.48).

    Args:
        archives: images in each archive, in order.
    """
    ends = list(itertools.accumulate(archives))
    parts = [range(end - size, end) for end, size in zip(ends, archives, strict=True)]
    readers = [_shuffle(itertools.chain(*parts[i::_READERS]), random.Random(seed)) for i in range(_READERS)]
    drawn: list[int] = []
    while readers and len(drawn) < count:
        batches = [list(itertools.islice(reader, _BATCH)) for reader in readers]
        readers = [reader for reader, batch in zip(readers, batches, strict=True) if batch]
        drawn += itertools.chain(*batches)
    return np.sort(np.array(drawn[:count], dtype=np.int64))


def _shuffle(numbers: Iterable[int], generator: random.Random) -> Iterator[int]:
    """Yield numbers in the order of webdataset's shuffle: one of a buffer, in whose place the last goes."""
    coming = iter(numbers)
    buffer = list(itertools.islice(coming, _BUFFER))
    while buffer:
        chosen = generator.randint(0, len(buffer) - 1)
        buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
        yield buffer.pop()
        buffer += itertools.islice(coming, 1)


def few_shot(data: ImageSet, shots: int | None, seed: int) -> ImageSet:
    """Return a subset of `shots` random images per class; None or 0 keeps everything ("full").

    Subsets are nested: the 1-shot image of a class is among its 5-shot images of the same seed. Raises `UserError`: a
    class has fewer images than asked for."""
    if not shots:
        return data
    chosen = []
    for label, name in enumerate(data.class_names):
        members = np.flatnonzero(data.labels == label)
        if len(members) < shots:
            raise UserError(
                f"--shots {shots} is more than class '{name}' of '{data.name}' has ({len(members)} images): "
                "ask for fewer shots or full."
            )
        # One counter-based stream per class, so that a draw depends on (seed, class) alone.
        order = np.random.Generator(np.random.Philox(key=[seed, label])).permutation(len(members))
        chosen.append(members[order[:shots]])
    return data.subset(np.sort(np.concatenate(chosen)))


def draw_record(drawn: ImageSet, shots: int, seed: int) -> dict[str, Any]:
    """Return a record of a subset's images by class, for people and for later runs that need the same images."""
    ids = [
        {"class": name, "ids": drawn.ids[drawn.labels == label].tolist()}
        for label, name in enumerate(drawn.class_names)
    ]
    return {"data": drawn.name, "fingerprint": drawn.fingerprint, "shots": shots, "seed": seed, "ids": ids}


@dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """Shuffled batches of `count` images per epoch, split among the ranks.

    The only state to save is the number of steps done: the order comes from (seed, epoch), and a run resumed at a step,
    with any number of workers, reads exactly the images that are left of the epoch.

    Attributes:
        batch_size: largest global batch, over all ranks.
        rank, world_size: the rank whose share is read, and the number of ranks.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.count // self.batch_size)

    @property
    def batch_sizes(self) -> list[int]:
        """Sizes of an epoch's global batches, in order."""
        fewest, more = divmod(self.count, self.steps_per_epoch)
        return [fewest + (i < more) for i in range(self.steps_per_epoch)]

    def global_batches(self, epoch: int, done: int = 0) -> list[np.ndarray]:
        """Return the positions of the images in each remaining batch of an epoch, after `done` steps of it.

        Batches have nearly equal sizes: no image is left out, and there is no small last batch, on which a contrastive
        loss would mean little.
        """
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.count)
        return np.array_split(order, self.steps_per_epoch)[done:]

    def share(self, batch: np.ndarray) -> np.ndarray:
        """Return this rank's part of a global batch; parts differ by at most one image."""
        return batch[self.rank :: self.world_size]
