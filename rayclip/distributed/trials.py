"""Run trials with Ray Tune: each trial is a Ray Train run on one or several workers and ends as one checkpoint folder.

A trial's Train run is named after the digest of its configuration. A driver that is started again therefore finds
finished trials on disk and resumes unfinished ones from their last checkpoint.
"""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.util.client
import torch
from ray import tune
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.execution.context import get_train_context
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import TrialScheduler
from ray.util.placement_group import get_current_placement_group

from rayclip.distributed.connect import _JOB, ray_cluster
from rayclip.distributed.lighter import MemoryWatch, fit_into_memory, lost_a_helper, note_pressure, why_it_failed
from rayclip.distributed.notes import Notes, release
from rayclip.distributed.resources import check_shared, within_reach
from rayclip.models.checkpoint import FILES, read_lineage
from rayclip.progress import Display
from rayclip.store import Store, no_room
from rayclip.tracking.spool import Spool
from rayclip.training import Progress, TrainConfig, train
from rayclip.types import UserError

_DRIVER_CPUS = 0.1  # CPUs of the Tune function that waits for a Train run
_BEGUN = "begun"  # a file by which every node can check that it sees the driver's storage
_PRECISION = "precision.json"  # what `auto` was resolved to
_RETRIES = 3  # retries of a Train run whose worker or node was lost

Measure = Callable[[Path, torch.device], dict[str, float]]  # returns the metrics of a checkpoint's folder


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of one trial, and their resources.

    Attributes:
        count: Train workers (DDP ranks).
        least: minimum number of workers with which a trial continues, from its last checkpoint, while the cluster has
            no room for `count`; it uses the others again within a minute of their return. None waits for all of them.
        gpus: GPUs per worker; 0 runs on the CPU.
        cpus: CPUs per worker. 0.9 lets two trials and Tune's own 0.1 CPU for each fit on two cores.
    """

    count: int = 1
    least: int | None = None
    gpus: float = 0.0
    cpus: float = 0.9

    @classmethod
    def for_cluster(cls, count: int = 1, least: int | None = None) -> "Workers":
        """Return workers with one GPU each if the cluster has GPUs or can add some, else without."""
        return cls(count=count, least=least, gpus=1.0 if within_reach()["GPU"] >= 1 else 0.0)

    @property
    def elastic(self) -> bool:
        return self.least is not None and self.least < self.count

    def threads(self, trials: int) -> int:
        """Return the CPU threads per worker when `trials` trials share the cluster's cores."""
        cores = within_reach()["CPU"]
        return max(1, int(cores / (min(trials, self.trials_at_once()) * self.count)))

    def trials_at_once(self) -> int:
        """Return how many trials fit in the cluster, with the nodes that it can add.

        With this limit no trial's driver starts long before its workers can.
        """
        reach = within_reach()
        by_cpu = reach["CPU"] / (self.count * self.cpus + _DRIVER_CPUS)
        by_gpu = reach["GPU"] / (self.count * self.gpus) if self.gpus else by_cpu
        return max(1, int(min(by_cpu, by_gpu)))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training run of a sweep.

    Attributes:
        name: name in tables, runs and the progress display.
        out: folder or URI of the finished checkpoint, which driver and workers share.
        run: the tracker's run to log to.
        keep_epochs: epochs whose checkpoints are also kept, as `OUT/epoch-N`; the configuration must save them.
    """

    name: str
    config: TrainConfig
    out: str
    run: str | None = None
    keep_epochs: tuple[int, ...] = ()

    def at_epoch(self, epoch: int) -> Store:
        """Return where the checkpoint after `epoch` epochs is."""
        out = Store(self.out)
        return out if epoch == self.config.recipe.epochs else out.child(f"epoch-{epoch}")

    @property
    def model(self) -> str:
        """Return the model specification of the finished checkpoint."""
        return self.model_at(self.config.recipe.epochs)

    def model_at(self, epoch: int) -> str:
        """Return the model specification of the checkpoint after `epoch` epochs, one of `keep_epochs` or the last."""
        return f"{'prompted' if self.config.method.trains == 'prompt' else 'local-dir'}:{self.at_epoch(epoch).root}"

    @property
    def train_run(self) -> str:
        """Return the name of the trial's Train run."""
        return f"train-{self.config.digest()}"

    def notes(self, storage: Store) -> Notes:
        """Return the notes that the trial's processes write for each other, beside its unfinished run in `storage`."""
        return Notes(storage=storage, run=self.train_run)

    def is_finished(self) -> bool:
        """Return whether `out` holds the finished checkpoint of this configuration.

        Raises:
            UserError: it holds the checkpoint of another configuration.
        """
        lineage = read_lineage(self.out)
        if lineage is None:
            return False
        if lineage.get("digest") != self.config.digest():
            if (lineage.get("config") or {}).get("precision") == "auto":
                raise UserError(
                    f"{self.out} holds a checkpoint of an earlier version, which did not note in which precision it "
                    "was trained: choose another --out, or delete it."
                )
            raise UserError(
                f"{self.out} holds a checkpoint of other settings or data: choose another --out, or delete it."
            )
        return True


