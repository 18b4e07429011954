"""Evaluate models, alone or as one comparison; estimate beforehand what that takes.

Bad arguments raise a `UserError` before anything is written.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from rayclip.api.checks import Opened, plan_all
from rayclip.api.logbook import Logbook
from rayclip.api.request import Evaluation, Where
from rayclip.data.leases import Leases
from rayclip.defenses import chain_label
from rayclip.evaluation import Cell, Evaluator, Shards, Store, collect_rows, outstanding
from rayclip.evaluation import forecast as forecasts
from rayclip.evaluation.alarms import alarms, cut_alarms
from rayclip.evaluation.cell import positions_of
from rayclip.evaluation.costs import Costs, PoolStatistics
from rayclip.evaluation.forecast import Forecast
from rayclip.evaluation.here import evaluate_here
from rayclip.evaluation.plan import resized
from rayclip.evaluation.saving import SavedSet, can_save, write_set
from rayclip.models import Clip
from rayclip.models.checkpoint import model_record
from rayclip.progress import Display, say
from rayclip.reports.results import LINEAGE, JudgedCell
from rayclip.reports.rows import rows_json
from rayclip.reports.seeds import tables_of_seeds
from rayclip.store import no_room
from rayclip.types import Row, UserError


def evaluate_models(
    models: Sequence[str], evaluation: Evaluation, where: Where, given: Mapping[str, Clip] = MappingProxyType({})
) -> list[Row]:
    """Evaluate models; write the results to disk, log them to the tracker and return them.

    Args:
        given: those of the models that are in memory, by specification; for an evaluation in this process.
    """
    cells, positions = plan_all(models, [evaluation], Opened(quiet=where.quiet, given=given))
    _check_saving(cells, where)
    with where.logbook(Store(where.out)) as logbook:
        found = _measure(cells, positions, logbook.store, where, {}, given)
        with logging(logbook.store):
            for model in dict.fromkeys(models):
                _log_model(logbook, found, model, model, None)
    return found.rows


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
    """
    opened = Opened(quiet=where.quiet)
    cells, _ = plan_all(list(models), evaluations, opened)
    _check_saving(cells, where)
    store, planned = Store(where.out), {cell.id for cell in cells}
    found = [cell for cell in known if cell.id in planned]
    for place in {cell.store.root: cell.store for cell in found if cell.store.root != store.root}.values():
        there = {cell.id for cell in found if cell.store.root == place.root}
        with Leases(place) as leases:  # what is being computed there is not computed here as well
            leases.wait(there, "evaluating what is compared here", every=True)
    with Leases(store) as leases:
        mine = leases.claim(cell.id for cell in found)  # the others are being computed here by another command
        for cell in (cell for cell in found if cell.id in mine):
            folder = f"cells/{cell.id}"
            for file in [f"{folder}/cell.json", *cell.store.names(folder, ".parquet")]:
                data = cell.store.read(file) if store.size(file) is None else None
                if data is not None:
                    store.write(file, data)
    with where.logbook(store) as logbook:
        root = logbook.open(name, tags={"rayclip.kind": "comparison"})
        return compare_all(root, models, evaluations, opened, logbook, where)


def compare_all(
    root: str,
    labels: Mapping[str, str],
    evaluations: Sequence[Evaluation],
    opened: Opened,
    logbook: Logbook,
    where: Where,
    *,
    runs: Mapping[str, str] = {},
    untouched: Mapping[str, Mapping[str, Any]] = {},
    groups: Mapping[str, str] = {},
) -> list[Row]:
    """Evaluate models; log each in its run and the table of all in `root`, and return the rows.

    Args:
        runs: of the trained models; the others get a run below `root`.
        untouched: parameters of those of the others that stand beside trials.
        groups: display names without the seed, of models that differ in it.
    """
    found = _measure(*plan_all(list(labels), evaluations, opened), logbook.store, where, labels, groups=groups)
    last = {run: model for model, run in runs.items()}  # of a run's several models: the trained one comes last
    with logging(logbook.store):
        for model, label in labels.items():
            run = runs.get(model)
            if run is None:
                kind, params = ("train", untouched[model]) if model in untouched else ("model", {"model": model})
                run = logbook.open(label, parent=root, params=params, tags={"rayclip.kind": kind})
            _log_model(logbook, found, model, label, run, is_last=last.get(run, model) == model)
            logbook.finish(run)
        logbook.summary(root, found.rows, labels, groups)
    return found.rows


class _Measured(NamedTuple):
    """Evaluated cells, their rows, warnings about the measurement by model, and saved images by cell."""

    cells: Sequence[Cell]
    rows: list[Row]
    warnings: dict[str, list[str]]
    saved: dict[str, SavedSet]


