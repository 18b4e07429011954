"""The train loop of one process; what carries it over processes and machines is in `rayclip.distributed`."""

from rayclip.training.config import TrainConfig
from rayclip.training.loop import Host, Progress, train

__all__ = ["Host", "Progress", "TrainConfig", "train"]
