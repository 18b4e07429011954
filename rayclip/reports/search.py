"""The table of a search: the last validation scores of every trial."""

from collections.abc import Mapping, Sequence

from rayclip.evaluation.front import Score
from rayclip.reports.grid import Cell, Grid, number_cell


def search_grid(scores: Mapping[str, Score], front: Sequence[str], robust: str) -> Grid:
    """Return a table with a row per trial: those that ran longest first, then by accuracy.

    Args:
        front: the trials on the Pareto front.
        robust: the attacks behind the robust accuracy.
    """
    ranked = sorted(scores, key=lambda name: (-scores[name].epoch, -scores[name].clean - scores[name].robust))
    rows = []
    for name in ranked:
        score = scores[name]
        cells = [number_cell(score.epoch), number_cell(score.clean, ".1f"), number_cell(score.robust, ".1f")]
        rows.append((name, [*cells, Cell(text="*" if name in front else "")]))
    return Grid(
        title="search: accuracy in % on the validation data",
        header=("trial", "epoch", "clean", "robust", "front"),
        rows=rows,
        notes=(
            f"Robust: {robust}",
            "ASHA stopped the trials that ended before the last epoch",
            "*: no other trial that ran to its end is as good in both and better in one",
        ),
    )