def _check_saving(cells: Sequence[Cell], where: Where) -> None:
    """Raise a `UserError` if adversarial images are asked for and no attack makes any."""
    if where.save_adversarial and not any(map(can_save, cells)):
        raise UserError(
            "none of the attacks changes images, so that there are none to save: name one that does, as pgd."
        )


def _measure(
    cells: Sequence[Cell],
    positions: dict[str, np.ndarray],
    store: Store,
    where: Where,
    labels: Mapping[str, str],
    given: Mapping[str, Clip] = MappingProxyType({}),
    groups: Mapping[str, str] = {},
) -> _Measured:
    """Evaluate cells, write the table and each model's record beside them, and print the warnings."""
    images = [cell for cell in {cell.id: cell for cell in cells}.values() if where.save_adversarial and can_save(cell)]
    with Leases(store) as leases:
        _evaluate_missing(cells, positions, store, where, given, leases)
        saved = {}
        for cell in images:
            with leases.hold(f"saved {cell.id}", "saving the images of a cell"):
                saved[cell.id] = write_set(cell, store)
    for cell in images:
        own = (
            f"; the texts that {cell.attack.name} gives every image are not saved"
            if cell.attack.gives_own_texts
            else ""
        )
        say("note", f"{cell.title}: {saved[cell.id]}{own}.")
    rows = collect_rows(cells, positions, store)
    alike: dict[str, list[str]] = {}
    for spec, fingerprint in dict.fromkeys((cell.model, cell.model_fingerprint) for cell in cells):
        alike.setdefault(fingerprint, []).append(spec)
    for fingerprint, specs in alike.items():  # models of equal weights are one row of a report, which names them all
        label = " = ".join(labels[spec] for spec in specs if spec in labels)
        store.write_json(f"{LINEAGE}/{fingerprint}.json", model_record(specs[0], label or None))
    store.write("results.json", rows_json(rows).encode())
    store.write("table.md", tables_of_seeds(rows, labels, groups).encode("utf-8", "backslashreplace"))
    warnings = {}
    for model in dict.fromkeys(cell.model for cell in cells):
        warnings[model] = cut_alarms([row for row in rows if row.model == model])
        warnings[model] += alarms([c for c in cells if c.model == model], rows, positions, store)
        for sentence in warnings[model]:
            say("warning", sentence)
    return _Measured(cells, rows, warnings, saved)


def _evaluate_missing(
    cells: Sequence[Cell],
    positions: dict[str, np.ndarray],
    store: Store,
    where: Where,
    given: Mapping[str, Clip],
    leases: Leases,
) -> None:
    """Compute the missing verdicts; cells that other commands hold are awaited, and taken over if these die."""

    def missing(cells: Iterable[Cell]) -> list[Shards]:
        largest = where.pool.largest_shard(0)
        return outstanding(list(cells), positions, store, largest, save_images=where.save_adversarial)

    work = missing(cells)
    again = sum(len(shards.positions) for shards in work if shards.writes == "images")
    if again:
        say("note", f"{again:,} images were evaluated without being saved: they are attacked again; verdicts stay.")
    display = Display(quiet=where.quiet)
    total = sum(len(positions_of(cell, positions)) for cell in {cell.id: cell for cell in cells}.values())
    while work:
        mine = leases.claim(shards.cell.id for shards in work)
        # Anew, since another command may have finished them after the first look, and before the claim
        now = missing(shards.cell for shards in work if shards.cell.id in mine)
        elsewhere = sum(len(shards.positions) for shards in work if shards.cell.id not in mine)
        if now:
            ran = _evaluate(now, store, where, display, total - elsewhere, given, leases)
            with leases.hold(forecasts.RUNS):
                before = store.read_json(forecasts.RUNS, list) or []
                store.write_json(forecasts.RUNS, [*before, dataclasses.asdict(ran)])
        leases.release(mine)
        mine -= leases.given  # the others of these are done
        work = missing(shards.cell for shards in work if shards.cell.id not in mine)
        if work:
            left = {shards.cell.id for shards in work}
            leases.wait(left, f"evaluating {len(left)} of the cells")


