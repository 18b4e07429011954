"""Run evaluation, training and captioning on Ray. This is the only package that imports `ray`."""

import importlib
from typing import TYPE_CHECKING, Any

from rayclip.distributed.calibration import calibrate
from rayclip.distributed.connect import cluster_holds, ray_cluster
from rayclip.distributed.pool import Ran, evaluate
from rayclip.distributed.resources import PoolSize
from rayclip.distributed.session import surroundings

if TYPE_CHECKING:
    from rayclip.distributed.search import Validation, run_search, waiting
    from rayclip.distributed.trials import Trial, Workers, forgotten, keep_precision, run_trials, with_precision

__all__ = [
    "PoolSize",
    "Ran",
    "Trial",
    "Validation",
    "Workers",
    "calibrate",
    "cluster_holds",
    "evaluate",
    "forgotten",
    "keep_precision",
    "ray_cluster",
    "run_search",
    "run_trials",
    "surroundings",
    "waiting",
    "with_precision",
]


_TRAINING = {
    **dict.fromkeys(("Validation", "run_search", "waiting"), "rayclip.distributed.search"),
    **dict.fromkeys(
        ("Trial", "Workers", "forgotten", "keep_precision", "run_trials", "with_precision"),
        "rayclip.distributed.trials",
    ),
}


def __getattr__(name: str) -> Any:
    """Import Ray Train and Tune on first use: they are a third of all imports, and evaluation actors need neither."""
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(_TRAINING[name]), name)
