"""A report before it is Markdown, LaTeX or HTML: titles, grids of numbers, figures, and what to know about them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayclip.reports.numbers import Number


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number as it is printed.

    Attributes:
        text: empty where there is none.
        note: smaller, beside or below it: the interval.
        value: what to sort by.
        best: the highest of its column, printed in bold.
    """

    text: str = ""
    note: str = ""
    value: float | None = None
    best: bool = False


def accuracy(number: Number | None, *, best: bool = False, mark: str = "") -> Cell:
    """A percentage: `70.8` with its interval `66–75`."""
    if number is None:
        return Cell()
    text = "100" if number.top1 == 100 else f"{number.top1:.1f}"
    return Cell(text=text + mark, note=f"{number.low:.0f}–{number.high:.0f}", value=number.top1, best=best)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table: `header` names the columns, the first one that of the row headers."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()

    @property
    def is_text(self) -> tuple[bool, ...]:
        """Of each column whether it holds words: the first does."""
        columns = list(zip(*(cells for _, cells in self.rows), strict=True)) or [()] * len(self.header[1:])
        return True, *(any(c.text and c.value is None for c in cells) for cells in columns)

    @property
    def caption(self) -> str:
        """What stands under the table."""
        return "".join(f"{note}. " for note in self.notes).strip()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture that is drawn when it is asked for.

    Attributes:
        name: for files.
        alt: what it shows, for those who do not see it.
        draw: makes a `matplotlib.figure.Figure`.
        html: what a page shows instead of the drawing, where that is text.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[], Any]
    html: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a report, under its own heading.

    Attributes:
        lines: numbers that are this part's own, for CSV.
    """

    title: str
    grids: tuple[Grid, ...] = ()
    figures: tuple[Figure, ...] = ()
    text: tuple[str, ...] = ()
    lines: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report.

    Attributes:
        summary: what was evaluated, in a sentence or two.
        lines: the numbers one by one, for CSV.
        pairs: the counts behind comparisons of two models, for the page that lets one choose them.
    """

    title: str
    summary: tuple[str, ...]
    parts: tuple[Part, ...]
    lines: tuple[Mapping[str, Any], ...] = ()
    pairs: tuple[Mapping[str, Any], ...] = field(default=())
