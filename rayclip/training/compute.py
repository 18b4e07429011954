"""Count what a training computes, in forward passes of one image through the model's image encoder."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from rayclip.data import few_shot, open_data
from rayclip.models import load_model
from rayclip.training.config import TrainConfig
from rayclip.training.loop import Progress, train

_PREPARED = 16  # images per class of methods that prepare all images first


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a training computes, in forward passes of one image: floating-point operations of all matrix products,
    convolutions and attention, forward and backward, of both encoders and of the original model, divided by those of
    one image's forward pass. A backward pass to the pixels is about one more, one to all weights about two.

    Attributes:
        start: before the first step: the class prompts of a frozen text encoder, and images that are prepared.
        step: of a step on a whole batch.
        batch: images of a step.
        steps_per_epoch: number of steps.
    """

    start: float
    step: float
    batch: int
    steps_per_epoch: int

    @property
    def per_image(self) -> float:
        return self.step / self.batch

    def of(self, steps: int) -> float:
        """Return the compute of so many steps."""
        return self.start + steps * self.step

    def steps_within(self, budget: float) -> int:
        """Return the number of steps whose compute is nearest to the budget, at least 1."""
        return max(1, round((budget - self.start) / self.step))


def count_compute(config: TrainConfig, device: torch.device) -> Compute:
    """Count a run's compute by its first two steps, which are trained and thrown away.

    Of a method that prepares its images first, only some of them are prepared.
    """
    data, recipe, shots = open_data(config.data, "train", config.names), config.recipe, config.shots
    if config.method.prepares:
        shots = min(shots or _PREPARED, _PREPARED)
    images, few = (len(few_shot(data, each, config.seed)) for each in (config.shots, shots))
    clip = load_model(config.model, device)
    with _all_counted() as counter, torch.no_grad():
        clip.encode_image(torch.zeros(1, 3, clip.image_size, clip.image_size, device=device))
    unit = counter.get_total_flops()
    short = dataclasses.replace(recipe, epochs=2, batch_size=min(recipe.batch_size, few))
    with _all_counted() as counter:
        host = _Accountant(device, counter)
        with contextlib.suppress(_StopError):
            config = dataclasses.replace(config, recipe=short, shots=shots, validate=None, eps_warmup=0.0)
            train(dataclasses.replace(config, save_every_steps=1, compiled=False, accumulate=1), host)
    first, second = (flops / unit for flops in host.flops)
    step, batch = second - first, -(-few // -(-few // short.batch_size))
    steps_per_epoch = -(-images // recipe.batch_size)
    whole = images / steps_per_epoch
    return Compute(
        start=(first - step) * images / few,
        step=step * whole / batch,
        batch=round(whole),
        steps_per_epoch=steps_per_epoch,
    )


@contextlib.contextmanager
def _all_counted() -> Iterator[FlopCounterMode]:
    """Count operations; without torch's fused attention for inference, which counters do not know."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _StopError(Exception):
    """Ends a training that has been counted."""


class _Accountant:
    """A `Host` that notes the operations so far after each of two steps, then stops the run."""

    rank, world_size = 0, 1

    def __init__(self, device: torch.device, counter: FlopCounterMode) -> None:
        self.device, self.flops, self._counter = device, list[int](), counter

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        yield None

    def report(self, progress: Progress, save: Callable[[Path], None] | None) -> None:
        self.flops.append(self._counter.get_total_flops())
        if len(self.flops) == 2:
            raise _StopError
