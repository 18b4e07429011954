"""Where every number in a report comes from: run, checkpoint, data manifest, code."""

from collections.abc import Iterable, Mapping, Sequence

from rayclip.reports.grid import Cell, Grid, Part
from rayclip.reports.model import Model
from rayclip.reports.results import Results
from rayclip.reports.section import natural


def provenance(results: Results) -> Part:
    """Return a part with a table of the models and one of the data sets."""
    names = results.names
    models = [(names[fingerprint], _about(model, results)) for fingerprint, model in results.models.items()]
    data = {p.data_fingerprint: (p.dataset, "") for p in results.pairs}
    data |= {c.data_fingerprint: (c.dataset, c.data) for c in results.cells}
    sets = [(name, {"content": content, "specification": spec}) for content, (name, spec) in data.items()]
    notes = ["Fingerprints are equal for equal weights and equal data, whatever their names"]
    notes += [f"MLflow: {tracker}" for tracker in results.trackers]
    grids = (_grid("models", "model", models, notes), _grid("data sets", "data set", sets))
    return Part(title="Where the numbers come from", grids=grids, reference=True)


def _grid(title: str, first: str, facts: Sequence[tuple[str, Mapping[str, str]]], notes: Sequence[str] = ()) -> Grid:
    facts = sorted(facts, key=lambda fact: natural(fact[0]))
    columns = [column for column in facts[0][1] if any(about[column] for _, about in facts)]
    rows = [(name, [Cell(text=about[column]) for column in columns]) for name, about in facts]
    return Grid(title=title, header=(first, *columns), rows=rows, notes=notes)


def _about(model: Model, results: Results) -> dict[str, str]:
    mine = [cell for cell in results.cells if cell.model.fingerprint == model.fingerprint]
    lineage = model.lineage or {}
    data = lineage.get("data") or {}
    trained_on = f"{data.get('name', model.trained_on)} {data.get('fingerprint', '')}".strip()
    return {
        "weights": model.fingerprint,
        "specification": model.spec,
        "method": model.method or "",
        "settings": lineage.get("digest", "not known") if model.method else "",
        "trained on": trained_on if model.method else "",
        "evaluated by rayclip": join_distinct(cell.code for cell in mine),
        "MLflow runs": join_distinct(cell.run for cell in mine),
    }


def join_distinct(values: Iterable[str]) -> str:
    """Join the distinct non-empty values."""
    return ", ".join(dict.fromkeys(value for value in values if value))
