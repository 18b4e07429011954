"""The content of a report, independent of Markdown, LaTeX or HTML: titles, tables, figures and notes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayclip.reports.numbers import Number


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table cell with a formatted number.

    Attributes:
        text: the number; empty if there is none.
        note: the interval, printed smaller beside or below the number.
        value: sort key.
        best: whether it is the highest of its column, which is printed in bold.
    """

    text: str = ""
    note: str = ""
    value: float | None = None
    best: bool = False


def accuracy(number: Number | None, *, best: bool = False, mark: str = "") -> Cell:
    """Return a cell with a percentage and its interval: `70.8`, `66–75`."""
    if number is None:
        return Cell()
    text = "100" if number.top1 == 100 else f"{number.top1:.1f}"
    return Cell(text=text + mark, note=f"{number.low:.0f}–{number.high:.0f}", value=number.top1, best=best)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table: `header` names the columns, first that of the row headers."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()

    @property
    def is_text(self) -> tuple[bool, ...]:
        """For each column, True if it holds text; always True for the first."""
        columns = list(zip(*(cells for _, cells in self.rows), strict=True)) or [()] * len(self.header[1:])
        return True, *(any(c.text and c.value is None for c in cells) for cells in columns)

    @property
    def caption(self) -> str:
        """The text below the table."""
        return "".join(f"{note}. " for note in self.notes).strip()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture, drawn on demand.

    Attributes:
        name: for files.
        alt: alternative text for readers who cannot see it.
        draw: returns a `matplotlib.figure.Figure`.
        html: HTML that a page shows instead of the drawing, for figures that are text.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[], Any]
    html: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a report with its own heading.

    Attributes:
        lines: this part's own numbers, for CSV.
    """

    title: str
    grids: tuple[Grid, ...] = ()
    figures: tuple[Figure, ...] = ()
    text: tuple[str, ...] = ()
    lines: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Document:
    """A complete report.

    Attributes:
        summary: what was evaluated, in a sentence or two.
        lines: one entry per number, for CSV.
        pairs: counts for comparing two models, for the HTML page where a reader chooses them.
    """

    title: str
    summary: tuple[str, ...]
    parts: tuple[Part, ...]
    lines: tuple[Mapping[str, Any], ...] = ()
    pairs: tuple[Mapping[str, Any], ...] = field(default=())
