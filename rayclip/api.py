"""The Python interface: fine-tune, sweep, search and evaluate. The command line and `sweeps/` use it too.

All arguments are validated before Ray starts and before a file is written.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayclip import terminal
from rayclip.attacks import Attack
from rayclip.attacks.bert import TextSettings
from rayclip.attacks.clean import Clean
from rayclip.checks import Evaluation, Opened, Where, check_training, plan_cells
from rayclip.data import Resolution, few_shot, locate, open_pairs
from rayclip.data.fewshot import draw_record
from rayclip.data.images import mixed_sizes
from rayclip.defenses import chain_label
from rayclip.distributed import (
    Trial,
    Validation,
    Workers,
    calibrate,
    evaluate,
    forgotten,
    keep_precision,
    ray_cluster,
    run_search,
    run_trials,
    waiting,
    with_precision,
)
from rayclip.evaluation import Cell, Protocol, Store, collect_rows, outstanding
from rayclip.evaluation import forecast as forecasts
from rayclip.evaluation.alarms import alarms, cut_alarms
from rayclip.evaluation.cell import at_budgets, budgets_for, label_with_eps
from rayclip.evaluation.costs import Costs
from rayclip.evaluation.forecast import Forecast
from rayclip.evaluation.front import Score, pareto_front
from rayclip.evaluation.retrieval import RecallRow, make_task, read_recalls, run_task
from rayclip.logbook import Logbook, markdown
from rayclip.models.checkpoint import FILES, model_record
from rayclip.models.resizing import Resize, check_resize
from rayclip.progress import Display, say
from rayclip.reports.results import LINEAGE, model_name
from rayclip.reports.retrieval import retrieval_tables
from rayclip.reports.search import search_table
from rayclip.reports.table import heading, rows_json
from rayclip.store import no_room
from rayclip.types import Row, UserError


def evaluate_models(models: Sequence[str], evaluation: Evaluation, where: Where) -> list[Row]:
    """Evaluate models; write the results to disk, log them to the tracker and return them.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    cells, positions = plan_cells(models, evaluation, Opened(quiet=where.quiet))
    store = Store(where.out)
    with where.logbook(store) as logbook:
        rows = _evaluate(cells, positions, store, where)
        _write_results(store, rows, {}, cells)
        found = _alarms(cells, rows, positions, store)
        with _logging(store):
            for model in dict.fromkeys(models):
                _log_evaluations(logbook, model, model, None, rows, cells, found[model])
    return rows


def plan_evaluation(
    models: Sequence[str],
    evaluation: Evaluation,
    where: Where,
    *,
    workers: Sequence[int] = (),
    calibrate_s: float = 60.0,
    price: float | None = None,
) -> Forecast:
    """Estimate the cost of `evaluate_models` with the same arguments.

    The estimate is also written beside the results, to be compared later with the actual cost (`forecast.spent`).

    Args:
        workers: numbers of workers to estimate wall times for; empty means as many as fit on the cluster.
        calibrate_s: seconds to spend on measuring what earlier results do not cover; 0 does not start Ray.
        price: of one GPU hour, or of one core hour where there are no GPUs.

    Raises:
        UserError: bad arguments; or there are no earlier measurements and none may be made.
    """
    cells, positions = plan_cells(models, evaluation, Opened(quiet=where.quiet))
    store, costs, found = Store(where.out), Costs(), None
    work = outstanding(cells, positions, store, where.pool.shard_size)
    hardware = forecasts.common_hardware(cells, store)
    if hardware is not None:
        costs.read({cell.id: cell for cell in cells}.values(), store, hardware)
    if calibrate_s > 0 and any(costs.basis(shards.cell) != "measured" for shards in work):
        costs = Costs()
        with ray_cluster(cluster=where.cluster, verbose=where.verbose), Display(quiet=where.quiet) as display:
            found = calibrate(work, cells, costs, store, where.pool, seconds=calibrate_s, display=display)
        hardware = found.hardware
    if hardware is None or (work and not costs.measured):
        raise UserError("no earlier results say what this takes: let --calibrate measure for some seconds.")
    plan = forecasts.forecast(
        work,
        costs,
        hardware,
        workers=list(workers) or [found.wanted if found else 1],
        finished=len({cell.id for cell in cells}) - len(work),
        smallest=where.pool.smallest_shard,
        loading=found.loading if found else None,
        start=found.start if found else 0.0,
        price=price,
        before=lambda cell: forecasts.noted(cell.id, store),
    )
    forecasts.keep_plan(plan, store)
    return plan


