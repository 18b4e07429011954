"""Evaluate several models as one table, write it beside the results and log it."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rayclip.api.checks import Opened, plan_cells
from rayclip.api.logbook import Logbook
from rayclip.api.request import Evaluation, Where
from rayclip.defenses import chain_label
from rayclip.distributed import evaluate, ray_cluster
from rayclip.evaluation import Cell, Store, collect_rows, outstanding
from rayclip.evaluation import forecast as forecasts
from rayclip.evaluation.alarms import alarms, cut_alarms
from rayclip.models.checkpoint import model_record
from rayclip.progress import Display, say
from rayclip.reports.results import LINEAGE
from rayclip.reports.rows import markdown_tables, rows_json
from rayclip.store import no_room
from rayclip.types import Row, UserError


def plan_all(
    models: Sequence[str], evaluations: Sequence[Evaluation], opened: Opened
) -> tuple[list[Cell], dict[str, np.ndarray]]:
    """Return `plan_cells` of several evaluations merged, without duplicates."""
    cells: dict[tuple[str, str], Cell] = {}
    positions: dict[str, np.ndarray] = {}
    for evaluation in evaluations:
        found, where = plan_cells(models, evaluation, opened)
        cells |= {(cell.model, cell.id): cell for cell in found}
        positions |= where
    return sorted(cells.values(), key=lambda cell: list(models).index(cell.model)), positions


def compare_all(
    root: str,
    labels: Mapping[str, str],
    runs: Mapping[str, str],
    untouched: Mapping[str, Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    opened: Opened,
    logbook: Logbook,
    store: Store,
    where: Where,
) -> list[Row]:
    """Evaluate models; log each in its run and the table of all in `root`, and return the rows.

    Args:
        runs: of the trained models; the others get a run below `root`.
        untouched: parameters of those of the others that stand beside trials.
    """
    cells, positions = plan_all(list(labels), evaluations, opened)
    rows = evaluate_cells(cells, positions, store, where)
    write_results(store, rows, labels, cells)
    found = print_alarms(cells, rows, positions, store)
    last = {run: model for model, run in runs.items()}  # of a run's several models: the trained one comes last
    with logging(store):
        for model, label in labels.items():
            run = runs.get(model)
            if run is None:
                kind, params = ("train", untouched[model]) if model in untouched else ("model", {"model": model})
                run = logbook.open(label, parent=root, params=params, tags={"rayclip.kind": kind})
            trial = run if last.get(run, model) == model else None
            log_evaluations(logbook, model, label, run, rows, cells, found[model], trial)
            logbook.finish(run)
        logbook.summary(root, rows, labels)
    return rows


@contextlib.contextmanager
def logging(store: Store) -> Iterator[None]:
    """Turn errors of the tracker into a warning: the results are on disk already and must still be shown.

    Raises:
        UserError, OSError: a full disk or the like, which the next command would run into as well.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if no_room(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        say("warning", f"not all could be logged ({said}): the results are in {store.root}; run again to log the rest.")


def evaluate_cells(cells: Sequence[Cell], positions: dict[str, np.ndarray], store: Store, where: Where) -> list[Row]:
    work = outstanding(cells, positions, store, where.pool.shard_size)
    if work:
        display = Display(quiet=where.quiet)
        total = sum(len(positions[cell.data]) for cell in {cell.id: cell for cell in cells}.values())
        with ray_cluster(cluster=where.cluster, verbose=where.verbose), display:
            ran = evaluate(work, store, size=where.pool, display=display, total=total)
        store.write_json(forecasts.RUNS, [*(store.read_json(forecasts.RUNS) or []), dataclasses.asdict(ran)])
    return collect_rows(cells, positions, store)


def print_alarms(
    cells: Sequence[Cell], rows: Sequence[Row], positions: dict[str, np.ndarray], store: Store
) -> dict[str, list[str]]:
    """Print and return warnings about the measurement, by model."""
    found = {}
    for model in dict.fromkeys(c.model for c in cells):
        found[model] = cut_alarms([row for row in rows if row.model == model])
        found[model] += alarms([c for c in cells if c.model == model], rows, positions, store)
        for sentence in found[model]:
            say("warning", sentence)
    return found


def log_evaluations(
    logbook: Logbook,
    model: str,
    label: str,
    parent: str | None,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    warnings: Sequence[str],
    trial: str | None = None,
) -> None:
    """Log one run for each combination of scorer and defence that the model was evaluated with.

    Args:
        trial: the run of the model itself; the numbers of the plain model are logged there too.
    """
    for kind in dict.fromkeys((row.scorer, row.defense) for row in rows if row.model == model):
        mine = [row for row in rows if (row.model, row.scorer, row.defense) == (model, *kind)]
        own = [c for c in cells if c.model == model and (c.scorer.label, chain_label(c.defense)) == kind]
        itself = trial if kind == ("template", "none") else None
        logbook.evaluation(f"eval {mine[0].who({model: label})}", parent, mine, own, warnings, itself)


def write_results(store: Store, rows: Sequence[Row], labels: Mapping[str, str], cells: Sequence[Cell]) -> None:
    """Write `results.json`, `table.md` and each model's record with its origin beside the cells."""
    for spec, fingerprint in {(cell.model, cell.model_fingerprint) for cell in cells}:
        store.write_json(f"{LINEAGE}/{fingerprint}.json", model_record(spec, labels.get(spec)))
    store.write("results.json", rows_json(rows).encode())
    store.write("table.md", markdown_tables(rows, labels).encode("utf-8", "backslashreplace"))
