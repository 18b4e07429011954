"""The whole house in a few calls: fine-tune, sweep, evaluate, log and tabulate. The command line and `sweeps/` use it.

Everything that can be wrong in the arguments is found before Ray starts and before a file is written.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rayclip.attacks import Attack
from rayclip.attacks.bert import TextSettings
from rayclip.attacks.substitutes import substitute_source
from rayclip.data import ImageSet, few_shot, open_data
from rayclip.distributed import Display, Trial, Workers, evaluate, ray_cluster, run_trials
from rayclip.distributed.pool import PoolSize
from rayclip.evaluation import Cell, Protocol, Store, chosen_positions, collect_rows, make_cells, missing_shards
from rayclip.evaluation.cell import default_substitutes
from rayclip.methods.mmcoa import MMCoA
from rayclip.models import load_model
from rayclip.reports import Table, example_grid, result_tables
from rayclip.tracking import MlflowTracker
from rayclip.training import TrainConfig
from rayclip.types import Row, UserError


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate models on.

    Attributes:
        data: data specifications (`open_data`, split `test`).
        attacks: with their settings.
        protocol: budget, seed, resolution, template.
        limit: at most so many samples of each data set.
    """

    data: Sequence[str]
    attacks: Sequence[Attack]
    protocol: Protocol
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where work runs and is logged.

    Attributes:
        out: folder (evaluations: or object-store URI) of all results.
        tracker: None logs nothing.
        cluster: a running Ray cluster instead of a private Ray.
        pool: of the evaluation actors.
        train_workers: Train workers of each trial.
    """

    out: str
    tracker: MlflowTracker | None = None
    cluster: bool = False
    pool: PoolSize = dataclasses.field(default_factory=PoolSize)
    train_workers: int = 1
    quiet: bool = False
    verbose: bool = False


class RunBook:
    """Which tracker run belongs to what, kept beside the results, so that a second start goes on in the same runs."""

    FILE = "runs.json"

    def __init__(self, store: Store, tracker: MlflowTracker | None) -> None:
        self._store, self._tracker = store, tracker
        saved = store.read_json(self.FILE) or {}
        same = tracker is not None and saved.get("uri") == tracker.uri and saved.get("experiment") == tracker.experiment
        self._runs: dict[str, str] = saved["runs"] if same else {}

    def open(
        self,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> str | None:
        """The run's id, from an earlier start or new; None without a tracker."""
        if self._tracker is None:
            return None
        key = key or name
        if key not in self._runs or not self._tracker.exists(self._runs[key]):
            self._runs[key] = self._tracker.start(name, parent=parent, params=params, tags=tags)
            self._store.write_json(
                self.FILE, {"uri": self._tracker.uri, "experiment": self._tracker.experiment, "runs": self._runs}
            )
        return self._runs[key]

    def finish(self, run: str | None, *, failed: bool = False) -> None:
        if self._tracker is not None and run is not None:
            self._tracker.finish(run, failed=failed)


# ------------------------------------------------------------------------------------------------ checks before work


def check_training(config: TrainConfig, workers: int = 1) -> TrainConfig:
    """Open model and data once, and spell out the default substitutes.

    Raises:
        UserError: whatever `train` would raise for these arguments.
    """
    if isinstance(config.method, MMCoA) and config.method.text.substitutes == "default":
        text = config.method.text.with_substitutes(default_substitutes(bundled=config.data == "digits"))
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, text=text))
    data = few_shot(open_data(config.data, "train"), config.shots, config.seed)
    if len(data) < workers:
        raise UserError(f"{len(data)} training images cannot be dealt out to {workers} workers: use fewer workers.")
    clip = load_model(config.model)
    if isinstance(config.method, MMCoA) and config.method.lambda_txt:
        _check_substitutes(clip, config.method.text)
    return config


def check_sweep(trials: Sequence[Trial], evaluation: Evaluation | None, base: str | None, workers: int) -> list[Trial]:
    """The trials with their defaults spelled out, once nothing in them or in what follows them can be wrong.

    Raises:
        UserError: whatever training or evaluating would raise for these arguments.
    """
    checked = [dataclasses.replace(t, config=check_training(t.config, workers)) for t in trials]
    if evaluation is not None:
        plan_cells([base or trials[0].config.model], evaluation)
    return checked


def _check_substitutes(clip: Any, text: TextSettings) -> None:
    substitute_source(clip, text.substitutes, k=text.k, threshold=text.threshold, offset=text.offset)


