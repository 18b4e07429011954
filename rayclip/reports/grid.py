"""The content of a report, whatever its format: documents of parts, and parts of tables, figures and text.

Every table is a `Grid`, which `formats` and `to_terminal` render; CSV holds the numbers themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rayclip.reports.section import Number

Emphasis = Literal["", "best", "higher", "lower"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table cell: a formatted number, or text.

    Attributes:
        text: empty if there is none.
        note: the interval, printed smaller beside or below the number.
        value: sort key of a number; None for text.
        emphasis: printed in bold: the best of its column, or a significant difference upwards or downwards.
        link: address that a text leads to, on pages.
    """

    text: str = ""
    note: str = ""
    value: float | None = None
    emphasis: Emphasis = ""
    link: str = ""


def accuracy(number: Number | None, *, best: bool = False, mark: str = "") -> Cell:
    """Return a cell with a percentage and its interval: `70.8`, `66–75`."""
    if number is None:
        return Cell()
    text = "100" if number.top1 == 100 else f"{number.top1:.1f}"  # so that five columns fit into 80 characters
    note = f"{number.low:.0f}–{number.high:.0f}"
    return Cell(text=text + mark, note=note, value=number.top1, emphasis="best" if best else "")


def format_signed(difference: float) -> str:
    """Return a difference with its sign: `+3.1`, `−0.4`, `0.0`."""
    text = f"{difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def number_cell(value: float, form: str = "") -> Cell:
    """Return a cell with a plain number."""
    return Cell(text=format(value, form), value=value)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table: `header` names the columns, first that of the row names."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    notes: Sequence[str] = ()

    @property
    def is_text(self) -> tuple[bool, ...]:
        """For each column, True if it holds text and no number; always True for the first."""
        columns = list(zip(*(cells for _, cells in self.rows), strict=True)) or [()] * len(self.header[1:])
        return True, *(all(c.value is None for c in cells) for cells in columns)

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
        draw: returns a `matplotlib.figure.Figure` with at most so many panels (or pictures) side by side.
        narrows: whether a narrow page has a narrower drawing, with panels below one another.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[int], Any]
    narrows: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a report with its own heading.

    Attributes:
        lines: this part's own numbers, for CSV.
        reference: whether it is for looking something up; a page shows it folded, and last.
    """

    title: str
    grids: Sequence[Grid] = ()
    figures: Sequence[Figure] = ()
    text: Sequence[str] = ()
    lines: Sequence[Mapping[str, Any]] = ()
    reference: bool = False


@dataclass(frozen=True, kw_only=True)
class Document:
    """A complete report.

    Attributes:
        summary: what was evaluated, in a sentence or two.
        lines: one entry per number, for CSV.
        pairs: counts for comparing two models, for the HTML page where a reader chooses them.
    """

    title: str
    summary: Sequence[str]
    parts: Sequence[Part]
    lines: Sequence[Mapping[str, Any]] = ()
    pairs: Sequence[Mapping[str, Any]] = field(default=())

    @property
    def figures(self) -> list[Figure]:
        return [figure for part in self.parts for figure in part.figures]

    def shown(self, drawn: Callable[[Figure], bool] = lambda figure: True) -> list[tuple[Part, list[Figure]]]:
        """Return the parts that are not empty with their figures, leaving out those that are not `drawn`."""
        kept = [(part, [figure for figure in part.figures if drawn(figure)]) for part in self.parts]
        return [(part, figures) for part, figures in kept if part.grids or part.text or figures]
