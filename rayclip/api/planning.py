"""Estimate the cost of an evaluation beforehand, and compare it with the actual cost afterwards."""

from collections.abc import Sequence
from typing import Any

from rayclip.api.checks import Opened, plan_cells
from rayclip.api.request import Evaluation, Where
from rayclip.distributed import (
    calibrate,
    ray_cluster,
)
from rayclip.evaluation import Store, outstanding
from rayclip.evaluation import forecast as forecasts
from rayclip.evaluation.costs import Costs
from rayclip.evaluation.forecast import Forecast
from rayclip.progress import Display
from rayclip.types import UserError


def plan_evaluation(
    models: Sequence[str],
    evaluation: Evaluation,
    where: Where,
    *,
    workers: Sequence[int] = (),
    calibrate_s: float = 60.0,
    price: float | None = None,
) -> Forecast:
    """Estimate the cost of `evaluate_models` with the same arguments.

    The estimate is also written beside the results, to be compared later with the actual cost (`forecast.spent`).

    Args:
        workers: numbers of workers to estimate wall times for; empty means as many as fit on the cluster.
        calibrate_s: seconds to spend on measuring what earlier results do not cover; 0 does not start Ray.
        price: of one GPU hour, or of one core hour where there are no GPUs.

    Raises:
        UserError: bad arguments; or there are no earlier measurements and none may be made.
    """
    cells, positions = plan_cells(models, evaluation, Opened(quiet=where.quiet))
    store, costs, found = Store(where.out), Costs(), None
    work = outstanding(cells, positions, store, where.pool.shard_size)
    hardware = forecasts.common_hardware(cells, store)
    if hardware is not None:
        costs.read({cell.id: cell for cell in cells}.values(), store, hardware)
    if calibrate_s > 0 and any(costs.basis(shards.cell) != "measured" for shards in work):
        costs = Costs()
        with ray_cluster(cluster=where.cluster, verbose=where.verbose), Display(quiet=where.quiet) as display:
            found = calibrate(work, cells, costs, store, where.pool, seconds=calibrate_s, display=display)
        hardware = found.hardware
    if hardware is None or (work and not costs.measured):
        raise UserError("no earlier results say what this takes: let --calibrate measure for some seconds.")
    plan = forecasts.forecast(
        work,
        costs,
        hardware,
        workers=list(workers) or [found.wanted if found else 1],
        finished=len({cell.id for cell in cells}) - len(work),
        smallest=where.pool.smallest_shard,
        loading=found.loading if found else None,
        start=found.start if found else 0.0,
        price=price,
        before=lambda cell: forecasts.read_recorded(cell.id, store),
    )
    forecasts.keep_plan(plan, store)
    return plan


def spent(out: str) -> tuple[Forecast | None, list[forecasts.PlanComparison], list[dict[str, Any]]]:
    """Return a results folder's plan, its cells' actual beside planned cost, and the record of each evaluation."""
    store = Store(out)
    plan = forecasts.read_plan(store)
    return plan, [] if plan is None else forecasts.compare_with_plan(plan, store), store.read_json(forecasts.RUNS) or []
