"""Sweep over a grid of trainings, or search in it (`rayclip sweep`): make the trials, and what tests them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayclip.api.checks import is_small
from rayclip.api.choosing import choose_trial, fields_of
from rayclip.api.grid import Grid, Point, SweepSettings, name_points
from rayclip.api.planning import StudyPlan, plan_study
from rayclip.api.request import Evaluation, Tracking, Where
from rayclip.api.training import SweepResult, search
from rayclip.api.training import sweep as run_sweep
from rayclip.attacks import parse_attacks
from rayclip.data.spec import choose_names, parse_spec
from rayclip.distributed.search import Validation
from rayclip.distributed.trials import Trial
from rayclip.evaluation import Protocol, Store
from rayclip.methods import METHODS, Recipe
from rayclip.names import attack_defaults
from rayclip.paths import split_places
from rayclip.progress import say
from rayclip.training import TrainConfig
from rayclip.types import Ranking, UserError
from rayclip.units import parse_budgets

_TEST_STEPS = 10  # of attacks that name none, as `rayclip eval` has it
_BUDGETS = 8  # of the trainings at most, to be those of the test as well
_OF_ATTACK = ("attack", "eps", "steps", "step_size", "norm", "start")


@dataclass(frozen=True, kw_only=True)
class GridSweep:
    """A sweep over a grid, or a search in it, that is ready to run.

    Attributes:
        trials: one for each different training.
        groups: display names without the seed, by model specification.
        evaluations: of the untouched models and of the results.
        validation: what a search compares trials by; None for a sweep.
        reduction: of ASHA; None stops no trial.
    """

    trials: Sequence[Trial]
    groups: Mapping[str, str]
    evaluations: Sequence[Evaluation]
    validation: Validation | None = None
    reduction: float | None = None

    @property
    def models(self) -> list[str]:
        """The untouched models."""
        return list(dict.fromkeys(trial.config.model for trial in self.trials))

    def plan(self, where: Where) -> StudyPlan:
        """Estimate what is left to do; trials that differ in the seed only have one name."""
        found = plan_study(self.trials, self.evaluations, self.models, where)
        names = {trial.name: self.groups[trial.model] for trial in self.trials}
        trials = [trial._replace(name=names[trial.name]) for trial in found.trials]
        return dataclasses.replace(found, trials=trials, at_most=self.validation is not None)

    def run(self, where: Where) -> SweepResult:
        """Train and test, or go on with that; `Found` is a search's result."""
        name = Store(where.out).name
        if self.validation is None:
            several = len(set(self.groups.values())) < len(self.groups)
            groups = self.groups if several else {}
            return run_sweep(name, self.trials, self.evaluations, self.models, where, groups=groups)
        return search(
            name, self.trials, self.validation, self.evaluations, self.models, where, reduction=self.reduction
        )


def prepare(grid: Grid, asked: SweepSettings, out: str) -> GridSweep:
    """Make the trials of a grid, equal ones once, or those that a search draws, and what tests their results.

    Checkpoints are `OUT/models/METHOD-DIGEST`, so that a grid that grows keeps what it has.

    Raises:
        UserError: nothing to train, a range without a search, or settings that do not go together.
    """
    seeds = grid.options.get("seed", [0])
    first = seeds[0] if isinstance(seeds, list) else 0
    if asked.search and len(grid.options.get("data", [])) != 1:
        raise UserError("--search holds a part of one training set out to compare trials on: give one --data.")
    points = grid.draw(asked.samples, first) if asked.search else grid.points()
    names, _ = choose_names(asked.class_names, [])
    small = functools.cache(is_small)
    configs: dict[str, tuple[Point, TrainConfig]] = {}
    for point in points:
        if not METHODS.find(point.method).uses_attack():  # they would be the same training under several names
            point = point._replace(options={k: v for k, v in point.options.items() if k not in _OF_ATTACK})
        config = _config(point, asked, small(point.options["model"]))
        configs.setdefault(config.digest(), (point, config))
    if len(configs) < len(points):
        say("note", f"{len(points) - len(configs)} of {len(points)} combinations are the same training as others.")
    chosen = [point for point, _ in configs.values()]
    models = Store(asked.models) if asked.models else Store(out).child("models")
    trials = [
        Trial(
            name=name,
            config=config,
            out=models.child(f"{config.method.name}-{digest}").root,
            key=f"{config.method.name}-{digest}",
        )
        for (digest, (_, config)), name in zip(configs.items(), name_points(chosen), strict=True)
    ]
    groups = name_points(chosen, without=["seed"])
    protocol = Protocol(
        eps=_test_budgets(asked, trials), seed=first, resolution=asked.resolution, resize=asked.resize, names=names
    )
    attacks = parse_attacks(",".join(asked.attacks), attack_defaults(_TEST_STEPS, None, asked.substitutes))
    _, tests = choose_names(asked.class_names, list(asked.test) or _own_tests(grid.options["data"]))
    validation = None
    if asked.search:
        validation = Validation(
            data=trials[0].config.data, attacks=attacks, protocol=protocol, limit=asked.limit, by=asked.by
        )
    return GridSweep(
        trials=trials,
        groups={trial.model: name for trial, name in zip(trials, groups, strict=True)},
        evaluations=[Evaluation(data=tests, attacks=attacks, protocol=protocol, limit=asked.limit)],
        validation=validation,
        reduction=asked.reduction if asked.search == "asha" else None,
    )


