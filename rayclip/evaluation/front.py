"""Two ends at once: which of several models are best, if neither clean nor robust accuracy is worth more."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Score:
    """How far a trial of a search came and how well it did there, in percent.

    Attributes:
        ended: it will not go on: it is finished, or was stopped.
    """

    epoch: int
    clean: float
    robust: float
    ended: bool = False


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of each (clean, robust) point whether no other is at least as good in both and better in one."""
    return [
        not any(c >= clean and r >= robust and (c, r) != (clean, robust) for c, r in points) for clean, robust in points
    ]
