"""The whole house in a few calls: fine-tune, sweep, evaluate. The command line and `sweeps/` use it.

Everything that can be wrong in the arguments is found before Ray starts and before a file is written.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from rayclip.attacks import Attack
from rayclip.attacks.bert import TextSettings
from rayclip.attacks.clean import Clean
from rayclip.data import ImageSet, Names, PairSet, Resolution, few_shot, locate, open_data, open_pairs
from rayclip.data.fewshot import draw_record
from rayclip.data.images import mixed_sizes
from rayclip.defenses import DRAWS, Aim, Chain, chain_label
from rayclip.distributed import PoolSize, Trial, Workers, evaluate, ray_cluster, run_trials
from rayclip.evaluation import Cell, Protocol, Store, chosen_positions, collect_rows, make_cells, missing_shards
from rayclip.evaluation.alarms import alarms
from rayclip.evaluation.cell import MadeAgainst, default_substitutes
from rayclip.evaluation.retrieval import RecallRow, make_task, read_recalls, run_task
from rayclip.logbook import Logbook, markdown, rows_json
from rayclip.methods import SMALL_BELOW, Method, Recipe
from rayclip.models import Clip, load_model
from rayclip.models.scorers import DEFAULT, Scorer
from rayclip.progress import Display
from rayclip.reports import result_tables, retrieval_tables
from rayclip.tracking import MlflowTracker, default_uri
from rayclip.training import TrainConfig
from rayclip.training.captions import with_captions
from rayclip.types import Row, UserError

_SILENT_S = 2.0  # a check that is over sooner is not worth a line


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate models on.

    Attributes:
        data: data specifications (`open_data`, split `test`).
        attacks: with their settings.
        protocol: budget, seed, resolution, template.
        defenses: chains of test-time defences to put each model behind; the empty one is the model itself.
        aims: what attacks on defended models are aimed at.
        scorers: ways to score an image against a class.
        made_against: what image attacks attack where the scorer is not the template: the scorer itself, the template.
        limit: at most so many samples of each data set.
    """

    data: Sequence[str]
    attacks: Sequence[Attack]
    protocol: Protocol
    limit: int | None = None
    defenses: Sequence[Chain] = ((),)
    aims: Sequence[Aim] = (Aim(), Aim(gradient="bpda", draws=DRAWS))
    scorers: Sequence[Scorer] = (DEFAULT,)
    made_against: Sequence[MadeAgainst] = ("own",)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """An MLflow experiment, by name: the connection is made when the arguments have been checked."""

    uri: str
    experiment: str

    @classmethod
    def choose(cls, uri: str | None, experiment: str) -> "Tracking":
        """`uri`, or `MLFLOW_TRACKING_URI`, or an SQLite file in the working directory."""
        return cls(uri=uri or default_uri(), experiment=experiment)

    def connect(self) -> MlflowTracker:
        return MlflowTracker(self.uri, self.experiment)


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where work runs and is logged.

    Attributes:
        out: folder (evaluations: or object-store URI) of all results.
        tracking: store and experiment; None logs nothing.
        cluster: a running Ray cluster instead of a private Ray.
        pool: of the evaluation actors.
        train_workers: Train workers of each trial.
        quiet: show no progress.
        verbose: let Ray and its workers print.
    """

    out: str
    tracking: Tracking | None = None
    cluster: bool = False
    pool: PoolSize = dataclasses.field(default_factory=PoolSize)
    train_workers: int = 1
    quiet: bool = False
    verbose: bool = False

    def logbook(self, store: Store) -> Logbook:
        """Connects to the tracker; the first thing that is done once the arguments are known to be good."""
        return Logbook(store, self.tracking.connect() if self.tracking else None)


# ------------------------------------------------------------------------------------------------ checks before work


class Opened:
    """Models and data that the checks of one call have opened: the trials of a sweep share their base model."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._model: tuple[str, Clip] | None = None
        self._fingerprints: dict[str, str] = {}
        self._data: dict[tuple[str, str, str], ImageSet] = {}

    def model(self, spec: str) -> Clip:
        """The last one stays in memory."""
        if self._model is None or self._model[0] != spec:
            self._model = spec, load_model(spec)
        return self._model[1]

    def fingerprint(self, spec: str) -> str:
        if spec not in self._fingerprints:
            self._fingerprints[spec] = self.model(spec).fingerprint()
        return self._fingerprints[spec]

    def data(self, spec: str, role: Literal["train", "test"], resolution: Resolution, names: Names) -> ImageSet:
        """Damaged images and mixed sizes are met now; what a reader of the numbers should know is said."""
        key = spec, role, names
        if key not in self._data:
            data = open_data(spec, role, names)
            self.check(data)
            for note in data.notes:
                print(f"note: {data.name}: {note}", file=sys.stderr)
            self._data[key] = data
        if resolution == "native" and self._data[key].native_size is None:
            raise mixed_sizes(self._data[key])
        return self._data[key]

    def check(self, data: ImageSet | PairSet) -> None:
        """Look at every image of files that nobody has looked at; shows progress where that takes long."""
        began = time.monotonic()
        with Display(quiet=self._quiet) as display:

            def tell(done: int, total: int) -> None:
                if time.monotonic() - began > _SILENT_S:
                    display.update(f"check {data.name}", done, total)

            data.check(tell)


