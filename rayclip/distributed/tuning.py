"""Run trials with Ray Tune, as many at a time as fit in the cluster; Tune drives a Ray Train run for each."""

import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
import ray.train
import ray.util.client
from ray import tune
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.tune.schedulers import TrialScheduler
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayclip.distributed.checkpoints import KeptCheckpoint, export_finished
from rayclip.distributed.faults import explain, ran_out_of_memory
from rayclip.distributed.resources import check_shared
from rayclip.distributed.session import environment
from rayclip.distributed.train_faults import MemoryCallback, explain_failure, is_lost_controller, note_pressure
from rayclip.distributed.train_worker import STARTED, Measure, WorkerSettings, train_worker
from rayclip.distributed.trials import TUNE_CPUS, MetricLog, Trial, Workers
from rayclip.evaluation.waiting import DataWait
from rayclip.paths import temporary_folder
from rayclip.progress import Display, say
from rayclip.store import Store
from rayclip.types import UserError

_RETRIES = 3  # retries of a Train run whose worker or node was lost
_UNIT = 1e-4  # Ray's smallest difference of a resource
_MOST = 0.1  # maximum part of `cpus` by which an amount differs
# Seconds until elastic training counts its workers again; a lost node is counted for a while, and waited for
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_PER_NODE = 32  # workers of a trial on one node, for which amounts are checked
_Result = TypeVar("_Result")


def run_trials(
    trials: Sequence[Trial],
    *,
    workers: Workers,
    storage: Store,
    log: MetricLog | None,
    display: Display,
    on_finish: Callable[[Trial, str | None], None] = lambda trial, error: None,
    on_report: Callable[[], None] = lambda: None,
    measure: Measure | None = None,
    on_measure: Callable[[Trial, dict[str, Any]], None] = lambda trial, result: None,
    scheduler: Callable[[Callable[[int], None]], TrialScheduler] | None = None,
    is_alone: Callable[[], bool] = lambda: True,
) -> dict[str, str]:
    """Run the unfinished trials, as many at a time as fit in the cluster; return the errors of failed ones, by name.

    Args:
        storage: for unfinished runs, shared by driver and workers; emptied trial by trial.
        log: where rank 0 of each trial writes its training metrics; None for no logging.
        on_finish: called in the driver as soon as a trial ends, with its error if it failed.
        on_report: called in the driver when a trial has reported.
        measure: returns metrics that are added to the report of every checkpoint; a scheduler may stop trials by them.
        on_measure: called in the driver with such a report.
        scheduler: makes a scheduler, given a function that asks a trial, by its number, to stop at its next report.
            Tune must not stop trials: it kills the driver only, and Ray keeps what its Train run has reserved.
        is_alone: tells whether no other command uses `storage`, which is then deleted at the end.

    Raises:
        UserError: the cluster is connected through `ray://`; or a trial's precision is still `auto`.
        Exception: what a callback raises ends the run.
    """
    if ray.util.client.ray.is_connected():  # Tune would run on the cluster, and with it the callbacks
        raise UserError(
            "training is driven from a machine of the cluster: submit it there (ray job submit --working-dir . -- …)."
        )
    if any(trial.config.precision == "auto" for trial in trials):
        raise UserError("the precision of a trial is auto, on which its weights depend: call resolve_precision first.")
    todo = sorted((t for t in trials if not t.is_finished()), key=_length, reverse=True)
    storage.write(STARTED, b"")
    for trial in todo:
        trial.notes(storage).clear("pressure")
        display.update(trial.name, 0, 0, "waiting")
    watcher = _Watcher(
        trials=todo,
        workers=workers,
        storage=storage,
        display=display,
        on_finish=on_finish,
        on_report=on_report,
        on_measure=on_measure,
        may_stop=scheduler is not None,
    )

    def tune_trials(in_tune: bool) -> None:
        left = [n for n, trial in enumerate(todo) if trial.name not in watcher.errors and not trial.is_finished()]
        reserved = {"CPU": TUNE_CPUS}
        if in_tune:
            reserved = {"CPU": TUNE_CPUS + workers.cpus, "GPU": workers.gpus}
        with temporary_folder() as folder:  # for Tune's files; ours are in `storage`
            tune.Tuner(
                # Closures, not parameters: Tune would try to write the trials into its own JSON.
                tune.with_resources(_driver(todo, workers, storage, log, measure, in_tune), reserved),
                param_space={"index": tune.grid_search(left)},
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=workers.trials_at_once(),
                    scheduler=scheduler and scheduler(watcher.ask_to_stop),
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(folder),
                    verbose=0,
                    callbacks=[watcher],
                    stop=_StopAtFailure(watcher),
                    failure_config=tune.FailureConfig(max_failures=_RETRIES),
                ),
            ).fit()

    in_tune = workers.count == 1
    for attempt in range(_RETRIES + 1):
        try:
            tune_trials(in_tune)
            break
        except Exception as error:
            # Tune ends when Ray's memory monitor kills one of its own processes; Train goes on after a killed worker
            if not ran_out_of_memory(error):
                raise
            if attempt == _RETRIES:
                raise explain(error) from error
        say("note", "little memory on a node: Ray has ended a process of training, which is started again.")
        in_tune = False
        time.sleep(2**attempt)  # what takes the memory may be done soon
    if watcher.failure is not None:
        raise watcher.failure
    if not watcher.errors and is_alone():
        storage.delete_folder("")
    return watcher.errors


