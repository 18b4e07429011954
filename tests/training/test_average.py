"""The moving average of the weights agrees with its recursion, and a checkpoint holds it."""

import torch
from torch import nn

from rayclip.training.average import Average, decay_at


def test_the_average_is_its_recursion():
    """Entry by entry in float64, over steps on both sides of the decay's warm-up."""
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(31, 5, generator=generator, dtype=torch.float64)
    p = nn.Parameter(path[0].clone())
    average = Average([p], 0.7)
    expected = path[0].tolist()
    for step in range(1, 31):
        with torch.no_grad():
            p.copy_(path[step])
        average.update(step)
        d = min(0.7, (1 + step) / (10 + step))
        expected = [d * old + (1 - d) * new for old, new in zip(expected, path[step].tolist(), strict=True)]
        assert torch.allclose(average.values[0], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert decay_at(0.7, 30) == 0.7 > decay_at(0.7, 1)
