"""The result table of a search: the last validation scores of every trial."""

from collections.abc import Mapping, Sequence

from rayclip.evaluation.front import Score
from rayclip.reports.table import Table


def search_table(scores: Mapping[str, Score], front: Sequence[str], robust: str) -> Table:
    """Return a table with a row per trial: those that ran longest first, then by accuracy.

    Args:
        front: the trials on the Pareto front.
        robust: the attacks behind the robust accuracy.
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
