"""Fine-tune one model, or sweep over many trainings and evaluate them all."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rayclip.api.checks import Opened, check_training
from rayclip.api.comparing import compare_all, plan_all
from rayclip.api.logbook import Logbook, untouched_params
from rayclip.api.request import Evaluation, Where
from rayclip.data import few_shot
from rayclip.data.fewshot import draw_record
from rayclip.distributed import (
    Trial,
    Workers,
    find_abandoned_runs,
    ray_cluster,
    resolve_precision,
    run_trials,
    save_precision,
)
from rayclip.evaluation import Store
from rayclip.models.checkpoint import FILES
from rayclip.progress import Display, say
from rayclip.reports.model import model_name
from rayclip.types import Row, UserError


def fine_tune(trial: Trial, where: Where) -> bool:
    """Run one training and write its checkpoint to `trial.out`; return False if that is finished already.

    Raises:
        UserError: bad arguments, before anything is written; or the run failed (the message says why).
    """
    opened = Opened(quiet=where.quiet)
    trial = dataclasses.replace(trial, config=check_training(trial.config, where.train_workers, opened))
    store = Store(trial.out).child(".rayclip")
    with resolve_precision([trial], store, cluster=where.cluster, verbose=where.verbose) as (trial,):
        if trial.is_finished():
            if where.has_to_log(store, trial.name):
                with where.logbook(store) as logbook:
                    begun = [with_run(trial, logbook, None, opened)] if logbook.has_begun(trial.name) else []
                    log_missed(begun, logbook)
            return False
        with where.logbook(store) as logbook:
            errors = _train([with_run(trial, logbook, None, opened)], store, where, logbook)
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
    plan_all([base], evaluations, opened)
    store = Store(where.out)
    with contextlib.ExitStack() as stack:
        trials = stack.enter_context(resolve_precision(trials, store, cluster=where.cluster, verbose=where.verbose))
        unfinished = [t for t in trials if not t.is_finished()]
        logbook = stack.enter_context(where.logbook(store))
        root = logbook.open(name, tags={"rayclip.kind": "sweep"})
        begun = [t.name for t in trials if t.is_finished() and logbook.has_begun(t.name)]
        trials = [with_run(t, logbook, root, opened) for t in trials]
        log_missed([t for t in trials if t.name in begun], logbook)
        errors: dict[str, str] = {}
        if unfinished:
            stack.enter_context(ray_cluster(cluster=where.cluster, verbose=where.verbose))  # also for the evaluation
            errors = _train(trials, store, where, logbook)
        trials = [t for t in trials if t.name not in errors]
        labels, runs = label_models(base, trials, results)
        untouched = {base: untouched_params(base, [t.config for t in trials])}
        rows = compare_all(root, labels, runs, untouched, evaluations, opened, logbook, store, where)
    return SweepResult(rows=rows, labels=labels, errors=errors)


def label_models(
    base: str, trials: Sequence[Trial], results: Callable[[Trial], Mapping[str, str]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return labels of the untouched model and the trials' models, and the tracker run that trained each of them."""
    labels, runs = {base: f"untouched {model_name(base)}"}, dict[str, str]()
    for trial in trials:
        labels |= results(trial)
        assert trial.run is not None
        runs |= dict.fromkeys(results(trial), trial.run)
    return labels, runs


def with_run(trial: Trial, logbook: Logbook, parent: str | None, opened: Opened) -> Trial:
    config = trial.config
    tags = {"rayclip.kind": "train", "rayclip.digest": config.digest()}
    run = logbook.open(trial.name, parent=parent, params=config.flat(), tags=tags)
    data = opened.data(config.data, "train", config.resolution, config.names)
    drawn = draw_record(few_shot(data, config.shots, config.seed), config.shots, config.seed) if config.shots else None
    logbook.trains_on(run, data, config.data, drawn)
    return dataclasses.replace(trial, run=run)


def _train(trials: Sequence[Trial], store: Store, where: Where, logbook: Logbook) -> dict[str, str]:
    """Run the unfinished trials; return the reasons of failure by trial name."""
    save_precision(trials, store)
    display, storage = Display(quiet=where.quiet), store.child("unfinished")
    for run in find_abandoned_runs(trials, storage):
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
            log=logbook.journal,
            display=display,
            on_finish=functools.partial(log_ended, logbook),
            on_report=logbook.deliver,
        )


def log_ended(logbook: Logbook, trial: Trial, error: str | None) -> None:
    """Log a trial's checkpoints if it is finished, and close its tracker run."""
    if error is None and trial.run is not None and trial.is_finished():
        for epoch in sorted({*trial.keep_epochs, trial.config.recipe.epochs}):
            last = epoch == trial.config.recipe.epochs
            name, folder = (trial.name, "checkpoint") if last else (f"{trial.name} epoch {epoch}", f"epoch-{epoch}")
            logbook.checkpoint(trial.run, trial.at_epoch(epoch).node_copy(FILES), trial.model_at(epoch), name, folder)
        logbook.end(trial.name)
    elif trial.run is not None:
        logbook.finish(trial.run, failed=error is not None)


def log_missed(trials: Sequence[Trial], logbook: Logbook) -> None:
    """Log finished trials whose driver died, or ran out of disk space, before it had logged them."""
    for trial in trials:
        log_ended(logbook, trial, None)
