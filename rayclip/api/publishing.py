"""Keep a table with its figures beside the results that it is made of, and log it."""

from rayclip.api.evaluating import logging
from rayclip.api.request import Where
from rayclip.evaluation import Store
from rayclip.paths import temporary_folder
from rayclip.reports.figures import write_figure
from rayclip.reports.formats import document_csv, document_markdown
from rayclip.reports.grid import Document, Grid, Part


def publish(part: Part, name: str, stem: str, kind: str, where: Where) -> list[Grid]:
    """Write `STEM.md`, `STEM.csv` if the part has lines, and its figures as SVG, PDF and PNG to `where.out`, log all in
    the run of this name, and return the tables.

    Args:
        kind: `rayclip.kind` of the run.
    """
    document = Document(title=name, summary=(), parts=[part], lines=part.lines)
    text = document_markdown(document, {figure.name: f"{figure.name}.svg" for figure in part.figures})
    files = {f"{stem}.md": text.encode()}
    if part.lines:
        files[f"{stem}.csv"] = document_csv(document).encode()
    with temporary_folder() as folder:
        for figure in part.figures:
            files |= {path.name: path.read_bytes() for path in write_figure(figure, folder).values()}
    store = Store(where.out)
    for file, content in files.items():
        store.write(file, content)
    with where.logbook(store) as logbook, logging(store):
        run = logbook.open(name, tags={"rayclip.kind": kind})
        logbook.page(run, text, files)
    return list(part.grids)
