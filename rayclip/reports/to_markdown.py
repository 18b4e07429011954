"""Reports and tables in GitHub's Markdown."""

import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from rayclip.reports.grid import Cell, Document, Grid


def document_markdown(document: Document, figures: Mapping[str, str]) -> str:
    """Return a report.

    Args:
        figures: paths of pictures, by figure name.
    """
    blocks = [f"# {escaped(document.title)}", *map(escaped, document.summary)]
    for part, drawn in document.shown(lambda figure: figure.name in figures):
        blocks += [f"## {escaped(part.title)}", *map(escaped, part.text), *map(grid_markdown, part.grids)]
        for figure in drawn:
            title, caption, alt = map(escaped, (figure.title, figure.caption, figure.alt))
            blocks += [f"![{alt}]({quote(figures[figure.name])})", f"**{title}.** {caption}"]
    return "\n\n".join(block for block in blocks if block) + "\n"


def grid_markdown(grid: Grid) -> str:
    """Return a table with its title and its notes."""
    rule = _row("---" if is_text else "---:" for is_text in grid.is_text)
    body = [_row([escaped(name), *map(_cell, cells)]) for name, cells in grid.rows]
    table = "\n".join([_row(map(escaped, grid.header)), rule, *body])
    return "\n\n".join(filter(None, [f"**{escaped(grid.title)}**", table, escaped(grid.caption)]))


def escaped(text: str) -> str:
    """Escape a text for Markdown, so that bars, brackets, stars and tags in names are shown as they are."""
    text = re.sub(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", " ".join(text.splitlines()))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    return f"{f'**{text}**' if cell.emphasis else text} {escaped(cell.note)}".strip()
