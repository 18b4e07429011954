"""Weight averaging: the exponential moving average (EMA) of the weights that a run trains.

The optimiser continues with the last step's weights; checkpoints hold, and evaluations use, the average.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Exponential moving average of weights: `avg <- d·avg + (1-d)·weights` after every step, from the initial weights.

    Attributes:
        values: the averaged weights, in the order of the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
        """Update the average with the weights after `step` steps."""
        get_ema_multi_avg_fn(decay_at(self._decay, step))(self.values, list(self._parameters), step)

    @contextmanager
    def in_place(self) -> Iterator[list[Tensor]]:
        """Put the averaged weights into the model for the block; yield the last step's weights."""
        with weights_in_place(self._parameters, self.values) as last:
            yield last


@contextmanager
def weights_in_place(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give parameters other values for the block; yield their own."""
    last = [p.detach().clone() for p in parameters]
    set_weights(parameters, values)
    try:
        yield last
    finally:
        set_weights(parameters, last)


def decay_at(decay: float, step: int) -> float:
    """Return the decay at a step: `(1 + step) / (10 + step)`, at most `decay`.

    It is smaller in the first steps, so that the average of a short run does not retain the initial weights.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def set_weights(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
