"""Run the train loop in Ray Train: in a worker, or, of a trial with one worker, in Tune's own process.

Train's local mode (`num_workers=0`) spares such a trial the start of five processes beside Tune's. It keeps no
checkpoints and takes no reports for Tune: `_HostInTune` does.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray import tune
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from rayclip.distributed.checkpoints import KeptCheckpoint, export
from rayclip.distributed.resources import check_shared
from rayclip.distributed.train_faults import fit_into_memory, note_pressure
from rayclip.distributed.trials import MetricLog, Notes, Trial
from rayclip.paths import temporary_folder
from rayclip.store import Store, no_room
from rayclip.training import Progress, train
from rayclip.training.validation import BEST
from rayclip.types import UserError

STARTED = "begun"  # a file by which every node can check that it sees the driver's storage

Measure = Callable[[Path, torch.device], dict[str, float]]  # returns the metrics of a checkpoint's folder


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """The settings that every worker of a trial gets."""

    trial: Trial
    log: MetricLog | None
    threads: int  # CPU threads of a worker without a GPU
    notes: Notes
    measure: Measure | None  # measures each checkpoint; its metrics are added to the report
    in_tune: str | None  # the device, if the only worker is Tune's own process


def train_worker(args: dict[str, WorkerSettings]) -> None:
    """Train one rank: Train's loop function.

    An error that another attempt would not fix is reported as `failure`; others are raised, for Train to try again.
    """
    settings = args["settings"]
    notes, host = settings.notes, (_HostInTune if settings.in_tune else _RayHost)(settings)
    if host.device.type == "cpu":  # Ray sets one thread for a worker with fewer than two CPUs
        torch.set_num_threads(min(settings.threads, os.cpu_count() or 1))
    try:
        check_shared(notes.storage, STARTED)
        failure = notes.read("failure")
        if failure is not None:  # a rank of an earlier attempt met an error that another attempt would not fix
            host.send({"failure": failure})
            return
        config = fit_into_memory(settings.trial.config, notes, host.rank, host.world_size)
        if config.data_workers is None:
            config = dataclasses.replace(config, data_workers=count_decoders(on_gpu=host.device.type == "cuda"))
        train(config, host)
    except _StopError:
        return
    except torch.OutOfMemoryError:  # of the GPU: the next attempt goes on with a batch in more parts
        if settings.in_tune:  # elsewhere Train's controller notes it
            note_pressure(notes, ray.util.get_node_ip_address())
        raise
    except (UserError, FloatingPointError, OSError) as error:
        shown = no_room(error) if isinstance(error, OSError) else error
        if shown is None:
            raise
        if host.world_size > 1:  # the other ranks wait for this one: only an exception ends them
            with contextlib.suppress(OSError):
                notes.write("failure", str(shown))
            raise shown from error
        host.send({"failure": str(shown)})


def count_decoders(*, on_gpu: bool) -> int:
    """Return how many processes decode images for a Train worker: enough that a GPU never waits; none on a CPU, which
    has no core to spare."""
    if not on_gpu:
        return 0
    here = ray.get_runtime_context().get_node_id()
    node = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return max(0, int(node.get("CPU", 1) // node.get("GPU", 1)) - 1)


class _RayHost:
    """The `Host` of a Ray Train worker, for the train loop."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.rank, self.world_size, self.device = self._place(settings)
        self._trial, self._measure, self._notes = settings.trial, settings.measure, settings.notes
        self._kept = KeptCheckpoint(settings.trial, settings.notes.storage)
        self._log, self._run = (settings.log, settings.trial.run) if self.rank == 0 else (None, None)

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        checkpoint = self._last()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def report(self, progress: Progress, save: Callable[[Path], None] | None) -> None:
        if self._log is not None and self._run is not None:
            values = [(f"train/{name}", value, step) for step, row in progress.curve for name, value in row.items()]
            values.append(("train/images_per_second", progress.images_per_second, progress.step))
            values += [(f"validate/{name}", value, progress.step) for name, value in progress.validated.items()]
            values.append(("train/data_wait", progress.data_wait, progress.step))
            self._log.metrics(self._run, values)
        metrics = {k: v for k, v in dataclasses.asdict(progress).items() if k not in ("curve", "validated")}
        metrics["workers"] = self.world_size
        with temporary_folder() as folder:
            place = folder / "checkpoint"
            if save is not None:
                save(place)
                self._export_best(place / BEST)
                metrics |= {} if self._measure is None else self._measure(place, self.device)
            self.send(metrics, None if save is None else place)
        # All ranks stop at once if the trial was asked to
        if self._measure is not None and broadcast_from_rank_zero(self._notes.read("stop") is not None):
            raise _StopError

    def _export_best(self, folder: Path) -> None:
        """Move the best checkpoint, which the end of a validated run has, to the trial's `out`."""
        if folder.is_dir():
            export(folder, Store(self._trial.out).child(BEST))
            shutil.rmtree(folder)

    def _place(self, settings: WorkerSettings) -> tuple[int, int, torch.device]:
        """Return rank, number of ranks and device."""
        context = ray.train.get_context()
        return context.get_world_rank(), context.get_world_size(), torch.device(get_device())

    def _last(self) -> ray.train.Checkpoint | None:
        return ray.train.get_checkpoint() or self._kept.last()

    def send(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Report metrics, and a checkpoint's folder if there is one."""
        ray.train.report(metrics, checkpoint=checkpoint and ray.train.Checkpoint.from_directory(str(checkpoint)))


class _HostInTune(_RayHost):
    """The `Host` of Tune's own process, where Train answers none of these; its device would be a GPU not reserved."""

    def _place(self, settings: WorkerSettings) -> tuple[int, int, torch.device]:
        return 0, 1, torch.device(settings.in_tune or "cpu")

    def _last(self) -> ray.train.Checkpoint | None:
        return self._kept.last()

    def send(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        if checkpoint is not None:
            metrics |= {"checkpoint_path": self._kept.keep(checkpoint, metrics["step"])}
            epoch, epochs = metrics["epoch"], metrics["epochs"]
            at_end_of_epoch = metrics["step"] * epochs == epoch * metrics["total_steps"]
            if at_end_of_epoch and epoch < epochs and epoch in self._trial.keep_epochs:
                export(checkpoint, self._trial.at_epoch(epoch))
        tune.report(metrics)


class _StopError(Exception):
    """Raised in a trial's workers when the trial was asked to stop."""
