"""The train loop of one process. `rayclip.distributed` runs it on several processes and machines."""

from rayclip.training.config import TrainConfig
from rayclip.training.loop import Host, Progress, train

__all__ = ["Host", "Progress", "TrainConfig", "train"]
