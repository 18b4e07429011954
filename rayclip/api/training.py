"""Fine-tune one model; sweep over many trainings, or search among them, and evaluate what they give.

Bad arguments raise a `UserError` before anything is written.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayclip.api.checks import Opened, check_training, plan_all
from rayclip.api.evaluating import compare_all
from rayclip.api.logbook import Logbook, untouched_params
from rayclip.api.request import Evaluation, Where
from rayclip.data import few_shot, locate
from rayclip.data.leases import Leases
from rayclip.data.sampling import draw_record
from rayclip.distributed.connect import ray_cluster
from rayclip.distributed.search import Scores, Validation, make_asha
from rayclip.distributed.trials import (
    RUN_PREFIX,
    Trial,
    Workers,
    find_abandoned_runs,
    resolve_precision,
    save_precision,
)
from rayclip.distributed.tuning import run_trials
from rayclip.evaluation import Store
from rayclip.evaluation.cell import at_budgets
from rayclip.evaluation.front import Score, pareto_front
from rayclip.models.checkpoint import FILES, read_lineage
from rayclip.progress import Display, say
from rayclip.reports.grid import Grid
from rayclip.reports.model import model_name
from rayclip.reports.notes import heading
from rayclip.reports.rows import search_grid
from rayclip.reports.seeds import trained_numbers, training_grid
from rayclip.reports.to_terminal import show
from rayclip.types import Ranking, Row, UserError


def fine_tune(trial: Trial, where: Where) -> bool:
    """Run one training and write its checkpoint to `trial.out`; return False if that is finished already.

    Raises a `UserError` if the run failed; the message says why.
    """
    opened = Opened(quiet=where.quiet)
    trial = dataclasses.replace(trial, config=check_training(trial.config, where.train_workers, opened))
    store = Store(trial.out).child(".rayclip")
    with resolve_precision([trial], store, cluster=bool(where.cluster), verbose=where.verbose) as (trial,):
        finished = trial.is_finished()
        if finished and not where.has_to_log(store, trial.name):
            return False
        with where.logbook(store) as logbook:
            if finished:
                if logbook.has_begun(trial.name):
                    _log_ended(logbook, _with_run(trial, logbook, None, opened), None)
                return False
            errors = _train([_with_run(trial, logbook, None, opened)], where, logbook)
    if errors:
        raise UserError(f"training failed: {errors[trial.name]}")
    return True


class SeedResult(NamedTuple):
    """Result of one training with several seeds.

    Attributes:
        trials: those that are finished, one per seed.
        grid: a row of numbers per seed: of the last step and, with validation, of the last and the best epoch.
        errors: reasons of failure by trial name.
    """

    trials: list[Trial]
    grid: Grid
    errors: dict[str, str]


def fine_tune_seeds(trial: Trial, seeds: Sequence[int], where: Where) -> SeedResult:
    """Run one training with each of several seeds, to `OUT/seed-N`, as one sweep, and log mean and standard deviation
    of their numbers in the run above theirs."""
    trials = [
        dataclasses.replace(
            trial,
            name=f"seed {seed}",
            config=dataclasses.replace(trial.config, seed=seed),
            out=Store(trial.out).child(f"seed-{seed}").root,
        )
        for seed in seeds
    ]
    with _open_study("sweep", trial.name, trials, where, Opened(quiet=where.quiet)) as study:
        errors: dict[str, str] = {}
        if not all(trial.is_finished() for trial in study.trials):
            errors = _train(study.trials, where, study.logbook)
        finished = [trial for trial in study.trials if trial.name not in errors]
        numbers = {trial.name: trained_numbers(read_lineage(trial.out) or {}) for trial in finished}
        study.logbook.seeds(study.root, numbers)
    return SeedResult(finished, training_grid(numbers), errors)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        rows: of the untouched model and of every trial that succeeded.
        labels: display names by model specification.
        errors: reasons of failure by trial name.
        groups: display names without the seed, by model specification, if there are several seeds.
    """

    rows: list[Row]
    labels: dict[str, str]
    errors: dict[str, str]
    groups: Mapping[str, str] = field(default_factory=dict)


