"""Render a report as one self-contained HTML page: style, script and pictures are embedded, nothing is loaded."""

import json
from collections.abc import Callable, Iterable, Mapping
from html import escape
from importlib import resources
from typing import Any

from rayclip.reports.document import Cell, Document, Figure, Grid, Part

_WIDE = 7  # with more columns than this, intervals are below their numbers
_SHUT = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def html(document: Document, draw: Callable[[Figure], str]) -> str:
    """Return a report as an HTML page.

    Args:
        draw: renders a figure as an `<svg>` element.
    """
    shown = [part for part in document.parts if part.grids or part.figures or part.text]
    links = "".join(f'<li><a href="#part-{i}">{escape(part.title)}</a></li>' for i, part in enumerate(shown))
    compare = "".join(_compare(i, pairs) for i, pairs in enumerate(document.pairs) if len(pairs["models"]) > 1)
    if compare:
        links += '<li><a href="#compare">Compare two models</a></li>'
    sections = "".join(_part(f"part-{i}", part, draw) for i, part in enumerate(shown))
    if compare:
        sections += f'<section aria-labelledby="compare"><h2 id="compare">Compare two models</h2>{compare}</section>'
    search = (
        '<form class="controls" role="search" aria-label="Models">'
        '<label>Filter models<input id="search" type="search" autocomplete="off"></label>'
        '<p role="status" id="count" data-of="models"></p></form>'
    )
    return shell(
        document.title,
        header="".join(f"<p>{escape(line)}</p>" for line in document.summary)
        + f'<nav aria-label="Parts"><ul>{links}</ul></nav>',
        main=search + sections,
    )


def shell(title: str, *, header: str, main: str) -> str:
    """Return a complete page with the given header and main part."""
    static = resources.files("rayclip.reports") / "static"
    style, script = ((static / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_SHUT}">\n'
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">Skip to the results</a>\n'
        f"<header>\n<h1>{escape(title)}</h1>\n{header}\n</header>\n"
        f'<main id="main" tabindex="-1">\n{main}\n</main>\n<footer>Made by rayclip from result files.</footer>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _part(name: str, part: Part, draw: Callable[[Figure], str]) -> str:
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(part.title)}</h2>'
        + "".join(f"<p>{escape(line)}</p>" for line in part.text)
        + "".join(_grid(f"{name}-table-{i}", grid) for i, grid in enumerate(part.grids))
        + "".join(_figure(figure, draw) for figure in part.figures)
        + "</section>\n"
    )


def _grid(name: str, grid: Grid) -> str:
    wide = ' class="wide"' if len(grid.header) > _WIDE else ""
    texts = [name for name, is_text in zip(grid.header, grid.is_text, strict=True) if is_text]
    body = "".join(
        f'<tr data-id="{escape(row)}"><th scope="row">{escape(row)}</th>{"".join(map(_cell, cells))}</tr>'
        for row, cells in grid.rows
    )
    return (
        table(name, grid.title, sortable(grid.header, texts, stacked=bool(wide)), body, f"data-rows{wide}")
        + f'<p class="notes">{escape(grid.caption)}</p>'
    )


def table(name: str, caption: str, head: str, body: str, attributes: str = "") -> str:
    """Return a table that scrolls sideways, by keyboard too."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">'
        f'<table {attributes}><caption id="{name}">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def sortable(names: Iterable[str], texts: Iterable[str] = (), *, stacked: bool = False) -> str:
    """Return column headers with a sort button; those in `texts` are left-aligned.

    Args:
        stacked: put an attack's budget below its name.
    """
    left = set(texts)
    return "".join(
        f'<th scope="col" aria-sort="none"{" class=text" if name in left else ""}>'
        f'<button type="button">{"<br>".join(escape(name).rsplit(" ", 1)) if stacked else escape(name)}</button></th>'
        for name in names
    )


def _cell(cell: Cell) -> str:
    if cell.text and cell.value is None:
        return f'<td class="text">{escape(cell.text)}</td>'
    value = "" if cell.value is None else f"{cell.value:.6g}"
    text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
    note = f' <span class="ci">{escape(cell.note)}</span>' if cell.note else ""
    return f'<td data-value="{value}">{text}{note}</td>'


def _figure(figure: Figure, draw: Callable[[Figure], str]) -> str:
    if figure.html:
        shown = (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(figure.title)}">{figure.html}</div>'
        )
    else:
        shown = f'<div role="img" aria-label="{escape(figure.alt)}">{draw(figure)}</div>'
    caption = f"<strong>{escape(figure.title)}.</strong> {escape(figure.caption)}"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _compare(index: int, pairs: Mapping[str, Any]) -> str:
    """Return two lists to choose models from, and an empty table that the script fills."""
    second = pairs["baseline"] or 0
    first = next(i for i in range(len(pairs["models"])) if i != second)

    def choose(label: str, chosen: int) -> str:
        options = "".join(
            f'<option value="{i}"{" selected" if i == chosen else ""}>{escape(name)}</option>'
            for i, name in enumerate(pairs["models"])
        )
        return f"<label>{label}<select>{options}</select></label>"

    heads = ("data set", "attack", "difference in points", "only the first right", "only the second right", "n", "p")
    head = "".join(f'<th scope="col"{" class=text" if h == "attack" else ""}>{h}</th>' for h in heads)
    return (
        f'<form class="controls" data-compare="pairs-{index}">{choose("First model", first)}'
        f'{choose("Second model", second)}<p role="status"></p></form>'
        + table(f"compared-{index}", "McNemar's exact test on the same samples, two-sided", head, "")
        + f'<script type="application/json" id="pairs-{index}">{embedded(pairs)}</script>'
    )


def embedded(value: Any) -> str:
    """Return a value as JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
