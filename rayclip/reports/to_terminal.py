"""Tables on a terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rayclip import terminal
from rayclip.reports.grid import Cell, Grid

_NAMES = 28  # width of the row names in a table that has to be split anyway


def show(grids: Iterable[Grid], *, width: int | None = None) -> None:
    """Print tables to standard output, to a file with this width in characters (default: 80, or `COLUMNS`)."""
    console = terminal.console()
    width = console.width if console.is_terminal or width is None else width
    for grid in grids:
        console.print(grid_group(grid, width), width=width)


def grid_group(grid: Grid, width: int = 80) -> Group:
    """Lay out a table for `width` characters; columns that do not fit follow below, with row names again."""
    texts = [[name, *map(_text, cells)] for name, cells in grid.rows]
    first = max(max((len(word) for word in row[0].split()), default=0) for row in (grid.header, *texts))
    names = min(first, width // 2)
    columns = list(zip(grid.header, *texts, strict=True))[1:]
    widths = [max(len(text) for text in (*stacked(head).split("\n"), *cells)) for head, *cells in columns]
    tight = names + sum(2 + w for w in widths) > width  # prefer narrow gaps to broken names
    if names + sum(1 + w for w in widths) > width:
        names = max(names, min(_NAMES, max(len(row[0]) for row in (grid.header, *texts))))
    blocks: list[list[int]] = [[]]
    for i, w in enumerate(widths):
        if blocks[-1] and names + 1 + w + sum(1 + widths[j] for j in blocks[-1]) > width:
            blocks.append([])
        blocks[-1].append(i)
    parts: list[Table | Text] = []
    for block in blocks:  # `Text` titles: a rich table's own would be as narrow as the table
        title = "(continued)" if parts else grid.title
        parts += [*([Text(title, "table.title")] if title else []), _block(grid, block, tight=tight)]
    return Group(*parts, *([Text(grid.caption, "table.caption")] if grid.caption else []))


def stacked(name: str) -> str:
    """Put the budget below the attack's name, so that five columns fit into 80 characters."""
    return "\n".join(name.rsplit(" ", 1))


def _text(cell: Cell) -> str:
    return f"{cell.text} {cell.note}".strip()


def _block(grid: Grid, chosen: Sequence[int], *, tight: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 0 if tight else 1), show_edge=False, pad_edge=False)
    table.add_column(Text(grid.header[0]), overflow="fold")
    for i in chosen:
        side = "left" if grid.is_text[i + 1] else "right"
        table.add_column(Text(stacked(grid.header[i + 1])), justify=side, no_wrap=True, overflow="fold")  # type: ignore[arg-type]
    for name, cells in grid.rows:
        if any(cells[i].text for i in chosen):
            bold = ["bold" if cells[i].emphasis else "" for i in chosen]
            shown = [Text(_text(cells[i]), style) for i, style in zip(chosen, bold, strict=True)]
            table.add_row(Text(name), *shown)  # `Text`: names may hold brackets
    return table
