"""Search settings under early stopping, and evaluate the Pareto front of clean and robust accuracy."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from rayclip.api.checks import Opened, check_training
from rayclip.api.comparing import compare_all, plan_all
from rayclip.api.logbook import untouched_params
from rayclip.api.request import Evaluation, Where
from rayclip.api.training import itself, label_models, log_ended, with_run
from rayclip.data import locate
from rayclip.distributed import (
    Trial,
    Validation,
    ray_cluster,
    resolve_precision,
    run_search,
    save_precision,
    unfinished_trials,
)
from rayclip.evaluation import Store
from rayclip.evaluation.cell import at_budgets, label_with_eps
from rayclip.evaluation.front import Score, pareto_front
from rayclip.progress import Display
from rayclip.reports.notes import heading
from rayclip.reports.rows import search_grid
from rayclip.reports.to_terminal import show
from rayclip.types import Row


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
    plan_all([base], [choice, *evaluations], opened)
    validation = dataclasses.replace(validation, data=locate(validation.data))
    store = Store(where.out)
    with contextlib.ExitStack() as stack:
        trials = stack.enter_context(resolve_precision(trials, store, cluster=where.cluster, verbose=where.verbose))
        logbook = stack.enter_context(where.logbook(store))
        root = logbook.open(name, tags={"rayclip.kind": "search"})
        trials = [with_run(t, logbook, root, opened) for t in trials]
        if unfinished_trials(trials, store):
            save_precision(trials, store)
            stack.enter_context(ray_cluster(cluster=where.cluster, verbose=where.verbose))  # also for the evaluation
        with Display(quiet=where.quiet) as display:
            scores, errors = run_search(
                trials,
                validation,
                store=store,
                reduction=reduction,
                workers=where.train_workers,
                least_workers=where.least_workers,
                log=logbook.journal,
                display=display,
                on_finish=functools.partial(log_ended, logbook),
                on_report=logbook.deliver,
            )
        whole = [t for t in trials if t.name in scores and t.is_finished()]
        on_front = pareto_front([(scores[t.name].clean, scores[t.name].robust) for t in whole])
        front = [trial for trial, best in zip(whole, on_front, strict=True) if best]
        front.sort(key=lambda trial: -scores[trial.name].clean)
        labels, runs = label_models(base, front, itself)
        untouched = {base: untouched_params(base, [t.config for t in trials])}
        rows = compare_all(root, labels, runs, untouched, evaluations, opened, logbook, store, where)
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


def show_search(found: Found) -> None:
    """Print every trial's last validation scores, longest run and best first; * marks the Pareto front."""
    show([search_grid(found.scores, found.front, found.robust)])
