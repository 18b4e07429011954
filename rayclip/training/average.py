"""Weight averaging: the exponential moving average of the weights that a run trains.

The optimiser goes on with the last step's weights; the average is what a checkpoint holds and what is evaluated.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """`avg <- d·avg + (1-d)·weights` after every step, from the initial weights on.

    Attributes:
        values: the average, in the order of the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        torch._foreach_lerp_(self.values, list(self._parameters), 1 - decay_at(self._decay, step))

    @contextmanager
    def in_place(self) -> Iterator[list[Tensor]]:
        """The model has the averaged weights meanwhile; gives the last step's."""
        last = [p.detach().clone() for p in self._parameters]
        set_weights(self._parameters, self.values)
        try:
            yield last
        finally:
            set_weights(self._parameters, last)


def decay_at(decay: float, step: int) -> float:
    """`decay`, and less in the first steps, `(1 + step) / (10 + step)`: a short run must not average itself with where
    it began."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def set_weights(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
