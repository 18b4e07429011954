"""React to memory pressure in a pool: run fewer workers and smaller batches, then try more workers again later."""

import math

_CALM_S = 60.0  # without a worker killed for memory, before one more worker is tried
_LONGEST_CALM_S = 3600.0
_REST_S = 8.0  # longest pause before a worker that ran alone is started again
_ALONE = 5  # times that a worker running alone may be killed in a row, with batches of one image


class MemoryPressure:
    """Limits on the number of workers and their batch size, lowered when Ray's memory monitor kills workers.

    A worker that ran beside others is not replaced for a while. If it ran alone, the batch size is halved.

    Attributes:
        batch_size: batch size of all workers from now on.
        killed: number of workers that were killed.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.killed = 0
        self._most: float = math.inf
        self._alone = 0  # workers running alone that were killed since a shard was last finished
        self._calm_s, self._more_at, self._starts_at = _CALM_S, math.inf, 0.0

    def most(self, now: float) -> float:
        """Return the maximum number of workers at once; infinity if there is no limit."""
        if now >= self._more_at:
            self._most += 1
            self._more_at = now + self._calm_s
        return self._most if now >= self._starts_at else 0

    def lost(self, others: int, now: float) -> bool:
        """Record that a worker was killed beside `others` workers; return False if nothing is left to try."""
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
        """Record that a shard was finished."""
        self._alone = 0
