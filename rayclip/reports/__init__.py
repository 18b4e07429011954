"""Reports: tables, figures and pages, made from result files only."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.reports.results import Results

__all__ = ["make_leaderboard", "make_report"]


def make_report(
    results: "Results",
    form: Literal["md", "html", "tex", "csv", "json"],
    *,
    against: Sequence[str] = (),
    baseline: str | None = None,
    calibration: bool = False,
    figures: Path | None = None,
    beside: Path,
    tell: Callable[[str, int, int], None] = lambda figure, done, total: None,
) -> str:
    """Return a report as text; if `figures` is given, write its figures there first.

    Args:
        against, baseline, calibration: as in `build.build`.
        beside: the folder that the text will be saved in; links to figures are relative to it.
        tell: progress callback, called with each figure's name, how many are drawn, and how many there are.

    Raises:
        UserError: an unknown paper, table or baseline.
    """
    from rayclip.reports.build import build  # these imports take seconds
    from rayclip.reports.figures import as_svg, section_figures, write_figure
    from rayclip.reports.figures.referee import referee
    from rayclip.reports.figures.reliability import reliability_figure
    from rayclip.reports.formats import document_csv, document_html, document_latex, document_markdown
    from rayclip.reports.submission import document_json

    draws = figures is not None or form == "html"
    document = build(
        results,
        baseline=baseline,
        against=against,
        figures=lambda section: section_figures(results, section) if draws else (),
        reliability_figures=lambda section, found: reliability_figure(section, found) if draws else (),
        referee_figures=lambda hearings: referee(hearings) if draws else (),
        pairs=form == "html",
        calibration=calibration,
    )
    places: dict[str, str] = {}
    drawings: dict[str, str] = {}
    for done, figure in enumerate(document.figures):
        tell(figure.name, done, len(document.figures))
        if figures is not None:
            path = write_figure(figure, figures)["pdf" if form == "tex" else "svg"]
            places[figure.name] = Path(os.path.relpath(path, beside)).as_posix()
        if form == "html":
            drawings[figure.name] = as_svg(figure)
    if form == "csv":
        return document_csv(document)
    if form == "json":
        return document_json(results, document)
    if form == "html":
        return document_html(document, drawings)
    return (document_latex if form == "tex" else document_markdown)(document, places)


def make_leaderboard(results: "Results", title: str) -> dict[str, str]:
    """Return a leaderboard's files by name: the page, and its numbers as CSV and as JSON.

    Raises:
        UserError: there are no accuracies to rank.
    """
    from rayclip.reports.build import build
    from rayclip.reports.formats import document_csv
    from rayclip.reports.leaderboard import boards, leaderboard, rows_of
    from rayclip.reports.submission import document_json

    if not results.cells:
        raise UserError("a leaderboard ranks accuracies, and here are recalls only: use rayclip report.")
    document, found = build(replace(results, pairs=[])), boards(results)
    rows = [row for board in found for row in rows_of(board)]
    return {
        "leaderboard.csv": document_csv(document),
        "leaderboard.json": document_json(results, document, [row.record for row in rows]),
        "index.html": leaderboard(found, rows, title, results.notes),
    }
