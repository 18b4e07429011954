"""Reports as one self-contained HTML page: style, script and pictures are embedded, nothing is loaded.

The templates are in `static/`: `page.html` is the frame, `table.html` renders a grid, each page extends the frame.
"""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader

from rayclip.reports.grid import Document


def document_html(document: Document, drawings: Mapping[str, str]) -> str:
    """Return a report as an HTML page.

    Args:
        drawings: HTML of the figures, by name.
    """
    compared = [pairs for pairs in document.pairs if len(pairs["models"]) > 1]
    parts = document.shown()
    return render("report.html", document.title, document=document, parts=parts, drawings=drawings, compared=compared)


def render(template: str, title: str, **values: Any) -> str:
    """Fill in a template of `static/`; values are escaped."""
    loader = PackageLoader("rayclip.reports", "static")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(template).render(title=title, **values)
