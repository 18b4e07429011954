"""Estimate what a sweep takes, measured for some seconds on the workers that it would have."""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rayclip.api.checks import Opened, check_training, plan_all
from rayclip.api.evaluating import plan_evaluation
from rayclip.api.request import Evaluation, Where
from rayclip.api.training import itself
from rayclip.data import few_shot
from rayclip.distributed.connect import ray_cluster
from rayclip.distributed.rates import measure_rates
from rayclip.distributed.trials import Trial, Workers, resolve_precision
from rayclip.evaluation import Store
from rayclip.evaluation.costs import Hardware
from rayclip.progress import Display
from rayclip.training import TrainConfig

_CALIBRATE_S = 20.0  # for each evaluation


class PlannedTrial(NamedTuple):
    """A training: its epochs, images per epoch, and seconds on one worker (0 if it is finished)."""

    name: str
    epochs: int
    images: int
    seconds: float
    finished: bool


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Time that a sweep takes, and what it consists of.

    Attributes:
        models: how many are tested, untouched ones included.
        cells: of each of them: data sets × attacks.
        testing: seconds of all tests on one worker.
        hardware: of one worker.
        at_most: whether a search may leave some of it out.
    """

    trials: Sequence[PlannedTrial]
    models: int
    cells: int
    testing: float
    hardware: Hardware
    at_most: bool = False

    @property
    def training(self) -> float:
        """Seconds of all trainings on one worker."""
        return sum(trial.seconds for trial in self.trials)


def plan_study(
    trials: Sequence[Trial],
    evaluations: Sequence[Evaluation],
    bases: Sequence[str],
    where: Where,
    results: Callable[[Trial], Mapping[str, str]] = itself,
) -> StudyPlan:
    """Estimate what `training.sweep` takes with the same arguments. Starts Ray, writes no results.

    Trainings that differ in the seed or in weights alone take equally long, and so do the tests of models of one
    architecture: one of each kind is measured.
    """
    opened = Opened(quiet=where.quiet)
    trials = [dataclasses.replace(t, config=check_training(t.config, where.train_workers, opened)) for t in trials]
    cells, _ = plan_all(bases, evaluations, opened)
    sizes = [_count_images(trial.config, opened) for trial in trials]
    aside = Store(where.out).child("planning")  # where nothing is known of results that are there
    with (
        ray_cluster(cluster=bool(where.cluster), verbose=where.verbose),
        resolve_precision(trials, Store(where.out), cluster=bool(where.cluster), verbose=where.verbose) as trials,
    ):
        left = [trial for trial in trials if not trial.is_finished()]
        kinds = {_kind(t.config, n): t.config for t, n in zip(trials, sizes, strict=True) if t in left}
        with Display(quiet=where.quiet) as display:
            rates, hardware = measure_rates(list(kinds.values()), Workers.for_cluster(), display)
        rate_of = dict(zip(kinds, rates, strict=True))
        models = len(bases) + sum(len(results(trial)) for trial in trials)
        testing = 0.0
        try:
            for evaluation in evaluations:
                found = plan_evaluation(
                    bases[:1], evaluation, dataclasses.replace(where, out=aside.root), calibrate_s=_CALIBRATE_S
                )
                testing, hardware = testing + models * found.seconds, hardware or found.hardware
        finally:
            aside.delete_folder("")
            if aside.is_local:
                with contextlib.suppress(OSError):  # it holds results
                    Path(aside.parent.root).rmdir()
    planned = []
    for trial, images in zip(trials, sizes, strict=True):
        epochs, finished = trial.config.recipe.epochs, trial not in left
        steps = -(-images // trial.config.recipe.batch_size)
        passes = images * trial.config.length(steps) / steps
        seconds = 0.0 if finished else passes / max(rate_of[_kind(trial.config, images)], 1e-9)
        planned.append(PlannedTrial(trial.name, epochs, images, seconds, finished))
    assert hardware is not None
    each = len({(cell.data, cell.attack_label, cell.defense, cell.scorer) for cell in cells})
    return StudyPlan(trials=planned, models=models, cells=each, testing=testing, hardware=hardware)


def _count_images(config: TrainConfig, opened: Opened) -> int:
    return len(few_shot(opened.data(config.data, "train", config.resolution, config.names), config.shots, config.seed))


def _kind(config: TrainConfig, images: int) -> Hashable:
    """Return what the seconds per image of a training depend on."""
    method, recipe = config.method, config.recipe
    batch = min(images, recipe.batch_size)
    return (
        (method.name, method.steps, method.trains, method.against),
        config.model,
        config.data,
        config.precision,
        batch,
    )
