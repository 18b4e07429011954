"""Render a report as Markdown, LaTeX or CSV."""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from rayclip.reports.document import Cell, Document, Grid
from rayclip.reports.table import as_markdown

_TALL, _WIDE = 44, 7  # rows per LaTeX table; with more columns than this, intervals are below their numbers
_LONG = 24  # longer words may be broken
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "…": r"\ldots{}",
    "†": r"$\dagger$",
    "≥": r"$\geq$",
    "→": r"$\to$",
    "∞": r"$\infty$",
    "✓": r"$\checkmark$",
    "✗": r"$\times$",
}


def markdown(document: Document, figures: Mapping[str, str]) -> str:
    """Return a report in GitHub's Markdown.

    Args:
        figures: paths of pictures, by figure name.
    """
    blocks = [f"# {as_markdown(document.title)}", *map(as_markdown, document.summary)]
    for part in document.parts:
        blocks += [f"## {as_markdown(part.title)}", *map(as_markdown, part.text)]
        for grid in part.grids:
            rule = _row("---" if is_text else "---:" for is_text in grid.is_text)
            head = [_row(map(as_markdown, grid.header)), rule]
            body = [_row([as_markdown(name), *map(_markdown_cell, cells)]) for name, cells in grid.rows]
            blocks += [f"**{as_markdown(grid.title)}**", "\n".join([*head, *body]), as_markdown(grid.caption)]
        for figure in part.figures:
            if figure.name in figures:
                title, caption, alt = map(as_markdown, (figure.title, figure.caption, figure.alt))
                blocks += [f"![{alt}]({quote(figures[figure.name])})", f"**{title}.** {caption}"]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Cell) -> str:
    text = as_markdown(cell.text)
    return f"{f'**{text}**' if cell.best else text} {as_markdown(cell.note)}".strip()


_PREAMBLE = r"""\documentclass{article}
\usepackage[a4paper,margin=2cm]{geometry}
\usepackage[utf8]{inputenc}
\usepackage{amssymb,booktabs,float,graphicx}
% A table as wide as the text at most; take this along with a table.
\newsavebox\gridbox
\newcommand\fitted[1]{\sbox\gridbox{#1}%
  \ifdim\wd\gridbox>\linewidth\resizebox{\linewidth}{!}{\usebox\gridbox}\else\usebox\gridbox\fi}
\begin{document}"""


def latex(document: Document, figures: Mapping[str, str]) -> str:
    """Return a report as a complete LaTeX document; tables need `booktabs`, `float`, `graphicx` and its own `fitted`.

    Args:
        figures: paths of pictures that LaTeX can include, by figure name.
    """
    lines = [
        _PREAMBLE,
        rf"\section*{{{_tex(document.title)}}}",
        *(rf"{_tex(line)}\par" for line in document.summary),
    ]
    for part in document.parts:
        lines.append(rf"\subsection*{{{_tex(part.title)}}}")
        if part.text:
            lines += [r"{\footnotesize\raggedright", *(rf"{_broken(line)}\par" for line in part.text), "}"]
        for grid in part.grids:
            lines += _latex_tables(grid)
        for figure in part.figures:
            if figure.name in figures:
                lines += [
                    r"\begin{figure}[H]\centering",
                    rf"\includegraphics[width=\linewidth,height=0.4\textheight,keepaspectratio]{{{figures[figure.name]}}}",
                    rf"\caption{{{_tex(figure.title)}. {_tex(figure.caption)}}}",
                    r"\end{figure}",
                ]
    return "\n".join([*lines, r"\end{document}"]) + "\n"


def _latex_tables(grid: Grid) -> list[str]:
    """Return a table, split into several if it is long; the notes are below the last."""
    wide = len(grid.header) > _WIDE
    parts = max(1, -(-len(grid.rows) // (_TALL // 2 if wide else _TALL)))
    each = max(1, -(-len(grid.rows) // parts))
    columns = "".join("l" if is_text else "r" for is_text in grid.is_text)
    head = " & ".join(_latex_head(name, wide) for name in grid.header) + r" \\"
    below = [r"\par\smallskip", rf"\parbox{{\linewidth}}{{\footnotesize {_tex(grid.caption)}}}"]
    lines = []
    for part in range(parts):
        body = [
            " & ".join([_tex(name), *(_latex_cell(cell, wide) for cell in cells)]) + rf" \\{'[2pt]' * wide}"
            for name, cells in grid.rows[part * each : (part + 1) * each]
        ]
        lines += [
            r"\begin{table}[H]\centering\small",
            rf"\caption{{{_tex(grid.title)}{' (continued)' * bool(part)}}}",
            rf"\fitted{{\begin{{tabular}}{{{columns}}}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}}",
            *(below if part + 1 == parts else []),
            r"\end{table}",
        ]
    return lines


def _latex_head(name: str, wide: bool) -> str:
    return rf"\rotatebox{{60}}{{{_tex(name)}}}" if wide and name != "model" else _tex(name)


def _latex_cell(cell: Cell, wide: bool) -> str:
    text = rf"\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text)
    if not cell.note:
        return text
    note = rf"{{\scriptsize {_tex(cell.note)}}}"
    return rf"\shortstack[r]{{{text}\\{note}}}" if wide else f"{text} {note}"


def _tex(text: str) -> str:
    text = re.sub(r"(?<![\w'])'(?=\S)", "`", text)  # opening quotation marks
    return "".join(_LATEX.get(c) or (c if _in_font(c) else rf"\textbackslash{{}}u{ord(c):04x}") for c in text)


def _in_font(c: str) -> bool:
    """Return whether LaTeX's default fonts have a character; others are escaped so that names stay distinct."""
    return " " <= c <= "~" or "\xa0" <= c <= "\xff"


def _broken(text: str) -> str:
    """Return a text with possible line breaks inside paths and fingerprints."""
    words = (re.findall(r"\W+|\w{1,8}", word) if len(word) > _LONG else [word] for word in text.split(" "))
    return " ".join(r"\allowbreak{}".join(map(_tex, pieces)) for pieces in words)


def comma_separated(document: Document) -> str:
    """Return a report as CSV, one line per number; accuracies, recalls and comparisons have some extra columns each."""
    buffer = io.StringIO()
    columns = list(dict.fromkeys(name for line in document.lines for name in line))
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(document.lines)
    return buffer.getvalue()