def plan_cells(models: Sequence[str], evaluation: Evaluation) -> tuple[list[Cell], dict[str, np.ndarray]]:
    """Open every model and data set; the cells, and the positions to evaluate by data specification.

    Raises:
        UserError: a model, data set or attack that cannot work.
    """
    datasets: list[tuple[str, ImageSet]] = [(spec, open_data(spec, "test")) for spec in evaluation.data]
    names = [data.name for _, data in datasets]
    if len(set(names)) < len(names):
        raise UserError(
            f"two data sets share the name '{next(n for n in names if names.count(n) > 1)}': rename a file."
        )
    if evaluation.limit is not None and evaluation.limit < 1:
        raise UserError("--limit must be at least 1.")
    fingerprints = []
    cells: list[Cell] = []
    for spec in models:
        clip = load_model(spec)
        fingerprints.append((spec, clip.fingerprint()))
        cells = make_cells(fingerprints, datasets, evaluation.attacks, evaluation.protocol)
        if len(fingerprints) == 1:
            for cell in {c.texts_id: c for c in cells if isinstance(c.attack, TextSettings)}.values():
                assert isinstance(cell.attack, TextSettings)
                _check_substitutes(clip, cell.attack)
    return cells, {spec: chosen_positions(len(data), evaluation.limit) for spec, data in datasets}


# ------------------------------------------------------------------------------------------------------ the calls


def evaluate_models(models: Sequence[str], evaluation: Evaluation, where: Where) -> list[Row]:
    """Evaluate models; results on disk, in the tracker, and returned.

    Raises:
        UserError: bad arguments, before anything is written.
    """
    cells, positions = plan_cells(models, evaluation)
    store, display = Store(where.out), Display(quiet=where.quiet)
    rows = _evaluate(cells, positions, store, where, display)
    book = RunBook(store, where.tracker)
    for model in models:
        fingerprint = next(c.model_fingerprint for c in cells if c.model == model)
        _log_evaluation(
            book, where, store, f"eval {model}", None, fingerprint, [r for r in rows if r.model == model], cells
        )
    write_results(store, rows)
    return rows


def fine_tune(trial: Trial, where: Where) -> None:
    """One training run, to `trial.out`.

    Raises:
        UserError: bad arguments, before anything is written; or why the run failed.
    """
    sweep([trial], where)


def sweep(
    trials: Sequence[Trial],
    where: Where,
    *,
    parent: str | None = None,
    evaluation: Evaluation | None = None,
    base: str | None = None,
) -> tuple[list[Row], dict[str, str]]:
    """Train all trials, then evaluate the untouched model `base` and every result.

    Args:
        parent: name of the tracker's parent run; None logs a single trial without one.
        evaluation: None trains only.

    Returns:
        The rows, and the names to show by model specification.

    Raises:
        UserError: bad arguments, before anything is written; or which trials failed and why.
    """
    trials = check_sweep(trials, evaluation, base, where.train_workers)
    unfinished = [t for t in trials if not t.is_finished()]
    out = Path(where.out)
    store, display = Store(str(out / ".rayclip") if parent is None else where.out), Display(quiet=where.quiet)
    book = RunBook(store, where.tracker)
    root = book.open(parent, tags={"rayclip.kind": "sweep"}) if parent else None

    trials = [
        dataclasses.replace(
            t,
            run=book.open(
                t.name,
                parent=root,
                params=t.config.flat(),
                tags={"rayclip.kind": "train", "rayclip.digest": t.config.digest()},
            ),
        )
        for t in trials
    ]
    if unfinished:
        _train(trials, store, where, display, book)
    if evaluation is None:
        return [], {}

    labels = {f"local-dir:{t.out}": t.name for t in trials}
    if base is not None:
        labels = {base: f"untouched {base}"} | labels
    cells, positions = plan_cells(list(labels), evaluation)
    rows = _evaluate(cells, positions, store, where, display)
    runs = {f"local-dir:{t.out}": t.run for t in trials}
    for model, label in labels.items():
        mine = [r for r in rows if r.model == model]
        fingerprint = next(c.model_fingerprint for c in cells if c.model == model)
        child = runs.get(model) or book.open(label, parent=root, tags={"rayclip.kind": "untouched"})
        _log_evaluation(book, where, store, f"eval {label}", child, fingerprint, mine, cells)
        if model not in runs:
            book.finish(child)
    write_results(store, rows, labels)
    if where.tracker is not None and root is not None:
        where.tracker.table(root, [_flat_row(r, labels) for r in rows], "results_table.json")
        _log_files(where.tracker, root, {"table.md": markdown(rows, labels), "results.json": rows_json(rows)})
        book.finish(root)
    return rows, labels