def _evaluate(
    work: Sequence[Shards],
    store: Store,
    where: Where,
    display: Display,
    total: int,
    given: Mapping[str, Clip],
    leases: Leases,
) -> PoolStatistics:
    """Compute the outstanding verdicts: on Ray, or in this process."""
    if where.cluster is not None:
        from rayclip.distributed.connect import ray_cluster
        from rayclip.distributed.evaluating import evaluate

        with ray_cluster(cluster=where.cluster, verbose=where.verbose), display:
            return evaluate(work, store, size=where.pool, display=display, total=total, leases=leases)
    device = torch.device("cuda" if torch.cuda.is_available() and where.pool.gpus != 0 else "cpu")
    device = next((clip.device for clip in given.values()), device)
    pool, gpus = where.pool, float(device.type == "cuda")
    threads = pool.threads(os.cpu_count() or 1, gpus)
    evaluator = Evaluator(store, device, pool.batch_size, compiled=pool.compiled, threads=threads, given=given)
    with display:
        return evaluate_here(resized(work, pool.largest_shard(gpus)), evaluator, display, total, leases)


def _log_model(
    logbook: Logbook, found: _Measured, model: str, label: str, parent: str | None, *, is_last: bool = False
) -> None:
    """Log a run for each scorer and defence that a model met; with `is_last` the plain model's numbers in the parent,
    too."""
    for kind in dict.fromkeys((row.scorer, row.defense) for row in found.rows if row.model == model):
        rows = [row for row in found.rows if (row.model, row.scorer, row.defense) == (model, *kind)]
        cells = [c for c in found.cells if c.model == model and (c.scorer.label, chain_label(c.defense)) == kind]
        trial = parent if is_last and kind == ("template", "none") else None
        run = logbook.evaluation(
            f"eval {rows[0].who({model: label})}", parent, rows, cells, found.warnings[model], trial
        )
        logbook.rounded(run, rows, {cell: saved.accuracy for cell, saved in found.saved.items()})


@contextlib.contextmanager
def logging(store: Store) -> Iterator[None]:
    """Turn errors of the tracker into a warning, since the results are on disk already; a full disk stays an error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if no_room(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        say("warning", f"not all could be logged ({said}): the results are in {store.root}; run again to log the rest.")


def plan_evaluation(
    models: Sequence[str],
    evaluation: Evaluation,
    where: Where,
    *,
    workers: Sequence[int] = (),
    calibrate_s: float = 60.0,
    price: float | None = None,
) -> Forecast:
    """Estimate the cost of `evaluate_models` with the same arguments; keep the estimate, to be compared later
    (`spent`).

    Args:
        workers: numbers of workers to estimate wall times for; empty means as many as fit on the cluster.
        calibrate_s: seconds to spend on measuring what earlier results do not cover; 0 does not start Ray.
        price: of one GPU hour, or of one core hour where there are no GPUs.

    Raises:
        UserError: bad arguments; or there are no earlier measurements and none may be made.
    """
    from rayclip.distributed.connect import ray_cluster
    from rayclip.distributed.evaluating import calibrate

    cells, positions = plan_all(models, [evaluation], Opened(quiet=where.quiet))
    store, costs, found = Store(where.out), Costs(), None
    work = outstanding(cells, positions, store, where.pool.largest_shard(0), save_images=where.save_adversarial)
    hardware = forecasts.common_hardware(cells, store)
    if hardware is not None:
        costs.read({cell.id: cell for cell in cells}.values(), store, hardware)
    if calibrate_s > 0 and any(costs.basis(shards.cell) != "measured" for shards in work):
        costs = Costs()
        with ray_cluster(cluster=bool(where.cluster), verbose=where.verbose), Display(quiet=where.quiet) as display:
            found = calibrate(work, cells, costs, store, where.pool, seconds=calibrate_s, display=display)
        hardware = found.hardware
    if hardware is None or (work and not costs.measured):
        raise UserError("no earlier results say what this takes: let --calibrate measure for some seconds.")
    plan = forecasts.forecast(
        resized(work, where.pool.largest_shard(hardware.gpus)),
        costs,
        hardware,
        workers=list(workers) or [found.wanted if found else 1],
        finished=len({cell.id for cell in cells}) - len(work),
        smallest=where.pool.smallest_shard(hardware.gpus),
        loading=found.loading if found else None,
        start=found.start if found else 0.0,
        price=price,
        memory=found.memory if found else 0.0,
        store=store,
    )
    forecasts.keep_plan(plan, store)
    return plan


def spent(out: str) -> tuple[Forecast | None, list[forecasts.PlanComparison], list[dict[str, Any]]]:
    """Return a results folder's plan, its cells' actual beside planned cost, and the record of each evaluation."""
    store = Store(out)
    plan = forecasts.read_plan(store)
    return (
        plan,
        [] if plan is None else forecasts.compare_with_plan(plan, store),
        store.read_json(forecasts.RUNS, list) or [],
    )