def spent(out: str) -> tuple[Forecast | None, list[forecasts.Spent], list[dict[str, Any]]]:
    """Return a results folder's plan, its cells' actual beside planned cost, and the record of each evaluation."""
    store = Store(out)
    plan = forecasts.read_plan(store)
    return plan, [] if plan is None else forecasts.spent(plan, store), store.read_json(forecasts.RUNS) or []


def evaluate_retrieval(
    models: Sequence[str],
    data: str,
    where: Where,
    *,
    limit: int | None = None,
    resolution: Resolution = "model",
    resize: Resize = "antialias",
    attacks: Sequence[Attack] = (Clean(),),
    eps: float | tuple[float, ...] | None = None,
    seed: int = 0,
) -> list[RecallRow]:
    """Evaluate recall at 1, 5, 10 of models on image-caption data (`open_pairs`), in this process.

    Results are written to disk, logged to the tracker and returned; what is in `where.out` is not computed again.

    Args:
        attacks: attacks on pairs (`attacks.pairs`); an attack with a stop rule needs `stop="final"`.
        eps: budget in pixel units of the attacks that set none themselves; with several budgets, each of these attacks
            is run at each budget.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    check_resize(resize, resolution)
    opened = Opened(quiet=where.quiet)
    pairs = open_pairs(data)
    opened.check(pairs)
    if resolution == "native" and pairs.native_size is None:
        raise mixed_sizes(pairs)
    specs = list(dict.fromkeys(models))
    budgets = Protocol(eps=eps).budgets
    found_tasks = [
        make_task(
            (m, opened.fingerprint(m)),
            pairs,
            limit=limit,
            resolution=resolution,
            resize=resize,
            attack=attack,
            eps=budget,
            seed=seed,
        )
        for m in specs
        for attack in attacks
        for budget in budgets_for(attack, budgets)
    ]
    tasks = list({(task.model, task.id): task for task in found_tasks}.values())
    for attack in {task.attack for task in tasks}:
        if isinstance(attack, TextSettings):
            attack.source(opened.model(specs[-1]))
    store = Store(where.out)
    found = [read_recalls(task, store) for task in tasks]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[RecallRow] = []
    with where.logbook(store) as logbook, Display(quiet=where.quiet) as display:
        for spec in specs:
            name = f"{LINEAGE}/{opened.fingerprint(spec)}.json"
            if store.size(name) is None:  # keep the label that an evaluation may have written
                store.write_json(name, model_record(spec, None))
        for task, mine in zip(tasks, found, strict=True):
            if mine is None:
                clip = opened.model(task.model).to(device)
                update = functools.partial(display.update, f"{task.model} {task.attack_label}")
                run_task(task, clip, pairs, store, where.pool.batch_size, update)
                mine = read_recalls(task, store)
                assert mine is not None
            with _logging(store):
                logbook.retrieval(task, mine)
            rows += mine
    for sentence in cut_alarms(rows):
        say("warning", sentence)
    return rows


def fine_tune(trial: Trial, where: Where) -> bool:
    """Run one training and write its checkpoint to `trial.out`; return False if that is finished already.

    Raises:
        UserError: bad arguments, before anything is written; or the run failed (the message says why).
    """
    opened = Opened(quiet=where.quiet)
    trial = dataclasses.replace(trial, config=check_training(trial.config, where.train_workers, opened))
    store = Store(trial.out).child(".rayclip")
    with with_precision([trial], store, cluster=where.cluster, verbose=where.verbose) as (trial,):
        if trial.is_finished():
            if where.tracking is not None and Logbook.has_to_end(store, trial.name):
                with where.logbook(store) as logbook:
                    begun = [_with_run(trial, logbook, None, opened)] if logbook.has_begun(trial.name) else []
                    _catch_up(begun, logbook)
            return False
        with where.logbook(store) as logbook:
            errors = _train([_with_run(trial, logbook, None, opened)], store, where, logbook)
    if errors:
        raise UserError(f"training failed: {errors[trial.name]}")
    return True


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        rows: of the untouched model and of every trial that succeeded.
        labels: display names by model specification.
        errors: reasons of failure by trial name.
    """

    rows: list[Row]
    labels: dict[str, str]
    errors: dict[str, str]


