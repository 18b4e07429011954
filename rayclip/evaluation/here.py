"""Evaluate in this process, without Ray: small jobs, notebooks, debuggers. Result files are those of the actors."""

import time
from collections.abc import Sequence

from rayclip.evaluation.costs import Costs, PoolStatistics
from rayclip.evaluation.plan import Shards, record_name
from rayclip.evaluation.shard import Evaluator
from rayclip.progress import Display
from rayclip.types import UserError


def evaluate_here(work: Sequence[Shards], evaluator: Evaluator, display: Display, total: int) -> PoolStatistics:
    """Compute the verdicts of all shards, one after the other; what is written stays if this is interrupted.

    Args:
        work: shards that the store does not hold yet, model by model.
        total: samples of the whole evaluation, including those that have results already.

    Raises:
        UserError: see `Evaluator.run`; or the model gives no predictions.
    """
    store, costs, began = evaluator.store, Costs(), time.monotonic()
    left = {shards.cell.id: len(shards.positions) for shards in work}
    done, busy, loading = total - sum(left.values()), 0.0, 0.0
    costs.read((shards.cell for shards in work), store, evaluator.hardware)
    for shards in work:
        cell, missing = shards.cell, len(shards.positions)
        store.write_json(record_name(cell), cell.record())
        display.part(cell.id, cell.title, missing, 0)
        for shard in shards:
            try:
                answer = evaluator.run(shard)
            except FloatingPointError as error:
                raise UserError(str(error)) from error
            costs.add(cell, answer.samples, answer.seconds)
            busy, loading, done = busy + answer.seconds, loading + answer.loading, done + answer.samples
            left[cell.id] -= answer.samples
            seconds = sum(costs.seconds(each.cell) * left[each.cell.id] for each in work)
            note = f"{cell.attack_label}: accuracy {100 * answer.right / answer.samples:.0f} %"
            display.update("evaluating", done, total, note, seconds)
            display.part(cell.id, cell.title, missing, answer.samples)
    return PoolStatistics(
        hardware=evaluator.hardware,
        workers=1,
        wall=time.monotonic() - began,
        waited=0.0,
        busy=busy,
        loading=loading,
        copies=0,
        lost=0,
    )
