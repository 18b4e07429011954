"""Weight averaging: the exponential moving average (EMA) of the weights that a run trains.

The optimiser continues with the last step's weights; checkpoints hold, and evaluations use, the average.
"""

from collections.abc import Sequence

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


def decay_at(decay: float, step: int) -> float:
    """Return the decay at a step: `(1 + step) / (10 + step)`, at most `decay`.

    It is smaller in the first steps, so that the average of a short run does not retain the initial weights.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def set_weights(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