def compare(name: str, models: Mapping[str, str], evaluations: Sequence[Evaluation], where: Where) -> list[Row]:
    """Evaluate models under one parent run, as one table; write, log and return the results.

    Args:
        name: of the tracker's parent run.
        models: display names by model specification.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    opened = Opened(quiet=where.quiet)
    _plan(list(models), evaluations, opened)
    store = Store(where.out)
    with where.logbook(store) as logbook:
        root = logbook.open(name, tags={"rayclip.kind": "comparison"})
        return _compare(root, models, {}, evaluations, opened, logbook, store, where)


def itself(trial: Trial) -> dict[str, str]:
    """Return the default models that a sweep evaluates of a finished trial: its own, as {specification: label}."""
    return {trial.model: trial.name}


def sweep(
    name: str,
    trials: Sequence[Trial],
    evaluations: Sequence[Evaluation],
    base: str,
    where: Where,
    results: Callable[[Trial], Mapping[str, str]] = itself,
) -> SweepResult:
    """Train all trials, then evaluate the untouched model `base` and every result.

    Args:
        name: of the tracker's parent run.
        results: returns the models to evaluate of a finished trial, as {specification: label}.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    opened = Opened(quiet=where.quiet)
    trials = [dataclasses.replace(t, config=check_training(t.config, where.train_workers, opened)) for t in trials]
    _plan([base], evaluations, opened)
    store = Store(where.out)
    with contextlib.ExitStack() as stack:
        trials = stack.enter_context(with_precision(trials, store, cluster=where.cluster, verbose=where.verbose))
        unfinished = [t for t in trials if not t.is_finished()]
        logbook = stack.enter_context(where.logbook(store))
        root = logbook.open(name, tags={"rayclip.kind": "sweep"})
        begun = [t.name for t in trials if t.is_finished() and logbook.has_begun(t.name)]
        trials = [_with_run(t, logbook, root, opened) for t in trials]
        _catch_up([t for t in trials if t.name in begun], logbook)
        errors: dict[str, str] = {}
        if unfinished:
            stack.enter_context(ray_cluster(cluster=where.cluster, verbose=where.verbose))  # also for the evaluation
            errors = _train(trials, store, where, logbook)
        trials = [t for t in trials if t.name not in errors]
        labels, runs = _named(base, trials, results)
        rows = _compare(root, labels, runs, evaluations, opened, logbook, store, where)
    return SweepResult(rows=rows, labels=labels, errors=errors)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Result of a search.

    Attributes:
        scores: last scores of every trial on the validation data.
        front: names of the completed trials on the Pareto front of clean and robust accuracy, best clean one first.
        robust: the attacks behind the robust accuracy.
        rows, labels: of the untouched model and the front on the test data, as in `SweepResult`.
        errors: reasons of failure by trial name.
    """

    scores: dict[str, Score]
    front: list[str]
    robust: str
    rows: list[Row]
    labels: dict[str, str]
    errors: dict[str, str]


def search(
    name: str,
    trials: Sequence[Trial],
    validation: Validation,
    evaluations: Sequence[Evaluation],
    base: str,
    where: Where,
    *,
    reduction: float = 3,
) -> Found:
    """Run trials under ASHA early stopping, then evaluate the Pareto front of clean and robust accuracy.

    Args:
        name: of the tracker's parent run.
        validation: what trials are ranked by; its data must not overlap those of the trials and the evaluations.
        reduction: ASHA's reduction factor: about one in `reduction` trials passes each rung.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    opened = Opened(quiet=where.quiet)
    trials = [dataclasses.replace(t, config=check_training(t.config, where.train_workers, opened)) for t in trials]
    choice = Evaluation(data=[validation.data], attacks=validation.attacks, protocol=validation.protocol)
    _plan([base], [choice, *evaluations], opened)
    validation = dataclasses.replace(validation, data=locate(validation.data))
    store = Store(where.out)
    with contextlib.ExitStack() as stack:
        trials = stack.enter_context(with_precision(trials, store, cluster=where.cluster, verbose=where.verbose))
        logbook = stack.enter_context(where.logbook(store))
        root = logbook.open(name, tags={"rayclip.kind": "search"})
        trials = [_with_run(t, logbook, root, opened) for t in trials]
        if waiting(trials, store):
            keep_precision(trials, store)
            stack.enter_context(ray_cluster(cluster=where.cluster, verbose=where.verbose))  # also for the evaluation
        with Display(quiet=where.quiet) as display:
            scores, errors = run_search(
                trials,
                validation,
                store=store,
                reduction=reduction,
                workers=where.train_workers,
                least_workers=where.least_workers,
                spool=logbook.spool,
                display=display,
                on_finish=functools.partial(_ended, logbook),
                on_report=logbook.deliver,
            )
        whole = [t for t in trials if t.name in scores and t.is_finished()]
        on_front = pareto_front([(scores[t.name].clean, scores[t.name].robust) for t in whole])
        front = [trial for trial, best in zip(whole, on_front, strict=True) if best]
        front.sort(key=lambda trial: -scores[trial.name].clean)
        labels, runs = _named(base, front, itself)
        rows = _compare(root, labels, runs, evaluations, opened, logbook, store, where)
    attacks = at_budgets(validation.attacks, validation.protocol.budgets)
    withstood = [label_with_eps(a, a.eps if a.needs_eps else None) for a in attacks if a.name != "clean"]
    return Found(
        scores=scores,
        front=[t.name for t in front],
        robust=" and ".join(map(heading, withstood)),
        rows=rows,
        labels=labels,
        errors=errors,
    )