def _length(trial: Trial) -> tuple[float, int]:
    """Return a sort key, larger for longer trials: the longest start first, so that none starts alone at the end."""
    config = trial.config
    return (config.shots or float("inf")), config.recipe.epochs * (1 + config.method.steps)


@functools.cache
def distinct_cpus(cpus: float, workers: int) -> tuple[float, ...]:
    """Return amounts of CPU of a worker, all slightly below `cpus`, one for each trial at work: nothing public tells
    whose a group is.

    Elastic training divides a node's by one worker's, in floats and rounding down: only amounts that divide exactly are
    returned.
    """
    amounts = (round(cpus - number * _UNIT, 4) for number in range(1, int(_MOST * cpus / _UNIT)))

    def is_exact(amount: float) -> bool:
        sums = itertools.accumulate(itertools.repeat(amount, min(workers, _PER_NODE)))
        return all(total // amount == count for count, total in enumerate(sums, 1))

    return tuple(filter(is_exact, amounts))


def release(cpus: float) -> None:
    """Remove the placement groups of this job whose bundles have this amount of CPU: those of one trial
    (`distinct_cpus`).

    Ray keeps the group of a dead actor until the whole job ends, so that a restarted trial would wait for its own
    resources for ever. Train's own cleaner needs the dashboard, and knows a group only once its workers have started.
    """
    job = ray.get_runtime_context().get_job_id()  # which ends the ids of its placement groups
    for group, record in placement_group_table().items():
        amounts = {round(bundle.get("CPU", 0.0), 4) for bundle in record["bundles"].values()}
        if group.endswith(job) and record["state"] != "REMOVED" and amounts == {cpus}:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def _cpus(workers: Workers, index: int) -> float:
    """Return the CPUs of each worker of a trial, by which its reservations are recognised."""
    amounts = distinct_cpus(workers.cpus, workers.count)
    return amounts[index % len(amounts)]


def _driver(
    trials: Sequence[Trial],
    workers: Workers,
    storage: Store,
    log: MetricLog | None,
    measure: Measure | None,
    in_tune: bool,
) -> Callable[[dict], None]:
    """Return the function that Tune runs for each trial: it drives a Train run and exports its last checkpoint.

    With `in_tune` the Train run is this process itself (`train_worker`).
    """
    threads = workers.threads(len(trials))
    device = ("cuda" if workers.gpus else "cpu") if in_tune else None

    def drive(params: dict[str, Any]) -> None:
        trial = trials[params["index"]]
        try:
            check_shared(storage, STARTED)
        except UserError as error:
            tune.report({"failure": str(error)})
            return
        notes = trial.notes(storage)
        notes.clear("failure", "starved")
        settings = WorkerSettings(trial=trial, log=log, threads=threads, notes=notes, measure=measure, in_tune=device)
        if in_tune:
            here = ray.train.ScalingConfig(num_workers=0)
            TorchTrainer(train_worker, train_loop_config={"settings": settings}, scaling_config=here).fit()
            if export_finished(trial, KeptCheckpoint(trial, storage).last()):
                storage.delete_folder(trial.train_run)
            return
        cpus = _cpus(workers, params["index"])
        release(cpus)  # resources of an earlier driver that was lost
        filesystem, place = storage.filesystem()

        def fit(reports: ReportCallback) -> ray.train.Result:
            trainer = TorchTrainer(
                train_worker,
                train_loop_config={"settings": settings},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=(workers.least, workers.count) if workers.elastic else workers.count,
                    use_gpu=bool(workers.gpus),
                    resources_per_worker={"CPU": cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
                ),
                run_config=ray.train.RunConfig(
                    name=trial.train_run,
                    storage_path=place,
                    storage_filesystem=filesystem,
                    callbacks=[reports, MemoryCallback(notes)],
                    failure_config=ray.train.FailureConfig(max_failures=_RETRIES),
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=None if trial.keep_epochs else 1),
                ),
            )
            with environment({_START_TIMEOUT: os.environ.get(_START_TIMEOUT, "10")} if workers.elastic else {}):
                return trainer.fit()

        try:
            result = report_to_tune(fit)
        except ray.train.TrainingFailedError as error:  # Train has retried itself; Tune must not retry again
            if is_lost_controller(error):
                note_pressure(notes)
                notes.write("starved", "")
                raise
            tune.report({"failure": explain_failure(error, notes, trial.config, workers.count)})
            return
        if export_finished(trial, result.checkpoint, result.best_checkpoints or []):
            storage.delete_folder(trial.train_run)

    return drive


