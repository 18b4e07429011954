"""The order of training images: a shuffled epoch in global batches, dealt out to the ranks.

There is no state to save but the number of steps done: the order comes from (seed, epoch), and whatever number of
workers goes on from a step reads exactly the images that are left of the epoch.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """Deals out `count` images.

    Attributes:
        batch_size: at most so many in a batch of all ranks together.
        rank, world_size: whose share.
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
        """Of an epoch's global batches, in order."""
        fewest, more = divmod(self.count, self.steps_per_epoch)
        return [fewest + (i < more) for i in range(self.steps_per_epoch)]

    def global_batches(self, epoch: int, done: int = 0) -> list[np.ndarray]:
        """The positions of each batch that is left of an epoch after `done` steps of it.

        Batches are of nearly equal size: no image is left out, and there is no runt batch at the end, in which a
        contrastive loss would mean little.
        """
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.count)
        return np.array_split(order, self.steps_per_epoch)[done:]

    def share(self, batch: np.ndarray) -> np.ndarray:
        """This rank's part of a global batch; shares differ by one image at most."""
        return batch[self.rank :: self.world_size]
