"""Verdicts of a cell, one bit per sample, and the comparison of two models on the same samples.

Shapes: N samples of a cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The verdicts of a cell: per sample whether the model is right both before and after the attack.

    Attributes:
        positions_N: positions in the data set, ascending; cells of the same samples share the array.
        packed: eight verdicts per byte (`numpy.packbits`).
    """

    positions_N: np.ndarray
    packed: np.ndarray

    @classmethod
    def of(cls, positions_N: np.ndarray, right_N: np.ndarray) -> "Verdicts":
        return cls(positions_N=positions_N, packed=np.packbits(right_N))

    @property
    def n(self) -> int:
        return len(self.positions_N)

    @property
    def right(self) -> np.ndarray:
        """The verdicts as bool, `(N,)`."""
        return np.unpackbits(self.packed, count=self.n).view(bool)

    @property
    def count(self) -> int:
        """Number of samples that are right."""
        return int(np.bitwise_count(self.packed).sum())


def align(verdicts: Sequence[Verdicts]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the positions that all `verdicts` have in common, and the verdicts of each at these (bool)."""
    positions = verdicts[0].positions_N
    if all(v.positions_N is positions for v in verdicts):
        return positions, [v.right for v in verdicts]
    for v in verdicts[1:]:
        positions = np.intersect1d(positions, v.positions_N, assume_unique=True)
    return positions, [v.right[np.searchsorted(v.positions_N, positions)] for v in verdicts]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A paired comparison of two models on the same samples: numbers of samples that only one of them gets right."""

    first: int
    second: int
    n: int

    @property
    def difference(self) -> float:
        """Accuracy of the first minus the second, in percentage points."""
        return 100 * (self.first - self.second) / self.n

    @property
    def p(self) -> float:
        """Exact two-sided p value of McNemar's test (1947): the binomial test of the discordant pairs."""
        from scipy.stats import binom  # takes a second to import

        discordant = self.first + self.second
        return min(1.0, 2 * float(binom.cdf(min(self.first, self.second), discordant, 0.5))) if discordant else 1.0


def paired(first: Verdicts, second: Verdicts) -> Paired | None:
    """Compare two models' verdicts on the samples that both have; None if they have none in common."""
    if first.positions_N is second.positions_N:
        ones, twos = first.packed & ~second.packed, second.packed & ~first.packed
        return Paired(first=int(np.bitwise_count(ones).sum()), second=int(np.bitwise_count(twos).sum()), n=first.n)
    positions, (a_N, b_N) = align([first, second])
    if not len(positions):
        return None
    return Paired(first=int((a_N & ~b_N).sum()), second=int((b_N & ~a_N).sum()), n=len(positions))
