"""Reports: tables, figures and pages, made from result files only."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rayclip.reports.grid import example_grid
from rayclip.reports.table import Table, result_tables
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.reports.results import Results

__all__ = [
    "Table",
    "example_grid",
    "make_leaderboard",
    "make_report",
    "result_tables",
]


def make_report(
    results: "Results",
    form: Literal["md", "html", "tex", "csv"],
    *,
    against: Sequence[str] = (),
    baseline: str | None = None,
    figures: Path | None = None,
    beside: Path,
) -> str:
    """Return a report as text; if `figures` is given, write its figures there first.

    Args:
        against: published tables to compare with, such as `mmcoa:II` (`beside.beside`).
        baseline: as in `build.build`.
        beside: the folder that the text will be saved in; links to figures are relative to it.

    Raises:
        UserError: an unknown paper, table or baseline.
    """
    import os

    from rayclip.reports import page, plain  # these imports take seconds
    from rayclip.reports.beside import beside as beside_papers
    from rayclip.reports.build import build
    from rayclip.reports.figures import as_svg, section_figures, write_figure

    document = build(
        results,
        baseline=baseline,
        against=lambda found, tables: beside_papers(found, against, tables),
        figures=lambda section: section_figures(results, section),
        pairs=form == "html",
    )
    places: dict[str, str] = {}
    if figures is not None:
        ending = "pdf" if form == "tex" else "svg"
        for figure in (figure for part in document.parts for figure in part.figures):
            places[figure.name] = Path(os.path.relpath(write_figure(figure, figures)[ending], beside)).as_posix()
    match form:
        case "html":
            return page.html(document, as_svg)
        case "tex":
            return plain.latex(document, places)
        case "csv":
            return plain.comma_separated(document)
    return plain.markdown(document, places)


def make_leaderboard(results: "Results", title: str) -> dict[str, str]:
    """Return a leaderboard's files by name: the page, and its numbers as CSV.

    Raises:
        UserError: there are no accuracies to rank.
    """
    from dataclasses import replace

    from rayclip.reports.build import build
    from rayclip.reports.leaderboard import leaderboard
    from rayclip.reports.numbers import sections
    from rayclip.reports.plain import comma_separated

    if not results.cells:
        raise UserError("a leaderboard ranks accuracies, and here are recalls only: use rayclip report.")
    return {
        "leaderboard.csv": comma_separated(build(replace(results, pairs=[]))),
        "index.html": leaderboard(sections(results), title),
    }
