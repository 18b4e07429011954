"""Ray Tune over Ray Train: each trial is a Train run of one or several workers and ends as one checkpoint folder.

A trial's Train run is named after the digest of its configuration. A driver that is started again therefore finds
finished trials on disk and lets unfinished ones go on from their last checkpoint.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray import tune
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback

from rayclip.models.checkpoint import FILES, read_lineage
from rayclip.progress import Display
from rayclip.training import Progress, TrainConfig, train
from rayclip.types import Tracker, UserError

_DRIVER_CPUS = 0.1  # of the Tune function that waits for a Train run
_RETRIES = 3  # of a Train run whose worker or node was lost


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What one trial runs on.

    Attributes:
        count: Train workers (DDP ranks).
        gpus: of one worker; 0 runs on the CPU.
        cpus: of one worker. 0.9 lets two trials and Tune's own 0.1s fit on two cores.
    """

    count: int = 1
    gpus: float = 0.0
    cpus: float = 0.9

    @classmethod
    def for_cluster(cls, count: int = 1) -> "Workers":
        """One GPU a worker where the cluster has GPUs."""
        return cls(count=count, gpus=1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0)

    def threads(self, trials: int) -> int:
        """CPU threads of each worker when so many trials share the cluster's cores."""
        cores = ray.cluster_resources().get("CPU", 1.0)
        return max(1, int(cores / (min(trials, self.trials_at_once()) * self.count)))

    def trials_at_once(self) -> int:
        """How many trials the cluster holds: no driver process starts long before its workers can."""
        resources = ray.cluster_resources()
        by_cpu = resources.get("CPU", 1.0) / (self.count * self.cpus + _DRIVER_CPUS)
        by_gpu = resources.get("GPU", 0.0) / (self.count * self.gpus) if self.gpus else by_cpu
        return max(1, int(min(by_cpu, by_gpu)))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training run of a sweep.

    Attributes:
        name: for tables, runs and progress.
        out: folder of the finished checkpoint, on storage that driver and workers share.
        run: the tracker's run to log to.
        keep_epochs: epochs whose checkpoints are kept too, as `OUT/epoch-N`; the configuration must save them.
    """

    name: str
    config: TrainConfig
    out: Path
    run: str | None = None
    keep_epochs: tuple[int, ...] = ()

    def at_epoch(self, epoch: int) -> Path:
        """The folder of the checkpoint after so many epochs."""
        return self.out if epoch == self.config.recipe.epochs else self.out / f"epoch-{epoch}"

    @property
    def model(self) -> str:
        """What the finished checkpoint is called as a model."""
        return self.model_at(self.config.recipe.epochs)

    def model_at(self, epoch: int) -> str:
        """What the checkpoint after so many epochs, one of `keep_epochs` or the last, is called as a model."""
        return f"{'prompted' if self.config.method.trains == 'prompt' else 'local-dir'}:{self.at_epoch(epoch)}"

    def is_finished(self) -> bool:
        """Whether `out` holds this very configuration's checkpoint.

        Raises:
            UserError: it holds another one.
        """
        lineage = read_lineage(self.out)
        if lineage is None:
            return False
        if lineage.get("digest") != self.config.digest():
            raise UserError(
                f"{self.out} holds a checkpoint of other settings or data: choose another --out, or delete it."
            )
        return True


def run_trials(
    trials: Sequence[Trial],
    *,
    workers: Workers,
    storage: Path,
    tracker: Tracker | None,
    display: Display,
    on_finish: Callable[[Trial, str | None], None] = lambda trial, error: None,
) -> dict[str, str]:
    """Run what is not finished yet, as many trials at a time as the cluster holds; why trials failed, by name.

    Args:
        storage: folder for unfinished runs; emptied trial by trial.
        on_finish: called in the driver as soon as a trial ends, with its error if it failed.
    """
    todo = sorted((t for t in trials if not t.is_finished()), key=_length, reverse=True)
    for trial in todo:
        display.update(trial.name, 0, 0, "waiting")
    shutil.rmtree(storage / "tune", ignore_errors=True)  # Tune's own notes of an earlier start; ours are elsewhere
    storage.mkdir(parents=True, exist_ok=True)
    watcher = _Watcher(todo, display, on_finish)
    tuner = tune.Tuner(
        # Closures, not parameters: Tune would try to write the trials into its own JSON.
        tune.with_resources(_driver(todo, workers, storage, tracker), {"CPU": _DRIVER_CPUS}),
        param_space={"index": tune.grid_search(list(range(len(todo))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=workers.trials_at_once()),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            verbose=0,
            callbacks=[watcher],
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
        ),
    )
    tuner.fit()
    if not watcher.errors:
        shutil.rmtree(storage, ignore_errors=True)
    return watcher.errors


def _length(trial: Trial) -> tuple[float, int]:
    """Sorts the longest trials first, so that none starts when the others are done."""
    config = trial.config
    return (config.shots or float("inf")), config.recipe.epochs * (1 + config.method.steps)


def _driver(
    trials: Sequence[Trial], workers: Workers, storage: Path, tracker: Tracker | None
) -> Callable[[dict], None]:
    """The function that Tune runs for each trial: it drives a Train run and keeps its last checkpoint."""
    threads = workers.threads(len(trials))

    def drive(params: dict[str, Any]) -> None:
        trial = trials[params["index"]]
        name = f"train-{trial.config.digest()}"
        note = storage / f"{name}.failure"
        note.unlink(missing_ok=True)
        resources: dict[str, float] = {"CPU": workers.cpus}
        if workers.gpus:
            resources["GPU"] = workers.gpus
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={
                "config": trial.config,
                "run": trial.run,
                "tracker": tracker,
                "threads": threads,
                "failure_note": note,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers.count, use_gpu=bool(workers.gpus), resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(storage),
                callbacks=[TuneReportCallback()],
                failure_config=ray.train.FailureConfig(max_failures=_RETRIES),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=None if trial.keep_epochs else 1),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:  # Train has tried again itself; Tune must not
            tune.report({"failure": _last_line(error)})
            return
        if result.checkpoint is None:
            return
        with result.checkpoint.as_directory() as folder:
            lineage = read_lineage(Path(folder)) or {}
            if lineage.get("step") != lineage.get("total_steps"):  # the worker gave up, and has reported why
                return
            for saved, metrics in result.best_checkpoints or []:
                if metrics["epoch"] in trial.keep_epochs and saved != result.checkpoint:
                    with saved.as_directory() as earlier:  # the last of an epoch is its end
                        _export(Path(earlier), trial.at_epoch(metrics["epoch"]))
            _export(Path(folder), trial.out)
        shutil.rmtree(storage / name, ignore_errors=True)

    return drive


def _export(checkpoint: Path, out: Path) -> None:
    """Move a checkpoint's files to `out`, the lineage last: a folder with `rayclip.json` is whole."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (name for name in FILES if (checkpoint / name).exists()):
        aside = out / f".{name}.partial"
        shutil.copyfile(checkpoint / name, aside)
        aside.replace(out / name)


