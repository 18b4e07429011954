"""Estimate what a sweep takes, measured for some seconds on the workers that it would have."""

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from rayclip.api.checks import Opened, check_training, plan_all
from rayclip.api.evaluating import plan_evaluation
from rayclip.api.needs import FIRST_IMAGES, Needs, needs_of_checkpoints, needs_of_tests
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
from rayclip.training.operations import Operations, count_operations

_CALIBRATE_S = 20.0  # for each evaluation


class PlannedTrial(NamedTuple):
    """A training: its epochs, images per epoch, GPU (core) seconds and operations (0 if it is finished)."""

    name: str
    epochs: int
    images: int
    seconds: float
    finished: bool
    operations: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Time that a sweep takes, and what it consists of.

    Attributes:
        models: how many are tested, untouched ones included.
        cells: of each of them: data sets × attacks.
        testing: GPU (core) seconds of all tests.
        hardware: of one worker; of training, if there is any.
        needs: operations, disk, files and memory of what is left to do.
        few: share of the tests that the first `FIRST_IMAGES` images of each data set are.
        at_most: whether a search may leave some of it out.
    """

    trials: Sequence[PlannedTrial]
    models: int
    cells: int
    testing: float
    hardware: Hardware
    needs: Needs = field(default_factory=Needs)
    few: float = 1.0
    at_most: bool = False

    @property
    def training(self) -> float:
        """GPU (core) seconds of all trainings."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def first(self) -> tuple[PlannedTrial | None, "StudyPlan"]:
        """The cheapest training, if one is left, and the plan of a first milestone: of it, and of its test and the
        untouched model's on `FIRST_IMAGES` images of each data set."""
        cheapest = min((t for t in self.trials if not t.finished), key=lambda t: t.seconds, default=None)
        models = 1 if cheapest is None else 2
        part = self.few * models / self.models
        needs = Needs(training=cheapest.operations if cheapest else 0.0, testing=part * self.needs.testing)
        trials = [cheapest] if cheapest else []
        return cheapest, replace(self, trials=trials, models=models, testing=part * self.testing, needs=needs)


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
    trials = [replace(t, config=check_training(t.config, where.train_workers, opened)) for t in trials]
    cells, positions = plan_all(bases, evaluations, opened)
    sizes = [count_images(trial.config, opened) for trial in trials]
    aside = Store(where.out).child("planning")  # where nothing is known of results that are there
    with (
        ray_cluster(cluster=bool(where.cluster), verbose=where.verbose),
        resolve_precision(trials, Store(where.out), cluster=bool(where.cluster), verbose=where.verbose) as trials,
    ):
        left = [trial for trial in trials if not trial.is_finished()]
        kinds = {_kind(t.config, n): t.config for t, n in zip(trials, sizes, strict=True) if t in left}
        workers = Workers.for_cluster()
        threads = workers.threads(max(1, len(left)))
        with Display(quiet=where.quiet) as display:
            rates, hardware, memory = measure_rates(list(kinds.values()), workers, threads, display)
        rate_of = dict(zip(kinds, rates, strict=True))
        models = len(bases) + sum(len(results(trial)) for trial in trials)
        testing = 0.0
        try:
            for evaluation in evaluations:
                found = plan_evaluation(bases[:1], evaluation, replace(where, out=aside.root), calibrate_s=_CALIBRATE_S)
                testing += models * found.seconds * found.hardware.units
                hardware = hardware or found.hardware
                memory = max(memory, found.memory)
        finally:
            aside.delete_folder("")
            if aside.is_local:
                with contextlib.suppress(OSError):  # it holds results
                    Path(aside.parent.root).rmdir()
    one = [cell for cell in cells if cell.model == bases[0]]
    counts = {cell.id: len(positions[cell.data]) for cell in one}
    shard = where.pool.largest_shard(1.0)  # as on a GPU
    needs = Needs(memory=memory)
    tests = needs_of_tests(one, counts, opened.model(bases[0]), shard)
    for _ in range(models):
        needs += tests
    assert hardware is not None
    counted: dict[Hashable, Operations] = {}
    planned = []
    for trial, images in zip(trials, sizes, strict=True):
        config, recipe = trial.config, trial.config.recipe
        if trial not in left:
            planned.append(PlannedTrial(trial.name, recipe.epochs, images, 0.0, True))
            continue
        kind, clip, per_epoch = _kind(config, images), opened.model(config.model), -(-images // recipe.batch_size)
        steps = config.length(per_epoch)
        if kind not in counted:
            counted[kind] = count_operations(config.method, clip)
        classes = len(opened.data(config.data, "train", config.resolution, config.names).class_names)
        operations = counted[kind].total(images, classes, steps, recipe.batch_size)
        seconds = hardware.units * images * steps / per_epoch / max(rate_of[kind], 1e-9)
        planned.append(PlannedTrial(trial.name, recipe.epochs, images, seconds, False, operations))
        needs += needs_of_checkpoints(trial, clip) + Needs(training=operations)
    each = len({(cell.data, cell.attack_label, cell.defense, cell.scorer) for cell in cells})
    work = [(counts[cell.id], cell.cost) for cell in one]
    few = sum(min(n, FIRST_IMAGES) * cost for n, cost in work) / max(1, sum(n * cost for n, cost in work))
    return StudyPlan(
        trials=planned, models=models, cells=each, testing=testing, hardware=hardware, needs=needs, few=few
    )


def count_images(config: TrainConfig, opened: Opened) -> int:
    """Return the number of images in an epoch."""
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
