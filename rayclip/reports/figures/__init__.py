"""Figures of a report, one file per kind, each drawn only if its data exist; `style` draws and writes them."""

from rayclip.reports.figures.bars import bars
from rayclip.reports.figures.curves import over_eps, over_shots, over_steps
from rayclip.reports.figures.embeddings import tsne
from rayclip.reports.figures.pictures import attention, image_grids
from rayclip.reports.figures.style import as_svg, write_figure
from rayclip.reports.figures.tradeoff import tradeoff
from rayclip.reports.grid import Figure
from rayclip.reports.results import Results
from rayclip.reports.section import Section

__all__ = ["as_svg", "section_figures", "write_figure"]


def section_figures(results: Results, section: Section) -> list[Figure]:
    """Return all figures that a section has data for."""
    of_numbers = (over_shots, over_eps, over_steps, tradeoff, bars)
    of_examples = (tsne, image_grids, attention)
    found = [figure for make in of_numbers for figure in make(section)]
    return found + [figure for make in of_examples for figure in make(results, section)]