@contextlib.contextmanager
def with_precision(
    trials: Sequence[Trial], store: Store, *, cluster: bool, verbose: bool = False
) -> Iterator[list[Trial]]:
    """Yield the trials with the precision `auto` resolved: bf16 if workers have GPUs, else fp32.

    It has to be known before anything is looked up or logged, since the weights depend on it. What an earlier start in
    the same folder decided stays: a run goes on as it was begun, and a finished one needs no Ray.

    Args:
        store: where `keep_precision` has noted it, beside the results.
        cluster, verbose: as for `ray_cluster`. A running cluster is asked for its GPUs and stays connected in the
            block. Otherwise this machine's GPUs decide, and no Ray is started.
    """
    with contextlib.ExitStack() as stack:
        if any(trial.config.precision == "auto" for trial in trials):
            decided = (store.read_json(_PRECISION) or {}).get("auto")
            if decided not in ("fp32", "bf16"):
                if running := cluster or _JOB in os.environ or ray.is_initialized():
                    stack.enter_context(ray_cluster(cluster=cluster, verbose=verbose))
                has_gpus = Workers.for_cluster().gpus > 0 if running else torch.cuda.is_available()
                decided = "bf16" if has_gpus else "fp32"
            trials = [dataclasses.replace(t, config=t.config.decided(on_gpu=decided == "bf16")) for t in trials]
        yield list(trials)


def keep_precision(trials: Sequence[Trial], store: Store) -> None:
    """Note the precision that runs begin in, for `with_precision` of later starts in the same folder."""
    store.write_json(_PRECISION, {"auto": trials[0].config.precision})


def forgotten(trials: Sequence[Trial], storage: Store) -> list[str]:
    """Return the names of unfinished Train runs in `storage` that belong to none of the trials."""
    own = {trial.train_run for trial in trials}
    return [name for name in storage.folders() if name.startswith("train-") and name not in own]


def run_trials(
    trials: Sequence[Trial],
    *,
    workers: Workers,
    storage: Store,
    spool: Spool | None,
    display: Display,
    on_finish: Callable[[Trial, str | None], None] = lambda trial, error: None,
    on_report: Callable[[], None] = lambda: None,
    measure: Measure | None = None,
    on_measure: Callable[[Trial, dict[str, Any]], None] = lambda trial, result: None,
    scheduler: Callable[[Callable[[int], None]], TrialScheduler] | None = None,
) -> dict[str, str]:
    """Run the unfinished trials, as many at a time as fit in the cluster; return the errors of failed ones, by name.

    Args:
        storage: for unfinished runs, shared by driver and workers; emptied trial by trial.
        spool: where rank 0 of each trial writes its training metrics.
        on_finish: called in the driver as soon as a trial ends, with its error if it failed.
        on_report: called in the driver when a trial has reported.
        measure: returns metrics that are added to the report of every checkpoint; a scheduler may stop trials by them.
        on_measure: called in the driver with such a report.
        scheduler: makes a scheduler, given a function that asks a trial, by its number, to stop at its next report. The
            scheduler must not let Tune stop trials: that kills only the driver, and Ray keeps the resources that its
            Train run has reserved.

    Raises:
        UserError: the cluster is connected through `ray://`.
    """
    if ray.util.client.ray.is_connected():  # Tune would run on the cluster, and with it the callbacks
        raise UserError(
            "training is driven from a machine of the cluster: submit it there (ray job submit --working-dir . -- …)."
        )
    todo = sorted((t for t in trials if not t.is_finished()), key=_length, reverse=True)
    storage.write(_BEGUN, b"")
    for trial in todo:
        trial.notes(storage).clear("pressure")
        display.update(trial.name, 0, 0, "waiting")
    calls = on_finish, on_report, on_measure
    watcher = _Watcher(todo, workers, storage, display, *calls, may_stop=scheduler is not None)

    def ask_to_stop(index: int) -> None:
        todo[index].notes(storage).write("stop", "")

    with tempfile.TemporaryDirectory(prefix="rayclip-tune-") as notes:  # for Tune's own files; ours are in `storage`
        tuner = tune.Tuner(
            # Closures, not parameters: Tune would try to write the trials into its own JSON.
            tune.with_resources(_driver(todo, workers, storage, spool, measure), {"CPU": _DRIVER_CPUS}),
            param_space={"index": tune.grid_search(list(range(len(todo))))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=workers.trials_at_once(), scheduler=scheduler and scheduler(ask_to_stop)
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=notes,
                verbose=0,
                callbacks=[watcher],
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
            ),
        )
        tuner.fit()
    if not watcher.errors:
        storage.delete_folder("")
    return watcher.errors


