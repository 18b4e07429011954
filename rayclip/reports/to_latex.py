"""Reports in LaTeX."""

import re
from collections.abc import Iterable, Mapping

from rayclip.reports.grid import Cell, Document, Grid

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


_PREAMBLE = r"""\documentclass{article}
\usepackage[a4paper,margin=2cm]{geometry}
\usepackage[utf8]{inputenc}
\usepackage{amssymb,booktabs,float,graphicx}
% A table as wide as the text at most; take this along with a table.
\newsavebox\gridbox
\newcommand\fitted[1]{\sbox\gridbox{#1}%
  \ifdim\wd\gridbox>\linewidth\resizebox{\linewidth}{!}{\usebox\gridbox}\else\usebox\gridbox\fi}
\begin{document}"""


def document_latex(document: Document, figures: Mapping[str, str]) -> str:
    """Return a report as a complete document; tables need `booktabs`, `float`, `graphicx` and its own `fitted`.

    Args:
        figures: paths of pictures that LaTeX can include, by figure name.
    """
    lines = [_PREAMBLE, rf"\section*{{{_tex(document.title)}}}", *(rf"{_tex(line)}\par" for line in document.summary)]
    for part, drawn in document.shown(lambda figure: figure.name in figures):
        lines.append(rf"\subsection*{{{_tex(part.title)}}}")
        lines += _small(part.text) if part.text else []
        for grid in part.grids:
            lines += _list(grid) if all(grid.is_text) else _tables(grid)
        for figure in drawn:
            lines += [
                r"\begin{figure}[H]\centering",
                rf"\includegraphics[width=\linewidth,height=0.4\textheight,keepaspectratio]{{{figures[figure.name]}}}",
                rf"\caption{{{_tex(figure.title)}. {_tex(figure.caption)}}}",
                r"\end{figure}",
            ]
    return "\n".join([*lines, r"\end{document}"]) + "\n"


def _small(sentences: Iterable[str]) -> list[str]:
    return [r"{\footnotesize\raggedright", *(rf"{_broken(line)}\par" for line in sentences), "}"]


def _list(grid: Grid) -> list[str]:
    """Return a table of words as sentences, whose paths and fingerprints can be broken: it would not fit the page."""
    said = []
    for name, cells in grid.rows:
        facts = [f"{head} {cell.text}" for head, cell in zip(grid.header[1:], cells, strict=True) if cell.text]
        said.append(f"{name}: {'; '.join(facts)}.")
    return _small([*said, *grid.notes])


def _tables(grid: Grid) -> list[str]:
    """Return a table, split into several if it is long; the notes are below the last."""
    wide = len(grid.header) > _WIDE
    parts = max(1, -(-len(grid.rows) // (_TALL // 2 if wide else _TALL)))
    each = max(1, -(-len(grid.rows) // parts))
    columns = "".join("l" if is_text else "r" for is_text in grid.is_text)
    head = " & ".join(_head(name, wide) for name in grid.header) + r" \\"
    below = [r"\par\smallskip", rf"\parbox{{\linewidth}}{{\footnotesize {_tex(grid.caption)}}}"]
    lines = []
    for part in range(parts):
        body = [
            " & ".join([_tex(name), *(_cell(cell, wide) for cell in cells)]) + rf" \\{'[2pt]' * wide}"
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


def _head(name: str, wide: bool) -> str:
    return rf"\rotatebox{{60}}{{{_tex(name)}}}" if wide and name != "model" else _tex(name)


def _cell(cell: Cell, wide: bool) -> str:
    text = rf"\textbf{{{_tex(cell.text)}}}" if cell.emphasis else _tex(cell.text)
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