def choose_recipe(
    method: Method, model: str, name: Literal["paper", "small"] | None, overrides: Mapping[str, Any]
) -> Recipe:
    """The method's published recipe or the one for small models, by default as the model's size asks for."""
    small = name == "small" or (name is None and sum(p.numel() for p in load_model(model).parameters()) < SMALL_BELOW)
    return dataclasses.replace(method.small if small else method.recipe, **overrides)


def check_training(config: TrainConfig, workers: int, opened: Opened) -> TrainConfig:
    """The configuration with its default substitutes and the fingerprints of model and data spelled out.

    Raises:
        UserError: whatever `train` would raise for these arguments.
    """
    method = config.method.with_default_substitutes(default_substitutes(bundled=config.data == "digits"))
    config = dataclasses.replace(config, data=locate(config.data))
    data = opened.data(config.data, "train", config.resolution, config.names)
    drawn = few_shot(data, config.shots, config.seed)
    if len(drawn) < workers:
        raise UserError(f"{len(drawn)} training images cannot be dealt out to {workers} workers: use fewer workers.")
    method = with_captions(method, config.data, data.class_names)
    method.check(opened.model(config.model))
    return dataclasses.replace(
        config,
        method=method,
        model_fingerprint=opened.fingerprint(config.model),
        data_fingerprint=data.fingerprint,
    )


def plan_cells(
    models: Sequence[str], evaluation: Evaluation, opened: Opened
) -> tuple[list[Cell], dict[str, np.ndarray]]:
    """Open every model and data set; the cells, and the positions to evaluate by data specification.

    Raises:
        UserError: a model, data set or attack that cannot work.
    """
    protocol = evaluation.protocol
    if not evaluation.data:
        raise UserError("no data set is named: give --data a name or a .parquet file.")
    specs = [locate(spec) for spec in evaluation.data]
    datasets = [(spec, opened.data(spec, "test", protocol.resolution, protocol.names)) for spec in specs]
    names = [data.name for _, data in datasets]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"two data sets share the name '{twice[0]}', which tables could not tell apart: rename a file.")
    cells: list[Cell] = []
    for spec in dict.fromkeys(models):
        new = make_cells(
            [(spec, opened.fingerprint(spec))],
            datasets,
            evaluation.attacks,
            protocol,
            evaluation.defenses,
            evaluation.aims,
            evaluation.scorers,
            evaluation.made_against,
        )
        if not cells:  # a source of substitutes that can be opened for one model can be opened for all
            for attack in {c.attack for c in new}:
                if isinstance(attack, TextSettings):
                    attack.source(opened.model(spec))
        cells += new
    return cells, {spec: chosen_positions(len(data), evaluation.limit) for spec, data in datasets}


# ------------------------------------------------------------------------------------------------------ the calls


