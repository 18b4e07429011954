"""A report or a table as text: CSV, HTML, LaTeX, Markdown.

HTML and LaTeX are templates in `static/`: `page.html` is the frame of pages that hold their style, script and pictures
and load nothing, `table.html` renders a grid, each page extends the frame.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rayclip.reports.grid import Cell, Document, Grid
from rayclip.reports.section import Attack, Number, Subject

if TYPE_CHECKING:
    from jinja2 import Environment

_MARKS = {  # of LaTeX's template: braces are its own
    f"{mark}_{end}_string": text
    for mark, both in {"block": ("<%", "%>"), "variable": ("<<", ">>"), "comment": ("<#", "#>")}.items()
    for end, text in zip(("start", "end"), both, strict=True)
}
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


def document_csv(document: Document) -> str:
    """Return a report's numbers, a line each; accuracies, recalls and comparisons have some columns of their own."""
    buffer = io.StringIO()
    columns = list(dict.fromkeys(name for line in document.lines for name in line))
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(document.lines)
    return buffer.getvalue()


def number_line(subject: Subject, dataset: str, attack: Attack, number: Number, metric: str = "") -> dict[str, Any]:
    """Return the columns that every line has; `metric` is that of a recall (`tr_r@1`), else it is an accuracy."""
    model = subject.model
    shots = "full" if model.shots is None else str(model.shots)
    value = f"{number.top1:.4f}"
    return {
        "model": subject.name,
        "spec": model.spec,
        "fingerprint": model.fingerprint,
        "method": model.method or "",
        "trained_on": model.trained_on or "",
        "shots": "" if model.method is None else shots,
        "scorer": subject.scorer,
        "defense": subject.defense,
        "dataset": dataset,
        "attack": attack.label,
        "kind": attack.kind,
        "eps": attack.eps or "",
        "norm": attack.norm if attack.eps is not None else "",
        "n": number.n,
        **({"metric": metric, "recall": value} if metric else {"top1": value}),
        "ci_low": f"{number.low:.4f}",
        "ci_high": f"{number.high:.4f}",
    }


def document_html(document: Document, drawings: Mapping[str, str]) -> str:
    """Return a report as an HTML page; `drawings` are the figures as HTML, by name."""
    compared = [pairs for pairs in document.pairs if len(pairs["models"]) > 1]
    parts = document.shown()
    return render("report.html", document.title, document=document, parts=parts, drawings=drawings, compared=compared)


def render(template: str, title: str, **values: Any) -> str:
    """Fill in a page of `static/`; values are escaped."""
    environment = _environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(template).render(title=title, **values)


def _environment(**settings: Any) -> "Environment":
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("rayclip.reports", "static")
    return Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **settings)


def document_latex(document: Document, places: Mapping[str, str]) -> str:
    """Return a report as a document; `places` are the paths of pictures that LaTeX can include, by figure name.

    Its tables need `booktabs`, `float`, `graphicx` and its own `fitted`.
    """
    environment = _environment(**_MARKS)
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


def document_markdown(document: Document, places: Mapping[str, str]) -> str:
    """Return a report in GitHub's Markdown; `places` are the paths of pictures, by figure name."""
    blocks = [f"# {escaped(document.title)}", *map(escaped, document.summary)]
    for part, drawn in document.shown(lambda figure: figure.name in places):
        blocks += [f"## {escaped(part.title)}", *map(escaped, part.text), *map(grid_markdown, part.grids)]
        for figure in drawn:
            title, caption, alt = map(escaped, (figure.title, figure.caption, figure.alt))
            blocks += [f"![{alt}]({quote(places[figure.name])})", f"**{title}.** {caption}"]
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
