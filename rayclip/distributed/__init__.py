"""Run evaluation, training and captioning on Ray. This is the only package that imports `ray`.

Its modules are imported on first use: Ray reads the variables that `ray_cluster` sets when it is imported itself, and
Ray Train and Tune are a third of all imports, which evaluation actors do not need.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayclip.distributed.calibration import calibrate
    from rayclip.distributed.connect import describe_cluster, ray_cluster
    from rayclip.distributed.pool import PoolStatistics, evaluate
    from rayclip.distributed.resources import PoolSize
    from rayclip.distributed.search import Validation, run_search, unfinished_trials
    from rayclip.distributed.session import check_environment
    from rayclip.distributed.trials import Trial, Workers, find_abandoned_runs, resolve_precision, save_precision
    from rayclip.distributed.tuning import run_trials

__all__ = [
    "PoolSize",
    "PoolStatistics",
    "Trial",
    "Validation",
    "Workers",
    "calibrate",
    "check_environment",
    "describe_cluster",
    "evaluate",
    "find_abandoned_runs",
    "ray_cluster",
    "resolve_precision",
    "run_search",
    "run_trials",
    "save_precision",
    "unfinished_trials",
]

_MODULES = {
    "calibration": ("calibrate",),
    "connect": ("describe_cluster", "ray_cluster"),
    "pool": ("PoolStatistics", "evaluate"),
    "resources": ("PoolSize",),
    "search": ("Validation", "run_search", "unfinished_trials"),
    "session": ("check_environment",),
    "trials": ("Trial", "Workers", "find_abandoned_runs", "resolve_precision", "save_precision"),
    "tuning": ("run_trials",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