def _config(point: Point, asked: SweepSettings, small: bool) -> TrainConfig:
    """Return the configuration that `rayclip train` would have with these options."""
    given = {"norm": "linf", "start": "random", **point.options}
    data = _train_part(given.pop("data"), asked)
    changes = {name: given.pop(name) for name in fields_of(Recipe) & given.keys()}
    settings = {name: given.pop(name) for name in fields_of(TrainConfig) & given.keys() - {"model", "shots", "recipe"}}
    optional: dict[str, Any] = dict.fromkeys(("shots", "attack", "eps", "steps", "step_size", "recipe", "trains"))
    config = choose_trial(
        method=point.text,
        data=data,
        out="",
        substitutes=asked.substitutes,
        class_names=asked.class_names,
        changes=changes,
        settings=settings | {"resolution": asked.resolution, "resize": asked.resize},
        small=small,
        **optional | given,
    ).config
    return dataclasses.replace(config, save_every_epochs=config.recipe.epochs if asked.search == "random" else 1)


def _train_part(data: str, asked: SweepSettings) -> str:
    data = data if asked.test else _own_tests([data])[0]
    return f"{data}#validation" if asked.search else data


def _own_tests(data: Any) -> list[str]:
    """Return the test parts of training sets: of a single file a fifth of it."""
    specs = [parse_spec(each) for each in data]
    return [
        f"{each}#holdout" if spec.place.endswith(".parquet") and not spec.part else each
        for each, spec in zip(data, specs, strict=True)
    ]


def _test_budgets(asked: SweepSettings, trials: Sequence[Trial]) -> tuple[float, ...]:
    if asked.test_eps:
        return parse_budgets(asked.test_eps, "test-eps")
    methods = [trial.config.method for trial in trials]
    found = {method.eps for method in methods if method.uses_attack()} or {methods[0].eps}
    if len(found) > _BUDGETS:
        raise UserError(f"the trainings have {len(found)} budgets: say with --test-eps at which to test.")
    return tuple(sorted(found))


def sweep(
    method: str | Sequence[str],
    *,
    model: str | Sequence[str],
    data: str | Sequence[str],
    out: str = "runs/sweep",
    test: str | Sequence[str] = (),
    attacks: str | Sequence[str] = "clean,pgd",
    test_eps: str | Sequence[str] = (),
    seeds: int = 1,
    limit: int | None = None,
    substitutes: str = "default",
    resolution: Literal["native", "model"] = "native",
    resize: Literal["antialias", "plain"] = "antialias",
    class_names: str = "curated",
    search: Literal["asha", "random"] | None = None,
    samples: int = 16,
    by: Ranking = "worst case",
    reduction: float = 3.0,
    models: str | None = None,
    tracking: Tracking | None = None,
    cluster: bool = False,
    workers: int = 1,
    quiet: bool = False,
    **options: Any,
) -> SweepResult:
    """Train a model for each combination of settings, or for those that a search draws, and test the results.

    As `rayclip sweep`; the same call goes on with what `out` holds. Arguments that are not below are those of
    `SweepSettings` and `Where`.

    Args:
        method: names with settings, as in `["tecoa", "mmcoa:lambda_img=0.1|0.5|0.9"]`.
        seeds: number of seeds of each combination, from `seed` (0) on.
        tracking: MLflow store and experiment; None logs to the journal in `out` alone.
        options: of `rayclip train`, one value or several: `eps=["1/255", "2/255"]`, `shots=[1, 5, None]`, `lr=1e-5`;
            of a search also a range, `lr="1e-6..1e-4"`.

    Raises:
        UserError: an unknown method, setting or option, a value that does not parse, or data or a model that does not
            fit.
    """

    def listed(value: str | Sequence[str]) -> tuple[str, ...]:
        return (value,) if isinstance(value, str) else tuple(value)

    asked = SweepSettings(
        test=split_places(test),
        attacks=listed(attacks),
        test_eps=listed(test_eps),
        limit=limit,
        substitutes=substitutes,
        resolution=resolution,
        resize=resize,
        class_names=class_names,
        search=search,
        samples=samples,
        by=by,
        reduction=reduction,
        models=models,
    )
    grid = Grid.read(method, {"model": model, "data": data, **options}, seeds=seeds)
    where = Where(out=out, tracking=tracking, cluster=cluster, train_workers=workers, quiet=quiet)
    return prepare(grid, asked, out).run(where)
