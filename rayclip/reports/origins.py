"""The origin of every number in a report: run, checkpoint, data manifest, code."""

from collections.abc import Iterable, Iterator

from rayclip.reports.document import Part
from rayclip.reports.results import JudgedCell, Model, Results, natural, short_names


def origins(results: Results) -> Part:
    """Return a part with a paragraph for each model and for each data set."""
    known = [*(cell.model for cell in results.cells), *(pairs.model for pairs in results.pairs)]
    models = {model.fingerprint: model for model in known}
    names = short_names(list(models.values()))
    data = {cell.data_fingerprint: f"{cell.dataset}: content {cell.data_fingerprint}" for cell in results.pairs}
    data |= {c.data_fingerprint: f"{c.dataset}: content {c.data_fingerprint}, called {c.data}" for c in results.cells}
    return Part(
        title="Where the numbers come from",
        text=(
            "Fingerprints are equal for equal weights and equal data, whatever their names.",
            *(
                f"{names[m.fingerprint]}: {'; '.join(_about_model(m, results.cells))}."
                for m in sorted(models.values(), key=lambda model: natural(names[model.fingerprint]))
            ),
            *(f"Data {about}." for about in sorted(data.values(), key=natural)),
            *(f"MLflow: {tracker}." for tracker in results.trackers),
        ),
    )


def _about_model(model: Model, cells: Iterable[JudgedCell]) -> Iterator[str]:
    mine = [cell for cell in cells if cell.model.fingerprint == model.fingerprint]
    lineage = model.lineage or {}
    yield f"weights {model.fingerprint}, called {model.spec}"
    if model.method:
        data = lineage.get("data") or {}
        trained_on = f"{data.get('name', model.trained_on)} {data.get('fingerprint', '')}".strip()
        yield f"trained with {model.method}, settings {lineage.get('digest', 'not known')}, on {trained_on}"
    code = joined(cell.code for cell in mine)
    if code:
        yield f"evaluated by rayclip {code}"
    runs = joined(cell.run for cell in mine)
    if runs:
        yield f"MLflow runs {runs}"


def joined(values: Iterable[str]) -> str:
    """Join the distinct non-empty values."""
    return ", ".join(dict.fromkeys(value for value in values if value))
