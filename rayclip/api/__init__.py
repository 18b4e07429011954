"""The Python interface: fine-tune, sweep, search and evaluate. The command line and `sweeps/` use it too.

All arguments are validated before Ray starts and before a file is written.
"""

from rayclip.api.evaluating import compare, evaluate_models, plan_evaluation, spent
from rayclip.api.request import Evaluation, Tracking, Where
from rayclip.api.retrieval import evaluate_retrieval, show_retrieval
from rayclip.api.training import Found, SweepResult, fine_tune, fine_tune_seeds, itself, search, show_search, sweep

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
    "search",
    "show_retrieval",
    "show_search",
    "spent",
    "sweep",
]