def evaluate_models(models: Sequence[str], evaluation: Evaluation, where: Where) -> list[Row]:
    """Evaluate models; results on disk, in the tracker, and returned.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    cells, positions = plan_cells(models, evaluation, Opened(quiet=where.quiet))
    store = Store(where.out)
    logbook = where.logbook(store)
    rows = _evaluate(cells, positions, store, where)
    found = _alarms(cells, rows, positions, store)
    for model in dict.fromkeys(models):
        _log_evaluations(logbook, model, model, None, rows, cells, found[model])
    _write_results(store, rows, {})
    return rows


def evaluate_retrieval(
    models: Sequence[str],
    data: str,
    where: Where,
    *,
    limit: int | None = None,
    resolution: Resolution = "model",
    attacks: Sequence[Attack] = (Clean(),),
    eps: float | None = None,
    seed: int = 0,
) -> list[RecallRow]:
    """Recall at 1, 5, 10 of models on image-caption data (`open_pairs`), in this process; on disk, in the tracker, and
    returned. What `where.out` holds is not computed again.

    Args:
        attacks: on pairs (`attacks.pairs`), those that have a stop rule with `stop="final"`.
        eps: their budget in pixel units.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    opened = Opened(quiet=where.quiet)
    pairs = open_pairs(data)
    opened.check(pairs)
    if resolution == "native" and pairs.native_size is None:
        raise mixed_sizes(pairs)
    specs = list(dict.fromkeys(models))
    tasks = [
        make_task(
            (m, opened.fingerprint(m)), pairs, limit=limit, resolution=resolution, attack=attack, eps=eps, seed=seed
        )
        for m in specs
        for attack in attacks
    ]
    for attack in {task.attack for task in tasks}:
        if isinstance(attack, TextSettings):
            attack.source(opened.model(specs[-1]))
    store = Store(where.out)
    found = [read_recalls(task, store) for task in tasks]
    logbook = where.logbook(store)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[RecallRow] = []
    with Display(quiet=where.quiet) as display:
        for task, mine in zip(tasks, found, strict=True):
            if mine is None:
                clip = opened.model(task.model).to(device)
                update = functools.partial(display.update, f"{task.model} {task.attack_label}")
                run_task(task, clip, pairs, store, where.pool.batch_size, update)
                mine = read_recalls(task, store)
                assert mine is not None
            logbook.retrieval(task, mine)
            rows += mine
    return rows


def fine_tune(trial: Trial, where: Where) -> bool:
    """One training run, to `trial.out`; False if that is there already.

    Raises:
        UserError: bad arguments, before anything is written; or why the run failed.
    """
    opened = Opened(quiet=where.quiet)
    trial = dataclasses.replace(trial, config=check_training(trial.config, where.train_workers, opened))
    if trial.is_finished():
        return False
    store = Store(str(trial.out / ".rayclip"))
    logbook = where.logbook(store)
    errors = _train([_with_run(trial, logbook, None, opened)], store, where, logbook)
    if errors:
        raise UserError(f"training failed: {errors[trial.name]}")
    return True


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        rows: of the untouched model and of every trial that succeeded.
        labels: names to show, by model specification.
        errors: why trials failed, by name.
    """

    rows: list[Row]
    labels: dict[str, str]
    errors: dict[str, str]


def compare(name: str, models: Mapping[str, str], evaluations: Sequence[Evaluation], where: Where) -> list[Row]:
    """Evaluate models under one parent run, to be read as one table; results on disk, in the tracker, and returned.

    Args:
        name: of the tracker's parent run.
        models: labels by model specification.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    opened = Opened(quiet=where.quiet)
    _plan(list(models), evaluations, opened)
    store = Store(where.out)
    logbook = where.logbook(store)
    root = logbook.open(name, tags={"rayclip.kind": "comparison"})
    return _compare(root, models, {}, evaluations, opened, logbook, store, where)


def itself(trial: Trial) -> dict[str, str]:
    """What a sweep evaluates of a finished trial unless it says otherwise: specifications with their labels."""
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
        results: the models to evaluate of a finished trial, with their labels.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    opened = Opened(quiet=where.quiet)
    trials = [dataclasses.replace(t, config=check_training(t.config, where.train_workers, opened)) for t in trials]
    _plan([base], evaluations, opened)
    unfinished = [t for t in trials if not t.is_finished()]
    store = Store(where.out)
    logbook = where.logbook(store)
    root = logbook.open(name, tags={"rayclip.kind": "sweep"})
    trials = [_with_run(t, logbook, root, opened) for t in trials]
    with contextlib.ExitStack() as stack:
        errors: dict[str, str] = {}
        if unfinished:
            stack.enter_context(ray_cluster(cluster=where.cluster, verbose=where.verbose))  # also for the evaluation
            errors = _train(trials, store, where, logbook)
        trials = [t for t in trials if t.name not in errors]
        labels = {base: f"untouched {base}"}
        runs: dict[str, str | None] = {}
        for trial in trials:
            labels |= results(trial)
            runs |= dict.fromkeys(results(trial), trial.run)
        rows = _compare(root, labels, runs, evaluations, opened, logbook, store, where)
    return SweepResult(rows=rows, labels=labels, errors=errors)


