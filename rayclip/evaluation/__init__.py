"""Evaluation: cells and their shards, verdicts on disk, and the numbers computed from them."""

from rayclip.evaluation.aggregate import collect_rows, wilson
from rayclip.evaluation.cell import Cell, Protocol, make_cells
from rayclip.evaluation.plan import Shard, Shards, chosen_positions, missing_shards, outstanding
from rayclip.evaluation.shard import Evaluator
from rayclip.store import Store

__all__ = [
    "Cell",
    "Evaluator",
    "Protocol",
    "Shard",
    "Shards",
    "Store",
    "chosen_positions",
    "collect_rows",
    "make_cells",
    "missing_shards",
    "outstanding",
    "wilson",
]
