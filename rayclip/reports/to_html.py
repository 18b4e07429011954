"""Reports as one self-contained HTML page: style, script and pictures are embedded, nothing is loaded."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from rayclip.reports.grid import Cell, Document, Figure, Grid, Part

_WIDE = 7  # with more columns than this, intervals are below their numbers
_LONG = 40  # longer texts are broken into lines
_SHUT = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document_html(document: Document, drawings: Mapping[str, str]) -> str:
    """Return a report as an HTML page.

    Args:
        drawings: HTML of the figures, by name.
    """
    compare = "".join(_compare(i, pairs) for i, pairs in enumerate(document.pairs) if len(pairs["models"]) > 1)
    parts = [(f"part-{i}", part, figures) for i, (part, figures) in enumerate(document.shown())]
    sections = [(name, p.title, _part(name, p, f, drawings)) for name, p, f in parts if not p.reference]
    sections += [("compare", "Compare two models", compare)] * bool(compare)
    sections += [(name, p.title, _folded(_part(name, p, f, drawings))) for name, p, f in parts if p.reference]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in sections)
    search = (
        '<form class="controls" role="search" aria-label="Models">'
        '<label>Filter models<input id="search" type="search" autocomplete="off"></label>'
        '<p role="status" id="count" data-of="models"></p></form>'
    )
    return page_html(
        document.title,
        header="".join(f"<p>{escape(line)}</p>" for line in document.summary)
        + f'<nav aria-label="Parts"><ul>{links}</ul></nav>',
        main=search
        + "".join(
            f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{content}</section>\n'
            for name, title, content in sections
        ),
    )


def page_html(title: str, *, header: str, main: str) -> str:
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


def _part(name: str, part: Part, figures: Sequence[Figure], drawings: Mapping[str, str]) -> str:
    return (
        "".join(f"<p>{escape(line)}</p>" for line in part.text)
        + "".join(grid_html(f"{name}-table-{i}", grid) for i, grid in enumerate(part.grids))
        + "".join(_figure(figure, drawings[figure.name]) for figure in figures)
    )


def _folded(content: str) -> str:
    return f"<details><summary>Models, checkpoints, data and code behind every number</summary>{content}</details>"


def grid_html(name: str, grid: Grid, attributes: Sequence[Mapping[str, str]] = ()) -> str:
    """Return a table that sorts by its heads, with its notes.

    Args:
        name: unique in the page.
        attributes: of each row, as `data-` attributes, for filters; rows then have a rank.
    """
    stacks = len(grid.header) > _WIDE and not attributes
    heads = ['<th scope="col">#</th>'] * bool(attributes)
    for head, is_text in zip(grid.header, grid.is_text, strict=True):
        shown = "<br>".join(escape(head).rsplit(" ", 1)) if stacks else escape(head)
        side = ' class="text"' if is_text else ""
        heads.append(f'<th scope="col" aria-sort="none"{side}><button type="button">{shown}</button></th>')
    body = []
    for i, (row, cells) in enumerate(grid.rows):
        data = attributes[i] if attributes else {"id": row}
        spelled = "".join(f' data-{key}="{escape(value)}"' for key, value in data.items())
        rank = "<td data-rank></td>" if attributes else ""
        body.append(f'<tr{spelled}>{rank}<th scope="row">{escape(row)}</th>{"".join(map(_cell, cells))}</tr>')
    kind = ' class="wide"' if stacks else ' class="ranked"' if attributes else ""
    notes = f'<p class="notes">{escape(grid.caption)}</p>' if grid.caption else ""
    return _table(name, grid.title, "".join(heads), "".join(body), f"data-rows{kind}") + notes


def _table(name: str, caption: str, head: str, body: str, attributes: str = "") -> str:
    """Return a table that scrolls sideways, by keyboard too."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}">'
        f'<table {attributes}><caption id="{name}">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    if cell.text and cell.value is None:
        return f'<td class="text{" long" * (len(cell.text) > _LONG)}">{escape(cell.text)}</td>'
    value = "" if cell.value is None else f"{cell.value:.6g}"
    text = f'<b class="{cell.emphasis}">{escape(cell.text)}</b>' if cell.emphasis else escape(cell.text)
    note = f' <span class="ci">{escape(cell.note)}</span>' if cell.note else ""
    return f'<td data-value="{value}">{text}{note}</td>'


def _figure(figure: Figure, drawing: str) -> str:
    if figure.html:
        shown = (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(figure.title)}">{figure.html}</div>'
        )
    else:
        shown = f'<div class="drawing" role="img" aria-label="{escape(figure.alt)}">{drawing}</div>'
    caption = f"<strong>{escape(figure.title)}.</strong> {escape(figure.caption)}"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def choice(name: str, label: str, values: Iterable[str], *, everything: bool = False) -> str:
    """Return a list to filter rows by; nothing if there is nothing to choose.

    Args:
        everything: offer all values at once, too; otherwise one is always chosen.
    """
    values = list(values)
    if len(values) < 2:
        return ""
    options = '<option value="">all</option>' if everything else ""
    options += "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
    one = "" if everything else " data-one"
    return f'<label>{label}<select data-filter="{name}"{one}>{options}</select></label>'


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
        + _table(f"compared-{index}", "McNemar's exact test on the same samples, two-sided", head, "")
        + f'<script type="application/json" id="pairs-{index}">{_embedded(pairs)}</script>'
    )


def _embedded(value: Any) -> str:
    """Return a value as JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
