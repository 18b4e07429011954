"""Where every number in a report comes from: run, checkpoint, data manifest, code."""

from collections.abc import Iterable

from rayclip.reports.grid import Cell, Grid, Part
from rayclip.reports.results import Results
from rayclip.reports.section import Model, natural


def provenance(results: Results) -> Part:
    """Return a part with a table of the models and one of the data sets."""
    names = results.names
    models = sorted(results.models.values(), key=lambda model: natural(names[model.fingerprint]))
    data = {c.data_fingerprint: (c.dataset, c.data) for c in results.cells}
    data |= {p.data_fingerprint: (p.dataset, "") for p in results.pairs if p.data_fingerprint not in data}
    columns = ("weights", "specification", "method", "settings", "trained on", "evaluated by rayclip", "MLflow runs")
    return Part(
        title="Where the numbers come from",
        grids=(
            Grid(
                name="models",
                title="models",
                header=("model", *columns),
                rows=[(names[m.fingerprint], _texts(_about_model(m, results))) for m in models],
                notes=(
                    "Fingerprints are equal for equal weights and equal data, whatever their names",
                    *(f"MLflow: {tracker}" for tracker in results.trackers),
                ),
            ),
            Grid(
                name="data",
                title="data sets",
                header=("data set", "content", "specification"),
                rows=[
                    (name, _texts([c, spec]))
                    for c, (name, spec) in sorted(data.items(), key=lambda d: natural(d[1][0]))
                ],
            ),
        ),
        reference=True,
    )


def _texts(values: Iterable[str]) -> list[Cell]:
    return [Cell(text=value) for value in values]


def _about_model(model: Model, results: Results) -> list[str]:
    mine = [cell for cell in results.cells if cell.model.fingerprint == model.fingerprint]
    lineage = model.lineage or {}
    data = lineage.get("data") or {}
    trained = [model.method, lineage.get("digest", "not known"), f"{data.get('name', model.trained_on)}"]
    trained[2] = f"{trained[2]} {data.get('fingerprint', '')}".strip()
    return [
        model.fingerprint,
        model.spec,
        *(trained if model.method else [""] * 3),
        joined(cell.code for cell in mine),
        joined(cell.run for cell in mine),
    ]


def joined(values: Iterable[str]) -> str:
    """Join the distinct non-empty values."""
    return ", ".join(dict.fromkeys(value for value in values if value))
