"""The Pareto front of clean and robust accuracy: the best models when neither accuracy has priority."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayclip.types import Ranking


@dataclass(frozen=True, kw_only=True)
class Score:
    """A search trial's latest epoch and its accuracies there, in percent; `ended` if it is finished or was stopped."""

    epoch: int
    clean: float
    robust: float
    ended: bool = False

    def by(self, by: Ranking) -> float:
        """Return what a search ranks by: the worst case, clean accuracy, or the mean of the two."""
        return {"worst case": self.robust, "clean": self.clean, "mean": (self.clean + self.robust) / 2}[by]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each (clean, robust) point whether it is on the front: none is as good in both and better in one."""
    return [
        not any(c >= clean and r >= robust and (c, r) != (clean, robust) for c, r in points) for clean, robust in points
    ]