def _length(trial: Trial) -> tuple[float, int]:
    """Return a sort key, larger for longer trials: the longest start first, so that none starts alone at the end."""
    config = trial.config
    return (config.shots or float("inf")), config.recipe.epochs * (1 + config.method.steps)


def _driver(
    trials: Sequence[Trial], workers: Workers, storage: Store, spool: Spool | None, measure: Measure | None
) -> Callable[[dict], None]:
    """Return the function that Tune runs for each trial: it drives a Train run and exports its last checkpoint."""
    threads = workers.threads(len(trials))

    def drive(params: dict[str, Any]) -> None:
        trial = trials[params["index"]]
        name = trial.train_run
        try:
            check_shared(storage, _BEGUN)
        except UserError as error:
            tune.report({"failure": str(error)})
            return
        notes = trial.notes(storage)
        notes.clear("failure")
        notes.clear("starved")
        release(notes)  # resources of an earlier driver that was lost
        filesystem, place = storage.filesystem()
        reports = Reports()
        resources: dict[str, float] = {"CPU": workers.cpus}
        if workers.gpus:
            resources["GPU"] = workers.gpus
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={
                "config": trial.config,
                "run": trial.run,
                "spool": spool,
                "threads": threads,
                "notes": notes,
                "measure": measure,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=(workers.least, workers.count) if workers.elastic else workers.count,
                use_gpu=bool(workers.gpus),
                resources_per_worker=resources,
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=place,
                storage_filesystem=filesystem,
                callbacks=[reports, MemoryWatch(notes)],
                failure_config=ray.train.FailureConfig(max_failures=_RETRIES),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=None if trial.keep_epochs else 1),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:  # Train has retried itself; Tune must not retry again
            reports.drain()
            if lost_a_helper(error):
                note_pressure(notes)
                notes.write("starved", "")
                raise
            tune.report({"failure": _why(error, trial, notes, workers)})
            return
        reports.drain()
        if result.checkpoint is None:
            return
        with result.checkpoint.as_directory() as folder:
            lineage = read_lineage(Path(folder)) or {}
            if lineage.get("step") != lineage.get("total_steps"):  # the worker stopped early and has reported why
                return
            for saved, metrics in result.best_checkpoints or []:
                if metrics["epoch"] in trial.keep_epochs and saved != result.checkpoint:
                    with saved.as_directory() as earlier:  # an epoch's last checkpoint is the one at its end
                        _export(Path(earlier), trial.at_epoch(metrics["epoch"]))
            _export(Path(folder), Store(trial.out))
        storage.delete_folder(name)

    return drive


class Reports(TuneReportCallback):
    """The callback that passes the workers' reports to Tune, through a queue that holds one report."""

    def drain(self) -> None:
        """Wait until Tune has taken every report.

        Tune's main thread passes a report on through a second queue of size one, into which Tune also puts a trial's
        end when its function returns: if that comes first, the thread waits for itself, and the trial never ends. Tune
        ignores empty reports; once it has taken the first of two empty ones, it has handled all reports before them.
        """
        for _ in range(2):
            self._training_actor_item_queue.put({})


def _export(checkpoint: Path, out: Store) -> None:
    """Copy a checkpoint's files to `out`, the lineage last, so that a folder with `rayclip.json` is complete."""
    for name in (name for name in FILES if (checkpoint / name).exists()):
        out.copy_in(checkpoint / name, name)


def _train_worker(args: dict[str, Any]) -> None:
    notes: Notes = args["notes"]
    host = _RayHost(args["spool"], args["run"], args["measure"], notes)
    if host.device.type == "cpu":  # Ray sets one thread for a worker with fewer than two CPUs
        torch.set_num_threads(min(args["threads"], os.cpu_count() or 1))
    try:
        check_shared(notes.storage, _BEGUN)
        group = get_current_placement_group()
        if host.rank == 0 and group is not None:
            notes.write("reservation", f"{group.id.hex()} train-{get_train_context().train_run_context.run_id}")
        failure = notes.read("failure")
        if failure is not None:  # a rank of an earlier attempt met an error that another attempt would not fix
            ray.train.report({"failure": failure})
            return
        train(fit_into_memory(args["config"], notes, host.rank, host.world_size), host)
    except _StopError:
        return
    except (UserError, FloatingPointError, OSError) as error:
        explained = no_room(error) if isinstance(error, OSError) else error
        if explained is None:
            raise
        if host.world_size > 1:  # the other ranks wait for this one: only an exception ends them
            with contextlib.suppress(OSError):
                notes.write("failure", str(explained))
            raise explained from error
        ray.train.report({"failure": str(explained)})