def _train_worker(args: dict[str, Any]) -> None:
    host = _RayHost(args["tracker"], args["run"])
    if host.device.type == "cpu":  # Ray sets one thread for a worker of less than two CPUs
        torch.set_num_threads(min(args["threads"], os.cpu_count() or 1))
    note: Path = args["failure_note"]
    if note.exists():  # a rank of an earlier attempt found what trying again does not mend
        ray.train.report({"failure": note.read_text()})
        return
    try:
        train(args["config"], host)
    except (UserError, FloatingPointError) as error:
        if host.world_size > 1:  # the other ranks wait for this one: only raising ends them
            note.write_text(str(error))
            raise
        ray.train.report({"failure": str(error)})


class _RayHost:
    """A Ray Train worker as the train loop sees it."""

    def __init__(self, tracker: Tracker | None, run: str | None) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = torch.device(get_device())
        self._tracker, self._run = (tracker, run) if self.rank == 0 else (None, None)

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def report(self, progress: Progress, save: Callable[[Path], None] | None) -> None:
        if self._tracker is not None and self._run is not None:
            values = [(f"train/{name}", value, step) for step, row in progress.curve for name, value in row.items()]
            values.append(("train/images_per_second", progress.images_per_second, progress.step))
            self._tracker.metrics(self._run, values)
        metrics = {k: v for k, v in dataclasses.asdict(progress).items() if k != "curve"}
        if save is None:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="rayclip-") as folder:
            save(Path(folder) / "checkpoint")
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(Path(folder) / "checkpoint")))


class _Watcher(tune.Callback):
    """Runs in the driver: shows each trial's progress and tells how it ended.

    Attributes:
        errors: why trials failed, by name.
    """

    def __init__(
        self, trials: Sequence[Trial], display: Display, on_finish: Callable[[Trial, str | None], None]
    ) -> None:
        self.errors: dict[str, str] = {}
        self._trials, self._display, self._on_finish = trials, display, on_finish

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return tune.Callback, ()  # Tune writes its callbacks to disk; a terminal and a closure stay behind

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "epoch" in result:
            epoch = f"epoch {result['epoch']}/{result['epochs']}"
            note = f"{epoch}  loss {result['loss']:.3f}  {result['images_per_second']:.0f} img/s"
            name = self._trials[trial.config["index"]].name
            self._display.update(name, result["step"], result["total_steps"], note)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        mine = self._trials[trial.config["index"]]
        failure = (trial.last_result or {}).get("failure")
        self._end(mine, failure or (None if mine.is_finished() else "it ended early; run again to go on"))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(self._trials[trial.config["index"]], _last_line(trial.get_error()))

    def _end(self, trial: Trial, error: str | None) -> None:
        if error is not None:
            self.errors[trial.name] = error
        self._on_finish(trial, error)


def _last_line(error: BaseException | None) -> str:
    """The innermost cause, which Ray puts last, without the exception's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("rayclip.types.UserError: ") if lines else type(error).__name__