def itself(trial: Trial) -> dict[str, str]:
    """Return the default models that a sweep evaluates of a finished trial: its own, as {specification: label}."""
    return {trial.model: trial.name}


def sweep(
    name: str,
    trials: Sequence[Trial],
    evaluations: Sequence[Evaluation],
    base: str | Sequence[str],
    where: Where,
    results: Callable[[Trial], Mapping[str, str]] = itself,
    groups: Mapping[str, str] = {},
    others: Mapping[str, str] = {},
) -> SweepResult:
    """Train all trials, then evaluate the untouched model or models, every result and the others.

    Args:
        name: of the tracker's parent run.
        base: the untouched models that the trials start from.
        results: returns the models to evaluate of a finished trial, as {specification: label}.
        groups: display names without the seed, by model specification, if there are several seeds.
        others: further models to evaluate, as {specification: label}.
    """
    opened, bases = Opened(quiet=where.quiet), _as_list(base)
    plan_all([*bases, *others], evaluations, opened)
    with _open_study("sweep", name, trials, where, opened) as study:
        errors: dict[str, str] = {}
        if not all(trial.is_finished() for trial in study.trials):
            study.connect()  # for the evaluation, too
            errors = _train(study.trials, where, study.logbook)
        trained = [trial for trial in study.trials if trial.name not in errors]
        rows, labels = study.evaluate(bases, trained, results, evaluations, groups, others)
    return SweepResult(rows=rows, labels=labels, errors=errors, groups=groups)


@dataclass(frozen=True, kw_only=True)
class Found(SweepResult):
    """Result of a search; `rows` are of the untouched model and the front, on the test data.

    Attributes:
        scores: last scores of every trial on the validation data.
        front: names of the completed trials on the Pareto front of clean and robust accuracy, best clean one first.
        robust: the attacks behind the robust accuracy.
        by: the accuracy that trials were compared by.
        asha: whether ASHA may have stopped some.
    """

    scores: dict[str, Score]
    front: list[str]
    robust: str
    by: Ranking = "mean"
    asha: bool = True


def search(
    name: str,
    trials: Sequence[Trial],
    validation: Validation,
    evaluations: Sequence[Evaluation],
    base: str | Sequence[str],
    where: Where,
    *,
    reduction: float | None = 3,
) -> Found:
    """Run trials under ASHA early stopping, then evaluate the Pareto front of clean and robust accuracy.

    Args:
        name: of the tracker's parent run.
        validation: what trials are ranked by; its data must not overlap those of the trials and the evaluations.
        base: as in `sweep`.
        reduction: ASHA's reduction factor: about one in `reduction` trials passes each rung; None stops no trial.
    """
    opened, bases = Opened(quiet=where.quiet), _as_list(base)
    choice = Evaluation(data=[validation.data], attacks=validation.attacks, protocol=validation.protocol)
    plan_all(bases, [choice, *evaluations], opened)
    with _open_study("search", name, trials, where, opened) as study:
        logbook = study.logbook
        # What stops a trial are the scores of the others, so that two searches do not share them
        study.stack.enter_context(Leases(logbook.store).hold("search", "searching"))
        scores = Scores(study.trials, logbook.store)

        def on_measure(trial: Trial, result: dict[str, Any]) -> None:
            scores.keep(trial.name, Score(epoch=result["epoch"], clean=result["clean"], robust=result["robust"]))
            values = [(f"search/{name}", result[name], result["step"]) for name in ("clean", "robust", "score")]
            logbook.journal.metrics(str(trial.run), values)

        def on_finish(trial: Trial, error: str | None) -> None:
            if error is None and trial.name in scores:
                scores.keep(trial.name, dataclasses.replace(scores[trial.name], ended=True))
            _log_ended(logbook, trial, error)

        errors: dict[str, str] = {}
        if scores.ended != {trial.name for trial in study.trials}:
            study.connect()  # for the evaluation, too
            errors = _train(
                study.trials,
                where,
                logbook,
                skip=scores.ended,
                on_finish=on_finish,
                measure=dataclasses.replace(validation, data=locate(validation.data)),
                on_measure=on_measure,
                scheduler=None if reduction is None else make_asha(study.trials, reduction),
            )
        whole = [trial for trial in study.trials if trial.name in scores and trial.is_finished()]
        on_front = pareto_front([(scores[trial.name].clean, scores[trial.name].robust) for trial in whole])
        front = [trial for trial, best in zip(whole, on_front, strict=True) if best]
        front.sort(key=lambda trial: -scores[trial.name].clean)
        rows, labels = study.evaluate(bases, front, itself, evaluations)
    attacks = at_budgets(validation.attacks, validation.protocol.budgets)
    withstood = [a.label_with_budget for a in attacks if a.name != "clean"]
    return Found(
        scores=scores,
        front=[trial.name for trial in front],
        robust=" and ".join(map(heading, withstood)),
        rows=rows,
        labels=labels,
        errors=errors,
        by=validation.by,
        asha=reduction is not None,
    )


