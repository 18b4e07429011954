"""Measure how fast a training would go, by its first seconds."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from rayclip.training.config import TrainConfig
from rayclip.training.loop import Progress, train

_CPU_BATCH = 16  # images per step on a CPU, which is as fast with few, but for tiny models
_LONG_STEP = 5.0  # seconds
_PREPARED = 16  # images per class of methods that prepare all images first
_REPORTS = 2  # the first report is of one step, which is slower


def measure_rate(config: TrainConfig, device: torch.device) -> float:
    """Return the images per second that one process trains on, measured for about three seconds: with the recipe's
    batches on a GPU, and on a CPU where a step of these is not long."""
    batch = config.recipe.batch_size
    if device.type == "cuda" or batch <= _CPU_BATCH:
        return _measure(config, batch, device)
    rate = _measure(config, _CPU_BATCH, device)
    return rate if batch > _LONG_STEP * rate else _measure(config, batch, device)


def _measure(config: TrainConfig, batch_size: int, device: torch.device) -> float:
    host = _Stopwatch(device)
    recipe = dataclasses.replace(config.recipe, epochs=10_000, batch_size=batch_size)
    shots = min(config.shots or _PREPARED, _PREPARED) if config.method.prepares else config.shots
    with contextlib.suppress(_StopError):
        train(dataclasses.replace(config, recipe=recipe, shots=shots, save_every_epochs=10_000), host)
    return host.rate


class _StopError(Exception):
    """Ends a training that has been measured."""


class _Stopwatch:
    """A `Host` that stops the run as soon as it has a rate."""

    rank, world_size = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device, self.rate, self._reports = device, 0.0, 0

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        yield None

    def report(self, progress: Progress, save: Callable[[Path], None] | None) -> None:
        self.rate, self._reports = progress.images_per_second, self._reports + 1
        if self._reports == _REPORTS:
            raise _StopError