class ReportCallback(UserCallback):
    """A callback in Train's controller that passes rank 0's reports on to the trial's Tune function."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._queue.put(metrics[0] | ({"checkpoint_path": checkpoint.path} if checkpoint else {}))


def report_to_tune(fit: Callable[[ReportCallback], _Result]) -> _Result:
    """Call `fit` with a callback and report to Tune what it passes on; return its result.

    Reports are made by this thread, so that all have been made when a Tune function that calls this one ends.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lost with this process
    queue, result = Queue(1, actor_options={"num_cpus": 0, "scheduling_strategy": here}), Future[_Result]()

    def run() -> None:
        try:
            result.set_result(fit(ReportCallback(queue)))
        except BaseException as error:
            result.set_exception(error)

    result.add_done_callback(lambda _: queue.put(None))
    threading.Thread(target=run, daemon=True).start()  # ends with its process, whatever happens here
    try:
        while (metrics := queue.get()) is not None:
            tune.report(metrics)
        return result.result()
    finally:
        queue.shutdown(force=True)


def _keep_failure(method: Callable[..., None]) -> Callable[..., None]:
    """Keep the first error of a callback: Tune would end with a text of it, which no caller can catch, or go on."""

    @functools.wraps(method)
    def call(self: "_Watcher", *args: Any, **info: Any) -> None:
        try:
            method(self, *args, **info)
        except Exception as error:
            self.failure = self.failure or error

    return call


@dataclass(eq=False, kw_only=True)
class _Watcher(tune.Callback):
    """A Tune callback in the driver that shows each trial's progress and reports how it ended.

    Attributes:
        errors: errors of the failed trials, by name.
        failure: what a callback raised, which ended the run.
    """

    trials: Sequence[Trial]
    workers: Workers
    storage: Store
    display: Display
    on_finish: Callable[[Trial, str | None], None]
    on_report: Callable[[], None]
    on_measure: Callable[[Trial, dict[str, Any]], None]
    may_stop: bool
    waiting: DataWait = field(default_factory=lambda: DataWait("training"))
    errors: dict[str, str] = field(default_factory=dict)
    failure: Exception | None = None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return tune.Callback, ()  # Tune pickles its callbacks to disk; a terminal and closures cannot be pickled

    @_keep_failure
    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.on_report()
        if "epoch" in result:
            note = f"epoch {result['epoch']}/{result['epochs']}, loss {result['loss']:.3f}"
            if result["workers"] < self.workers.count:
                note += f", {result['workers']} of {self.workers.count} workers"
            self.waiting.add(result["data_wait"] * result["seconds"], result["seconds"], on_gpu=bool(self.workers.gpus))
            name = self.trials[trial.config["index"]].name
            self.display.update(name, result["step"], result["total_steps"], note)
            if "checkpoint_path" in result:
                self.on_measure(self.trials[trial.config["index"]], result)

    @_keep_failure
    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        # An earlier attempt's failure does not count if it ended well
        ended = self.trials[trial.config["index"]].is_finished() or (self.may_stop and "failure" not in last)
        self._end(trial.config["index"], None if ended else last.get("failure") or "it ended early; run again to go on")

    @_keep_failure
    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Release the reserved resources of a trial whose driver was lost and will be restarted."""
        release(_cpus(self.workers, trial.config["index"]))

    @_keep_failure
    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        mine, error = self.trials[trial.config["index"]], trial.get_pickled_error()
        notes = mine.notes(self.storage)
        if error is None and trial.get_error() is not None:
            # Tune keeps the exceptions of tasks and actors only; that of Ray's memory monitor is neither
            notes.write("starved", "")
        why = explain_failure(error, notes, mine.config, self.workers.count)
        self._end(trial.config["index"], why)

    @_keep_failure
    def ask_to_stop(self, index: int) -> None:
        """Have a trial stop at its next report. Called by a scheduler."""
        self.trials[index].notes(self.storage).write("stop", "")

    def _end(self, index: int, error: str | None) -> None:
        if error is not None:
            self.errors[self.trials[index].name] = error
            release(_cpus(self.workers, index))
        self.on_finish(self.trials[index], error)


@dataclass
class _StopAtFailure(tune.Stopper):
    """Stops all trials when a callback has failed."""

    watcher: _Watcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.watcher.failure is not None
