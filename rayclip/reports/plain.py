"""A report as Markdown, LaTeX or CSV."""

import csv
import io
from collections.abc import Mapping, Sequence

from rayclip.reports.document import Cell, Document, Grid

_TALL, _WIDE = 40, 7  # rows of one LaTeX table; columns from which intervals stand below their numbers
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
}


def markdown(document: Document, figures: Mapping[str, str]) -> str:
    """GitHub's Markdown.

    Args:
        figures: where pictures lie, by name.
    """
    blocks = [f"# {document.title}", *document.summary]
    for part in document.parts:
        blocks += [f"## {part.title}", *part.text]
        for grid in part.grids:
            head = [_row(map(_plain, grid.header)), _row(["---"] + ["---:"] * (len(grid.header) - 1))]
            body = [_row([_plain(name), *map(_markdown_cell, cells)]) for name, cells in grid.rows]
            blocks += [f"**{_plain(grid.title)}**", "\n".join([*head, *body]), _plain(grid.caption)]
        for figure in part.figures:
            if figure.name in figures:
                blocks += [f"![{figure.alt}]({figures[figure.name]})", f"**{figure.title}.** {figure.caption}"]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _row(cells: "Sequence[str] | map[str]") -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("_", "\\_")


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return f"{text} {cell.note}".strip()


def latex(document: Document, figures: Mapping[str, str]) -> str:
    """A document that compiles by itself; its tables need `booktabs`, wide ones also `graphicx`.

    Args:
        figures: where pictures that LaTeX can include lie, by name.
    """
    lines = [
        r"\documentclass{article}",
        r"\usepackage[a4paper,margin=2cm]{geometry}",
        r"\usepackage[utf8]{inputenc}",
        r"\usepackage{booktabs}",
        r"\usepackage{graphicx}",
        r"\begin{document}",
        rf"\section*{{{_tex(document.title)}}}",
        *(rf"{_tex(line)}\par" for line in document.summary),
    ]
    for part in document.parts:
        lines += [rf"\subsection*{{{_tex(part.title)}}}", *(rf"{_tex(line)}\par" for line in part.text)]
        for grid in part.grids:
            for first in range(0, len(grid.rows), _TALL):
                lines += _latex_table(grid, first)
        for figure in part.figures:
            if figure.name in figures:
                lines += [
                    r"\begin{figure}[!htbp]\centering",
                    rf"\includegraphics[width=\linewidth,height=0.8\textheight,keepaspectratio]{{{figures[figure.name]}}}",
                    rf"\caption{{{_tex(figure.title)}. {_tex(figure.caption)}}}",
                    r"\end{figure}",
                ]
        lines.append(r"\clearpage")
    return "\n".join([*lines, r"\end{document}"]) + "\n"


def _latex_table(grid: Grid, first: int) -> list[str]:
    wide = len(grid.header) > _WIDE
    columns = "l" + "r" * (len(grid.header) - 1)
    more = " (continued)" if first else ""
    body = [
        " & ".join([_tex(name), *(_latex_cell(cell, wide) for cell in cells)]) + r" \\"
        for name, cells in grid.rows[first : first + _TALL]
    ]
    table = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(_latex_head(name, wide) for name in grid.header) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    fitted = [r"\resizebox{\linewidth}{!}{%", *table, "}"] if wide or len(grid.header) > 5 else table
    return [
        r"\begin{table}[!htbp]\centering\small",
        rf"\caption{{{_tex(grid.title)}{more}. {_tex(grid.caption)}}}",
        *fitted,
        r"\end{table}",
    ]


def _latex_head(name: str, wide: bool) -> str:
    return rf"\rotatebox{{60}}{{{_tex(name)}}}" if wide and name != "model" else _tex(name)


def _latex_cell(cell: Cell, wide: bool) -> str:
    text = rf"\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text)
    if not cell.note:
        return text
    note = rf"{{\scriptsize {_tex(cell.note)}}}"
    return rf"\shortstack[r]{{{text}\\{note}}}" if wide else f"{text} {note}"


def _tex(text: str) -> str:
    kept = "".join(_LATEX.get(c, c) for c in text)
    return kept.encode("latin-1", "replace").decode("latin-1")


def comma_separated(document: Document) -> str:
    """One line a number; accuracies and recalls have some columns of their own."""
    buffer = io.StringIO()
    columns = list(dict.fromkeys(name for line in document.lines for name in line))
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(document.lines)
    return buffer.getvalue()