def show_search(found: Found) -> None:
    """Print every trial's last validation scores, longest run and best first; * marks the Pareto front."""
    show([search_grid(found.scores, found.front, found.robust, found.by, asha=found.asha)])


class _Study(NamedTuple):
    """A sweep or search that has begun: its validated trials with their runs, and the run above them."""

    trials: list[Trial]
    root: str
    logbook: Logbook
    where: Where
    opened: Opened
    stack: contextlib.ExitStack

    def connect(self) -> None:
        """Connect to Ray until the study ends."""
        self.stack.enter_context(ray_cluster(cluster=bool(self.where.cluster), verbose=self.where.verbose))

    def evaluate(
        self,
        bases: Sequence[str],
        trained: Sequence[Trial],
        results: Callable[[Trial], Mapping[str, str]],
        evaluations: Sequence[Evaluation],
        groups: Mapping[str, str] = {},
        others: Mapping[str, str] = {},
    ) -> tuple[list[Row], dict[str, str]]:
        """Evaluate the untouched models, others and the trained ones; return the rows, and labels by specification."""
        labels, runs = {base: f"untouched {model_name(base)}" for base in bases} | dict(others), dict[str, str]()
        configs = [trial.config for trial in self.trials]
        for trial in trained:
            labels |= results(trial)
            runs |= dict.fromkeys(results(trial), str(trial.run))
        rows = compare_all(
            self.root,
            labels,
            evaluations,
            self.opened,
            self.logbook,
            self.where,
            runs=runs,
            untouched={base: untouched_params(base, configs) for base in bases},
            groups=groups,
        )
        return rows, labels


def _as_list(base: str | Sequence[str]) -> list[str]:
    return [base] if isinstance(base, str) else list(base)


@contextlib.contextmanager
def _open_study(kind: str, name: str, trials: Sequence[Trial], where: Where, opened: Opened) -> Iterator[_Study]:
    """Validate the trials, open their runs, and log finished ones whose driver was lost before it had logged them."""
    trials = [dataclasses.replace(t, config=check_training(t.config, where.train_workers, opened)) for t in trials]
    store = Store(where.out)
    with contextlib.ExitStack() as stack:
        trials = stack.enter_context(
            resolve_precision(trials, store, cluster=bool(where.cluster), verbose=where.verbose)
        )
        finished = [trial.run_key for trial in trials if trial.is_finished()]
        logbook = stack.enter_context(where.logbook(store))
        root = logbook.open(name, tags={"rayclip.kind": kind})
        missed = [key for key in finished if logbook.has_begun(key)]
        trials = [_with_run(trial, logbook, root, opened) for trial in trials]
        for trial in (trial for trial in trials if trial.run_key in missed):
            _log_ended(logbook, trial, None)
        yield _Study(trials, root, logbook, where, opened, stack)


