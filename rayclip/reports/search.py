"""The table of a search: where every trial ended on the validation data."""

from collections.abc import Mapping, Sequence

from rayclip.evaluation.front import Score
from rayclip.reports.table import Table


def search_table(scores: Mapping[str, Score], front: Sequence[str], robust: str) -> Table:
    """A row a trial, those that came furthest first.

    Args:
        front: the trials on the Pareto front.
        robust: what the second accuracy stands on.
    """
    ranked = sorted(scores, key=lambda name: (-scores[name].epoch, -scores[name].clean - scores[name].robust))
    body = tuple(
        (name, str(s.epoch), f"{s.clean:.1f}", f"{s.robust:.1f}", "*" if name in front else "")
        for name in ranked
        for s in (scores[name],)
    )
    return Table(
        "search: accuracy in % on the validation data",
        ("trial", "epoch", "clean", "robust", "front"),
        body,
        f"robust: {robust}. ASHA stopped the trials that ended before the last epoch. *: no other trial that ran "
        "to its end is as good in both and better in one.",
    )
