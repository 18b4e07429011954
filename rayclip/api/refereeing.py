"""The referee's table and figure of results: made, kept beside them, and logged."""

from collections.abc import Mapping, Sequence

import torch

from rayclip.api.checks import Opened, plan_all
from rayclip.api.publishing import publish
from rayclip.api.request import Evaluation, Where
from rayclip.evaluation import Store
from rayclip.evaluation.overhead import keep_overhead
from rayclip.reports.build import referee_part
from rayclip.reports.figures.referee import referee as referee_figures
from rayclip.reports.grid import Grid
from rayclip.reports.numbers import sections
from rayclip.reports.results import read_results


def referee(
    name: str, models: Mapping[str, str], places: Mapping[str, Sequence[Evaluation]], where: Where
) -> list[Grid]:
    """Say what defences claim, and what is left of it; return the tables.

    Writes `referee.md`, `referee.csv` and the figures `referee.svg`, `.pdf` and `.png` to `where.out`, and logs them in
    a run of this name. What judging costs is measured in this process, where it was not before.

    Args:
        models: display names by specification.
        places: the evaluations that are finished, by the folder of their results; they may differ in the seed.
    """
    device = "cuda" if torch.cuda.is_available() and where.pool.gpus != 0 else "cpu"
    place, evaluations = next(iter(places.items()))
    cells, _ = plan_all(list(models), evaluations, Opened(quiet=where.quiet))
    for cell in {cell.id: cell for cell in cells if cell.attack.name == "clean"}.values():
        keep_overhead(cell, Store(place), device)
    part = referee_part(sections(read_results(list(places))), referee_figures)
    return publish(part, name, "referee", "comparison", where)
