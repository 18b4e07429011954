"""The Python interface, which the command line and `sweeps/` use too; `import rayclip` offers the part for notebooks.

All arguments are validated before Ray starts and before a file is written. Names are imported when they are asked for:
what needs no Ray imports none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayclip.api.evaluating import compare, evaluate_models, plan_evaluation, spent
    from rayclip.api.refereeing import referee
    from rayclip.api.request import Evaluation, Tracking, Where
    from rayclip.api.retrieval import evaluate_retrieval, show_retrieval
    from rayclip.api.training import Found, SweepResult, fine_tune, fine_tune_seeds, itself, search, show_search, sweep

_PLACES = {
    "evaluating": ("compare", "evaluate_models", "plan_evaluation", "spent"),
    "refereeing": ("referee",),
    "request": ("Evaluation", "Tracking", "Where"),
    "retrieval": ("evaluate_retrieval", "show_retrieval"),
    "training": ("Found", "SweepResult", "fine_tune", "fine_tune_seeds", "itself", "search", "show_search", "sweep"),
}
_PLACE = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Evaluation",
    "Found",
    "SweepResult",
    "Tracking",
    "Where",
    "compare",
    "evaluate_models",
    "evaluate_retrieval",
    "fine_tune",
    "fine_tune_seeds",
    "itself",
    "plan_evaluation",
    "referee",
    "search",
    "show_retrieval",
    "show_search",
    "spent",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rayclip.api.{_PLACE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACE})