def _with_run(trial: Trial, logbook: Logbook, parent: str | None, opened: Opened) -> Trial:
    config = trial.config
    tags = {"rayclip.kind": "train", "rayclip.digest": config.digest()}
    run = logbook.open(trial.name, key=trial.run_key, parent=parent, params=config.flat(), tags=tags)
    data = opened.data(config.data, "train", config.resolution, config.names)
    drawn = draw_record(few_shot(data, config.shots, config.seed), config.shots, config.seed) if config.shots else None
    logbook.trains_on(run, data, config.data, drawn)
    return dataclasses.replace(trial, run=run)


def _train(
    trials: Sequence[Trial], where: Where, logbook: Logbook, *, skip: Container[str] = (), **options: Any
) -> dict[str, str]:
    """Run the unfinished trials, with further options of `run_trials`; return the reasons of failure by trial name.

    Those that another command runs in the same folder are awaited, and taken over if it dies.
    """
    save_precision(trials, logbook.store)
    display, storage = Display(quiet=where.quiet), logbook.store.child("unfinished")
    options = {"on_finish": functools.partial(_log_ended, logbook), **options}
    errors: dict[str, str] = {}
    awaited: list[Trial] = []
    with Leases(logbook.store) as leases:
        if _is_alone(leases):
            for run in find_abandoned_runs(trials, storage):
                say(
                    "note",
                    f"{storage.root}/{run} is an unfinished run of other settings or of an earlier version: it is not "
                    "gone on with, and is deleted when this one has ended well.",
                )
        left = [trial for trial in trials if trial.name not in skip and not trial.is_finished()]
        while left:
            mine = leases.claim(trial.train_run for trial in left)
            now = [trial for trial in left if trial.train_run in mine and not trial.is_finished()]
            if now:
                with ray_cluster(cluster=bool(where.cluster), verbose=where.verbose), display:
                    errors |= run_trials(
                        now,
                        workers=Workers.for_cluster(where.train_workers, where.least_workers),
                        storage=storage,
                        log=logbook.journal,
                        display=display,
                        on_report=logbook.deliver,
                        is_alone=lambda: _is_alone(leases),
                        **options,
                    )
            leases.release(mine)
            left = [trial for trial in left if trial not in now and not trial.is_finished()]
            awaited = awaited or left
            if left:
                leases.wait([trial.train_run for trial in left], f"training {len(left)} of the models")
        if not errors and _is_alone(leases):  # the last one to leave
            storage.delete_folder("")
        for trial in awaited:
            if trial.name not in errors and logbook.has_begun(trial.run_key):
                _log_ended(logbook, trial, None)  # the command that trained it was killed before it could
    return errors


def _is_alone(leases: Leases) -> bool:
    """Return whether no other command in the folder trains, or waits for a training."""
    names = set[str]().union(*(other.holds | other.wants | other.waits for other in leases.others().values()))
    return not any(name.startswith(RUN_PREFIX) for name in names)


def _log_ended(logbook: Logbook, trial: Trial, error: str | None) -> None:
    """Log a trial's checkpoints if it is finished, and close its tracker run."""
    if trial.run is None:
        return
    if error is not None or not trial.is_finished():
        logbook.finish(trial.run, failed=error is not None)
        return
    for epoch in sorted({*trial.keep_epochs, trial.config.recipe.epochs}):
        last = epoch == trial.config.recipe.epochs
        name, folder = (trial.name, "checkpoint") if last else (f"{trial.name} epoch {epoch}", f"epoch-{epoch}")
        logbook.checkpoint(trial.run, trial.at_epoch(epoch).node_copy(FILES), trial.model_at(epoch), name, folder)
    logbook.end(trial.run_key)
