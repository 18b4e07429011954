"""Trainings of equal compute: their steps, counted; and the table of their results, kept beside them and logged."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rayclip.api.checks import Opened, check_training
from rayclip.api.planning import count_images
from rayclip.api.publishing import publish
from rayclip.api.request import Where
from rayclip.distributed.trials import Trial
from rayclip.models.checkpoint import read_lineage
from rayclip.reports.equal_compute import Spent, equal_compute_grid
from rayclip.reports.figures.tradeoff import tradeoff
from rayclip.reports.grid import Grid, Part
from rayclip.reports.numbers import sections
from rayclip.reports.results import read_results
from rayclip.training import TrainConfig
from rayclip.training.operations import count_forward, count_operations
from rayclip.types import UserError

_NAME = "methods_board"  # of the files


class Share(NamedTuple):
    """A training's share of the budget.

    Attributes:
        steps: number of steps that it pays.
        epochs: number of epochs that the last of them is in.
        per_image: passes of an image, for each image of a step.
        total: of all steps, in the same unit.
    """

    steps: int
    epochs: int
    per_image: float
    total: float


def share_compute(
    configs: Sequence[TrainConfig], reference: TrainConfig, budget: float | None, where: Where
) -> list[Share]:
    """Return for each training how many steps the budget pays.

    Steps are counted, and divided by the forward pass of an image of the model (`training.operations`).

    Args:
        reference: the training whose whole length is the budget if that is None.
        budget: forward passes of an image.

    Raises:
        UserError: a configuration that cannot be trained, or a budget of less than a step.
    """
    opened = Opened(quiet=where.quiet)
    checked = [check_training(config, where.train_workers, opened) for config in (reference, *configs)]
    whole, *counted = [_count(config, opened) for config in checked]
    budget = whole.of(reference.length(whole.steps_per_epoch)) if budget is None else budget
    found = []
    for config, compute in zip(configs, counted, strict=True):
        if compute.of(1) > budget:
            raise UserError(
                f"one step of {config.method.name} takes {compute.of(1):,.0f} image passes, and {budget:,.0f} is the "
                "budget: raise --passes."
            )
        steps = round((budget - compute.before) / compute.step)
        epochs = -(-steps // compute.steps_per_epoch)
        found.append(Share(steps, epochs, compute.step / compute.batch, compute.of(steps)))
    return found


class _Compute(NamedTuple):
    """Forward passes of an image that a training takes before its first step and in each, of `batch` images."""

    before: float
    step: float
    batch: float
    steps_per_epoch: int

    def of(self, steps: int) -> float:
        return self.before + steps * self.step


def _count(config: TrainConfig, opened: Opened) -> _Compute:
    clip, images, size = opened.model(config.model), count_images(config, opened), config.recipe.batch_size
    classes = len(opened.data(config.data, "train", config.resolution, config.names).class_names)
    operations, unit, steps = count_operations(config.method, clip), count_forward(clip), -(-images // size)
    return _Compute(
        before=images * operations.before / unit,
        step=operations.step(images, classes, size) / unit,
        batch=images / steps,
        steps_per_epoch=steps,
    )


def report_equal_compute(
    name: str, trials: Mapping[str, Sequence[Trial]], shares: Mapping[str, Share], baseline: str, where: Where
) -> list[Grid]:
    """Return the tables of finished trainings, and keep and log them: `methods_board.md`, and the figure
    `methods_board.svg`, `.pdf` and `.png`, clean against robust accuracy, in `where.out` and in the run of this name.

    Args:
        trials: of each method, one per seed.
        shares: of each method.
        baseline: the method that others are compared with.
    """
    spent = {}
    for method, seeds in trials.items():
        _, _, per_image, total = shares[method]
        for trial in seeds:
            seconds = (read_lineage(trial.out) or {}).get("seconds")
            spent[trial.model] = Spent(
                method=method,
                seed=trial.config.seed,
                per_image=per_image,
                steps=shares[method].steps,
                total=total,
                seconds=seconds,
            )
    found = sections(read_results([where.out]))
    grids = [equal_compute_grid(section, spent, baseline) for section in found]
    figures = [
        dataclasses.replace(figure, name=_NAME if i == 1 else f"{_NAME}-section{i}")
        for i, section in enumerate(found, 1)
        for figure in tradeoff(section)
    ]
    part = Part(title="Methods at equal compute", grids=grids, figures=figures)
    return publish(part, name, _NAME, "sweep", where)
