"""Reports in LaTeX; the template is `static/report.tex`."""

import re
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader

from rayclip.reports.grid import Document, Grid

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


def document_latex(document: Document, places: Mapping[str, str]) -> str:
    """Return a report as a complete document; tables need `booktabs`, `float`, `graphicx` and its own `fitted`.

    Args:
        places: paths of pictures that LaTeX can include, by figure name.
    """
    environment = Environment(
        "<%",
        "%>",
        "<<",
        ">>",
        "<#",
        "#>",  # braces are LaTeX's own
        loader=PackageLoader("rayclip.reports", "static"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"tex": _tex, "broken": _broken, "sentences": _sentences}
    parts = document.shown(lambda figure: figure.name in places)
    return environment.get_template("report.tex").render(document=document, parts=parts, places=places) + "\n"


def _sentences(grid: Grid) -> list[str]:
    """Return a table of words as a sentence per row."""
    said = []
    for name, cells in grid.rows:
        facts = [f"{head} {cell.text}" for head, cell in zip(grid.header[1:], cells, strict=True) if cell.text]
        said.append(f"{name}: {'; '.join(facts)}.")
    return [*said, *grid.notes]


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