def _train(trials: Sequence[Trial], store: Store, where: Where, display: Display, book: RunBook) -> None:
    tracker = where.tracker

    def finished(trial: Trial, error: str | None) -> None:
        if tracker is not None and trial.run is not None:
            if error is None:
                tracker.artifact(trial.run, trial.out, "checkpoint")
            book.finish(trial.run, failed=error is not None)

    with ray_cluster(cluster=where.cluster, verbose=where.verbose), display:
        results = run_trials(
            trials,
            workers=Workers.for_cluster(where.train_workers),
            storage=Path(store.root) / "unfinished",
            tracker=tracker,
            display=display,
            on_finish=finished,
        )
    failed = [r for r in results if r.error is not None]
    if failed:
        raise UserError("; ".join(f"{r.trial.name} failed: {r.error}" for r in failed))


def _evaluate(
    cells: Sequence[Cell], positions: dict[str, np.ndarray], store: Store, where: Where, display: Display
) -> list[Row]:
    if any(missing_shards(cell, positions[cell.data], store, where.pool.shard_size) for cell in cells):
        with ray_cluster(cluster=where.cluster, verbose=where.verbose), display:
            evaluate(cells, positions, store, size=where.pool, display=display)
    return collect_rows(cells, positions, store)


# --------------------------------------------------------------------------------------------------- what is kept


def _log_evaluation(
    book: RunBook,
    where: Where,
    store: Store,
    name: str,
    parent: str | None,
    fingerprint: str,
    rows: Sequence[Row],
    cells: Sequence[Cell],
) -> None:
    """One tracker run per evaluated model: metrics by design names, the table, adversarial texts and pictures."""
    tracker = where.tracker
    if tracker is None:
        return
    tags = {
        "rayclip.kind": "eval",
        "rayclip.model": fingerprint,
        **{f"rayclip.data.{c.dataset}": c.data_fingerprint for c in cells},
    }
    key = f"{name} {'+'.join(sorted(r.cell for r in rows))} n={rows[0].n}"
    params = {"model": rows[0].model, **{f"attack.{r.attack}.{k}": v for r in rows for k, v in r.protocol.items()}}
    run = book.open(name, parent=parent, params=params, tags=tags, key=key)
    assert run is not None
    tracker.metrics(run, [(metric, value, 0) for metric, value in metric_names(rows).items()])
    tracker.table(run, [_flat_row(r, {}) for r in rows], "results_table.json")
    files: dict[str, bytes | str] = {"results.json": rows_json(rows)}
    for cell in cells:
        if cell.model_fingerprint != fingerprint:
            continue
        examples = store.read_tables(store.names(f"cells/{cell.id}/examples", ".parquet"))
        if examples is not None:
            title = f"{name.removeprefix('eval ')} on {cell.dataset}: {cell.attack_label}"
            files[f"images/{cell.dataset}-{cell.attack_label}.png"] = example_grid(examples, cell.class_names, title)
        texts = store.read(f"texts/{cell.texts_id}.json") if isinstance(cell.attack, TextSettings) else None
        if texts is not None:
            files[f"texts/{cell.dataset}-{cell.attack.name}.json"] = texts
    _log_files(tracker, run, files)
    book.finish(run)


def _log_files(tracker: MlflowTracker, run: str, files: Mapping[str, bytes | str]) -> None:
    with tempfile.TemporaryDirectory(prefix="rayclip-") as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        tracker.artifact(run, Path(folder))


def metric_names(rows: Sequence[Row]) -> dict[str, float]:
    """`clean/DATA`, `robust/ATTACK/DATA`, `worst/DATA`, and `avg/ATTACK` over several data sets."""
    values: dict[str, float] = {}
    by_attack: dict[str, list[float]] = {}
    for row in rows:
        kind = row.attack if row.attack in ("clean", "worst") else f"robust/{row.attack}"
        values[f"{kind}/{row.dataset}"] = row.top1
        by_attack.setdefault(row.attack, []).append(row.top1)
    if len({row.dataset for row in rows}) > 1:
        values |= {f"avg/{attack}": sum(v) / len(v) for attack, v in by_attack.items()}
    return values


def rows_json(rows: Sequence[Row]) -> str:
    return json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"


def markdown(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> str:
    return "\n".join(table.markdown() for table in result_tables(rows, labels))


def write_results(store: Store, rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> None:
    """`results.json` and `table.md` beside the cells."""
    store.write("results.json", rows_json(rows).encode())
    store.write("table.md", markdown(rows, labels).encode())


def _flat_row(row: Row, labels: Mapping[str, str]) -> dict[str, Any]:
    flat = dataclasses.asdict(row)
    flat["model"] = labels.get(row.model, row.model)
    return flat | {"protocol": json.dumps(flat["protocol"])}


def show(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> None:
    """Print the tables to standard output."""
    console = Console(highlight=False)
    tables: list[Table] = result_tables(rows, labels)
    for table in tables:
        console.print(table.rich())
