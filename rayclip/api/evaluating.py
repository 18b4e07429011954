"""Evaluate models, alone or as one comparison."""

from collections.abc import Iterable, Mapping, Sequence

from rayclip.api.checks import Opened, plan_cells
from rayclip.api.comparing import (
    compare_all,
    evaluate_cells,
    log_evaluations,
    logging,
    plan_all,
    print_alarms,
    write_results,
)
from rayclip.api.request import Evaluation, Where
from rayclip.evaluation import Store
from rayclip.reports.results import JudgedCell
from rayclip.types import Row


def evaluate_models(models: Sequence[str], evaluation: Evaluation, where: Where) -> list[Row]:
    """Evaluate models; write the results to disk, log them to the tracker and return them.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    cells, positions = plan_cells(models, evaluation, Opened(quiet=where.quiet))
    store = Store(where.out)
    with where.logbook(store) as logbook:
        rows = evaluate_cells(cells, positions, store, where)
        write_results(store, rows, {}, cells)
        found = print_alarms(cells, rows, positions, store)
        with logging(store):
            for model in dict.fromkeys(models):
                log_evaluations(logbook, model, model, None, rows, cells, found[model])
    return rows


def compare(
    name: str,
    models: Mapping[str, str],
    evaluations: Sequence[Evaluation],
    where: Where,
    known: Iterable[JudgedCell] = (),
) -> list[Row]:
    """Evaluate models under one parent run, as one table; write, log and return the results.

    Args:
        name: of the tracker's parent run.
        models: display names by model specification.
        known: cells of other folders; their verdicts are copied where they are among those asked for, not computed.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    opened = Opened(quiet=where.quiet)
    cells, _ = plan_all(list(models), evaluations, opened)
    store, planned = Store(where.out), {cell.id for cell in cells}
    for cell in known:
        if cell.id in planned:
            _copy_verdicts(cell, store)
    with where.logbook(store) as logbook:
        root = logbook.open(name, tags={"rayclip.kind": "comparison"})
        return compare_all(root, models, {}, {}, evaluations, opened, logbook, store, where)


def _copy_verdicts(cell: JudgedCell, store: Store) -> None:
    """Copy a cell's files into another result folder, except those that are there."""
    folder = f"cells/{cell.id}"
    for name in [f"{folder}/cell.json", *cell.store.names(folder, ".parquet")]:
        data = cell.store.read(name) if store.size(name) is None else None
        if data is not None:
            store.write(name, data)
