"""What a pool does about memory: fewer workers at once and smaller batches, and more again when all is calm."""

import math

_CALM_S = 60.0  # without a worker lost to memory until one more is tried
_LONGEST_CALM_S = 3600.0
_REST_S = 8.0  # at most, before a worker that was alone is started again
_ALONE = 5  # times that a worker may be ended which had no other beside it, if nothing can be made smaller


class Pressure:
    """How many workers there may be, and how large their batches, after Ray's memory monitor has ended some.

    One that had others beside it is not started again for a while. One that was alone gets half the batch.

    Attributes:
        batch_size: of all workers from now on.
        killed: workers that were ended.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.killed = 0
        self._most: float = math.inf
        self._alone = 0  # ended one after the other with no shard done between
        self._calm_s, self._more_at, self._starts_at = _CALM_S, math.inf, 0.0

    def most(self, now: float) -> float:
        """Workers that there may be at once; infinity if nothing stands against any number."""
        if now >= self._more_at:
            self._most += 1
            self._more_at = now + self._calm_s
        return self._most if now >= self._starts_at else 0

    def lost(self, others: int, now: float) -> bool:
        """A worker was ended beside so many others; False if nothing is left to be tried."""
        self.killed += 1
        self._most = max(1, others)
        self._more_at = now + self._calm_s
        self._calm_s = min(2 * self._calm_s, _LONGEST_CALM_S)
        if others:
            return True
        if self._alone + 1 >= _ALONE and self.batch_size == 1:
            return False
        self._starts_at = now + min(2.0**self._alone, _REST_S)
        self._alone += 1
        self.batch_size = max(1, self.batch_size // 2)
        return True

    def done(self) -> None:
        """A shard was finished."""
        self._alone = 0