def _named(
    base: str, trials: Sequence[Trial], results: Callable[[Trial], Mapping[str, str]]
) -> tuple[dict[str, str], dict[str, str | None]]:
    """Return labels of the untouched model and the trials' models, and the tracker run that trained each of them."""
    labels, runs = {base: f"untouched {model_name(base)}"}, dict[str, str | None]()
    for trial in trials:
        labels |= results(trial)
        runs |= dict.fromkeys(results(trial), trial.run)
    return labels, runs


def _plan(
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


def _compare(
    root: str | None,
    labels: Mapping[str, str],
    runs: Mapping[str, str | None],
    evaluations: Sequence[Evaluation],
    opened: Opened,
    logbook: Logbook,
    store: Store,
    where: Where,
) -> list[Row]:
    """Evaluate models; log each below its run in `runs` or below a new one, and the table of all in `root`."""
    cells, positions = _plan(list(labels), evaluations, opened)
    rows = _evaluate(cells, positions, store, where)
    _write_results(store, rows, labels, cells)
    found = _alarms(cells, rows, positions, store)
    last = {run: model for model, run in runs.items()}  # of a run's several models: the trained one comes last
    with _logging(store):
        for model, label in labels.items():
            run = runs.get(model) or logbook.open(label, parent=root, tags={"rayclip.kind": "untouched"})
            trial = run if last.get(run) == model else None
            _log_evaluations(logbook, model, label, run, rows, cells, found[model], trial)
            logbook.finish(run)
        logbook.summary(root, rows, labels)
    return rows


@contextlib.contextmanager
def _logging(store: Store) -> Iterator[None]:
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


def show_search(found: Found) -> None:
    """Print every trial's last validation scores, longest run and best first; * marks the Pareto front."""
    console = terminal.console()
    console.print(search_table(found.scores, found.front, found.robust).rich(console.width))


def show_retrieval(rows: Sequence[RecallRow]) -> None:
    """Print the tables to standard output."""
    console = terminal.console()
    for table in retrieval_tables(rows):
        console.print(table.rich(console.width))


def _with_run(trial: Trial, logbook: Logbook, parent: str | None, opened: Opened) -> Trial:
    config = trial.config
    tags = {"rayclip.kind": "train", "rayclip.digest": config.digest()}
    run = logbook.open(trial.name, parent=parent, params=config.flat(), tags=tags)
    data = opened.data(config.data, "train", config.resolution, config.names)
    drawn = draw_record(few_shot(data, config.shots, config.seed), config.shots, config.seed) if config.shots else None
    logbook.trains_on(run, data, config.data, drawn)
    return dataclasses.replace(trial, run=run)


def _train(trials: Sequence[Trial], store: Store, where: Where, logbook: Logbook) -> dict[str, str]:
    """Run the unfinished trials; return the reasons of failure by trial name."""
    keep_precision(trials, store)
    display, storage = Display(quiet=where.quiet), store.child("unfinished")
    for run in forgotten(trials, storage):
        say(
            "note",
            f"{storage.root}/{run} is an unfinished run of other settings or of an earlier version: it is not gone on "
            "with, and is deleted when this one has ended well.",
        )
    with ray_cluster(cluster=where.cluster, verbose=where.verbose), display:
        return run_trials(
            trials,
            workers=Workers.for_cluster(where.train_workers, where.least_workers),
            storage=storage,
            spool=logbook.spool,
            display=display,
            on_finish=functools.partial(_ended, logbook),
            on_report=logbook.deliver,
        )


def _ended(logbook: Logbook, trial: Trial, error: str | None) -> None:
    """Log a trial's checkpoints if it is finished, and close its tracker run."""
    if error is None and trial.is_finished():
        for epoch in sorted({*trial.keep_epochs, trial.config.recipe.epochs}):
            last = epoch == trial.config.recipe.epochs
            name, folder = (trial.name, "checkpoint") if last else (f"{trial.name} epoch {epoch}", f"epoch-{epoch}")
            logbook.checkpoint(trial.run, trial.at_epoch(epoch).node_copy(FILES), trial.model_at(epoch), name, folder)
        logbook.end(trial.name)
    else:
        logbook.finish(trial.run, failed=error is not None)


def _catch_up(trials: Sequence[Trial], logbook: Logbook) -> None:
    """Log finished trials whose driver died, or ran out of disk space, before it had logged them."""
    for trial in trials:
        _ended(logbook, trial, None)


def _evaluate(cells: Sequence[Cell], positions: dict[str, np.ndarray], store: Store, where: Where) -> list[Row]:
    work = outstanding(cells, positions, store, where.pool.shard_size)
    if work:
        display = Display(quiet=where.quiet)
        total = sum(len(positions[cell.data]) for cell in {cell.id: cell for cell in cells}.values())
        with ray_cluster(cluster=where.cluster, verbose=where.verbose), display:
            ran = evaluate(work, store, size=where.pool, display=display, total=total)
        store.write_json(forecasts.RUNS, [*(store.read_json(forecasts.RUNS) or []), dataclasses.asdict(ran)])
    return collect_rows(cells, positions, store)


def _alarms(
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


def _log_evaluations(
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
        trial: the run that trained the model; the numbers of the plain model are logged there too.
    """
    for kind in dict.fromkeys((row.scorer, row.defense) for row in rows if row.model == model):
        mine = [row for row in rows if (row.model, row.scorer, row.defense) == (model, *kind)]
        own = [c for c in cells if c.model == model and (c.scorer.label, chain_label(c.defense)) == kind]
        itself = trial if kind == ("template", "none") else None
        logbook.evaluation(f"eval {mine[0].who({model: label})}", parent, mine, own, warnings, itself)


def _write_results(store: Store, rows: Sequence[Row], labels: Mapping[str, str], cells: Sequence[Cell]) -> None:
    """Write `results.json`, `table.md` and each model's record with its origin beside the cells."""
    for spec, fingerprint in {(cell.model, cell.model_fingerprint) for cell in cells}:
        store.write_json(f"{LINEAGE}/{fingerprint}.json", model_record(spec, labels.get(spec)))
    store.write("results.json", rows_json(rows).encode())
    store.write("table.md", markdown(rows, labels).encode("utf-8", "backslashreplace"))
