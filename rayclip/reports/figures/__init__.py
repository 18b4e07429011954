"""Figures of a report, one file per kind, each drawn only if its data exist; `style` draws and writes them."""

from rayclip.reports.document import Figure
from rayclip.reports.figures.bars import bars
from rayclip.reports.figures.curves import over_eps, over_shots, over_steps
from rayclip.reports.figures.embeddings import tsne
from rayclip.reports.figures.pictures import attention, grids
from rayclip.reports.figures.style import Kept, as_svg, write_figure
from rayclip.reports.figures.texts import changed_prompts
from rayclip.reports.figures.tradeoff import tradeoff
from rayclip.reports.numbers import Section
from rayclip.reports.results import Results

__all__ = ["as_svg", "section_figures", "write_figure"]


def section_figures(results: Results, section: Section) -> list[Figure]:
    """Return all figures that a section has data for."""
    kept = Kept(results, section)
    makers = (over_shots, over_eps, over_steps, tradeoff, bars)
    drawn = [figure for make in makers for figure in make(section)]
    return drawn + [f for make in (tsne, grids, attention, changed_prompts) for f in make(kept)]
