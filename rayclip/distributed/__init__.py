"""Ray carries the work: the only room where `ray` is imported."""

from rayclip.distributed.connect import ray_cluster
from rayclip.distributed.pool import PoolSize, evaluate
from rayclip.distributed.trials import Trial, Workers, run_trials

__all__ = [
    "PoolSize",
    "Trial",
    "Workers",
    "evaluate",
    "ray_cluster",
    "run_trials",
]