class _RayHost:
    """The `Host` of a Ray Train worker, for the train loop."""

    def __init__(self, spool: Spool | None, run: str | None, measure: Measure | None, notes: Notes) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = torch.device(get_device())
        self._measure, self._notes = measure, notes
        self._spool, self._run = (spool, run) if self.rank == 0 else (None, None)

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def report(self, progress: Progress, save: Callable[[Path], None] | None) -> None:
        if self._spool is not None and self._run is not None:
            values = [(f"train/{name}", value, step) for step, row in progress.curve for name, value in row.items()]
            values.append(("train/images_per_second", progress.images_per_second, progress.step))
            self._spool.metrics(self._run, values)
        metrics = {k: v for k, v in dataclasses.asdict(progress).items() if k != "curve"}
        metrics["workers"] = self.world_size
        if save is None:
            ray.train.report(metrics)
            self._stop_if_asked()
            return
        with tempfile.TemporaryDirectory(prefix="rayclip-") as folder:
            save(Path(folder) / "checkpoint")
            if self._measure is not None:
                metrics |= self._measure(Path(folder) / "checkpoint", self.device)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(Path(folder) / "checkpoint")))
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Raise `_StopError` on all ranks at once if the trial was asked to stop."""
        if self._measure is not None and broadcast_from_rank_zero(self._notes.read("stop") is not None):
            raise _StopError


class _StopError(Exception):
    """Raised in a trial's workers when the trial was asked to stop."""


class _Watcher(tune.Callback):
    """A Tune callback in the driver that shows each trial's progress and reports how it ended.

    Attributes:
        errors: errors of the failed trials, by name.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        workers: Workers,
        storage: Store,
        display: Display,
        on_finish: Callable[[Trial, str | None], None],
        on_report: Callable[[], None],
        on_measure: Callable[[Trial, dict[str, Any]], None],
        *,
        may_stop: bool,
    ) -> None:
        self.errors: dict[str, str] = {}
        self._trials, self._workers, self._storage = trials, workers, storage
        self._display, self._may_stop = display, may_stop
        self._on_finish, self._on_report, self._on_measure = on_finish, on_report, on_measure

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return tune.Callback, ()  # Tune pickles its callbacks to disk; a terminal and closures cannot be pickled

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._on_report()
        if "epoch" in result:
            note = f"epoch {result['epoch']}/{result['epochs']}, loss {result['loss']:.3f}"
            if result["workers"] < self._workers.count:
                note += f", {result['workers']} of {self._workers.count} workers"
            name = self._trials[trial.config["index"]].name
            self._display.update(name, result["step"], result["total_steps"], note)
            if "checkpoint_path" in result:
                self._on_measure(self._trials[trial.config["index"]], result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        mine = self._trials[trial.config["index"]]
        failure = (trial.last_result or {}).get("failure") or "it ended early; run again to go on"
        ended = mine.is_finished() or (self._may_stop and "failure" not in (trial.last_result or {}))
        self._end(mine, None if ended else failure)  # an earlier attempt's failure does not count if it ended well

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Release the reserved resources of a trial whose driver was lost and will be restarted."""
        release(self._trials[trial.config["index"]].notes(self._storage))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        mine = self._trials[trial.config["index"]]
        self._end(mine, _why(trial.get_error(), mine, mine.notes(self._storage), self._workers))

    def _end(self, trial: Trial, error: str | None) -> None:
        if error is not None:
            self.errors[trial.name] = error
            release(trial.notes(self._storage))
        self._on_finish(trial, error)


def _why(error: BaseException | None, trial: Trial, notes: Notes, workers: Workers) -> str:
    """Return one sentence on why a trial failed."""
    return why_it_failed(error, notes, trial.config, workers.count) or _last_line(error)


def _last_line(error: BaseException | None) -> str:
    """Return the innermost cause, which Ray puts last, without the exception's type; for a full disk, what to do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    found = re.search(r"\[Errno (\d+)\]", lines[-1])
    explained = no_room(OSError(int(found[1]), os.strerror(int(found[1])))) if found else None
    return str(explained) if explained else lines[-1].removeprefix("rayclip.types.UserError: ")
