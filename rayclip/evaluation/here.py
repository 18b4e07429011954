"""Evaluate in this process, without Ray: small jobs, notebooks, debuggers. Result files are those of the actors."""

import time
from collections.abc import Sequence

from rayclip.data.leases import Leases
from rayclip.evaluation.costs import Costs, PoolStatistics
from rayclip.evaluation.plan import Shards, missing_samples, record_name
from rayclip.evaluation.shard import Evaluator
from rayclip.evaluation.waiting import DataWait
from rayclip.progress import Display
from rayclip.types import UserError


def evaluate_here(
    work: Sequence[Shards], evaluator: Evaluator, display: Display, total: int, leases: Leases | None = None
) -> PoolStatistics:
    """Compute the verdicts of all shards, one after the other; what is written stays if this is interrupted.

    Args:
        work: shards that the store does not hold yet, model by model.
        total: samples of the whole evaluation, including those that have results already.
        leases: on the cells; other commands get some of those that they wait for, which are then left out.

    Raises:
        UserError: see `Evaluator.run`; or the model gives no predictions.
    """
    store, costs, began = evaluator.store, Costs(), time.monotonic()
    left = missing_samples(work)
    missing_of = dict(left)
    waits, on_gpu = DataWait("evaluation"), bool(evaluator.hardware.gpus)
    done, busy, loading = total - sum(left.values()), 0.0, 0.0
    costs.read((shards.cell for shards in work), store, evaluator.hardware)
    begun, given = set[str](), set[str]()
    for shards in work:
        cell, missing = shards.cell, missing_of[shards.cell.id]
        if leases is not None and cell.id not in begun | given:
            begun.add(cell.id)
            given |= leases.give([each.cell.id for each in work if each.cell.id not in begun | given])
        if cell.id in given:
            continue
        store.write_json(record_name(cell), cell.record())
        display.part(cell.id, cell.title, missing, 0)
        for shard in shards:
            try:
                answer = evaluator.run(shard)
            except FloatingPointError as error:
                raise UserError(str(error)) from error
            costs.add(cell, answer.samples, answer.seconds, answer.reading)
            waits.add(answer.reading.waiting, answer.seconds, on_gpu=on_gpu)
            busy, loading, done = busy + answer.seconds, loading + answer.loading, done + answer.samples
            left[cell.id] -= answer.samples
            seconds = sum(costs.seconds(each.cell) * left[each.cell.id] for each in work if each.cell.id not in given)
            if leases is not None and not left[cell.id]:
                leases.release([cell.id])
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