def _plan(
    models: Sequence[str], evaluations: Sequence[Evaluation], opened: Opened
) -> tuple[list[Cell], dict[str, np.ndarray]]:
    """`plan_cells` of several evaluations; what they have in common is there once."""
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
    """Evaluate models, log each below its run in `runs` or one of its own, and all of them in `root`."""
    cells, positions = _plan(list(labels), evaluations, opened)
    rows = _evaluate(cells, positions, store, where)
    found = _alarms(cells, rows, positions, store)
    for model, label in labels.items():
        run = runs.get(model) or logbook.open(label, parent=root, tags={"rayclip.kind": "untouched"})
        _log_evaluations(logbook, model, label, run, rows, cells, found[model])
        logbook.finish(run)
    _write_results(store, rows, labels)
    logbook.summary(root, rows, labels)
    return rows


def show(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> None:
    """Print the tables to standard output."""
    console = Console(highlight=False)
    for table in result_tables(rows, labels):
        console.print(table.rich())


def show_retrieval(rows: Sequence[RecallRow]) -> None:
    """Print the tables to standard output."""
    console = Console(highlight=False)
    for table in retrieval_tables(rows):
        console.print(table.rich())


def _with_run(trial: Trial, logbook: Logbook, parent: str | None, opened: Opened) -> Trial:
    config = trial.config
    tags = {"rayclip.kind": "train", "rayclip.digest": config.digest()}
    run = logbook.open(trial.name, parent=parent, params=config.flat(), tags=tags)
    if config.shots:
        data = opened.data(config.data, "train", config.resolution, config.names)
        logbook.draw(run, draw_record(few_shot(data, config.shots, config.seed), config.shots, config.seed))
    return dataclasses.replace(trial, run=run)


def _train(trials: Sequence[Trial], store: Store, where: Where, logbook: Logbook) -> dict[str, str]:
    """Run the unfinished trials; why they failed, by name."""

    def ended(trial: Trial, error: str | None) -> None:
        if error is None:
            logbook.artifact(trial.run, trial.out, "checkpoint")
        logbook.finish(trial.run, failed=error is not None)

    display = Display(quiet=where.quiet)
    with ray_cluster(cluster=where.cluster, verbose=where.verbose), display:
        return run_trials(
            trials,
            workers=Workers.for_cluster(where.train_workers),
            storage=Path(store.root) / "unfinished",
            tracker=logbook.tracker,
            display=display,
            on_finish=ended,
        )


def _evaluate(cells: Sequence[Cell], positions: dict[str, np.ndarray], store: Store, where: Where) -> list[Row]:
    if any(missing_shards(cell, positions[cell.data], store, where.pool.shard_size) for cell in cells):
        display = Display(quiet=where.quiet)
        with ray_cluster(cluster=where.cluster, verbose=where.verbose), display:
            evaluate(cells, positions, store, size=where.pool, display=display)
    return collect_rows(cells, positions, store)


def _alarms(
    cells: Sequence[Cell], rows: Sequence[Row], positions: dict[str, np.ndarray], store: Store
) -> dict[str, list[str]]:
    """Warnings about the measurement by model; also printed."""
    found = {}
    for model in dict.fromkeys(c.model for c in cells):
        found[model] = alarms([c for c in cells if c.model == model], rows, positions, store)
        for sentence in found[model]:
            print(f"warning: {sentence}", file=sys.stderr)
    return found


def _log_evaluations(
    logbook: Logbook,
    model: str,
    label: str,
    parent: str | None,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    warnings: Sequence[str],
) -> None:
    """A run for the model itself, and one for each scorer that judges it and each defence that it stands behind."""
    for kind in dict.fromkeys((row.scorer, row.defense) for row in rows if row.model == model):
        mine = [row for row in rows if (row.model, row.scorer, row.defense) == (model, *kind)]
        own = [c for c in cells if c.model == model and (c.scorer.label, chain_label(c.defense)) == kind]
        logbook.evaluation(f"eval {mine[0].who({model: label})}", parent, mine, own, warnings)


def _write_results(store: Store, rows: Sequence[Row], labels: Mapping[str, str]) -> None:
    """`results.json` and `table.md` beside the cells."""
    store.write("results.json", rows_json(rows).encode())
    store.write("table.md", markdown(rows, labels).encode())
