"""Order of the training images: each epoch is shuffled, cut into global batches, and split among the ranks.

The only state to save is the number of steps done: the order comes from (seed, epoch), and a run resumed at a step,
with any number of workers, reads exactly the images that are left of the epoch.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """Shuffled batches of `count` images per epoch.

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
