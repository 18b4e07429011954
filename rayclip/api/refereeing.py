"""The referee's table and figure of results: made, kept beside them, and logged."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rayclip.api.checks import Opened, plan_all
from rayclip.api.evaluating import logging
from rayclip.api.request import Evaluation, Where
from rayclip.evaluation import Store
from rayclip.evaluation.overhead import keep_overhead
from rayclip.reports.build import referee_part
from rayclip.reports.figures import write_figure
from rayclip.reports.figures.referee import referee as referee_figures
from rayclip.reports.formats import document_csv, document_markdown
from rayclip.reports.grid import Document, Grid
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
    for place, evaluations in list(places.items())[:1]:
        cells, _ = plan_all(list(models), evaluations, Opened(quiet=where.quiet))
        for cell in {cell.id: cell for cell in cells if cell.attack.name == "clean"}.values():
            keep_overhead(cell, Store(place), device)
    part = referee_part(sections(read_results(list(places))), referee_figures)
    document = Document(title=name, summary=(), parts=[part], lines=part.lines)
    store = Store(where.out)
    files = {"referee.csv": document_csv(document).encode()}
    with tempfile.TemporaryDirectory() as folder:
        for figure in part.figures:
            files |= {path.name: path.read_bytes() for path in write_figure(figure, Path(folder)).values()}
    text = document_markdown(document, {figure.name: f"{figure.name}.svg" for figure in part.figures})
    files["referee.md"] = text.encode()
    for file, content in files.items():
        store.write(file, content)
    with where.logbook(store) as logbook, logging(store):
        run = logbook.open(name, tags={"rayclip.kind": "comparison"})
        logbook.page(run, text, files)
    return list(part.grids)
