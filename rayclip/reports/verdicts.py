"""Verdicts of a cell, sample by sample, and the comparison of two models on the same samples.

Shapes: N samples of a cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The verdicts of a cell.

    Attributes:
        positions_N: positions in the data set, ascending; cells of the same samples share the array.
        right_N: whether the model is right both before and after the attack.
    """

    positions_N: np.ndarray
    right_N: np.ndarray

    @property
    def n(self) -> int:
        return len(self.positions_N)

    @property
    def count(self) -> int:
        """Number of samples that are right."""
        return int(np.count_nonzero(self.right_N))


def align(verdicts: Sequence[Verdicts]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the positions that all `verdicts` have in common, and the verdicts of each at these (bool)."""
    positions = verdicts[0].positions_N
    if all(v.positions_N is positions for v in verdicts):
        return positions, [v.right_N for v in verdicts]
    for v in verdicts[1:]:
        positions = np.intersect1d(positions, v.positions_N, assume_unique=True)
    return positions, [v.right_N[np.searchsorted(v.positions_N, positions)] for v in verdicts]


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
    positions, (a_N, b_N) = align([first, second])
    if not len(positions):
        return None
    only_first, only_second = (int(np.count_nonzero(alone)) for alone in (a_N & ~b_N, b_N & ~a_N))
    return Paired(first=only_first, second=only_second, n=len(positions))
