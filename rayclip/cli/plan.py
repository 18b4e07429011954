"""`rayclip plan`: estimate the cost of an evaluation beforehand, and compare it with the actual cost afterwards."""

import json as jsons
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayclip.cli.options import hand_out, one_list
from rayclip.cli.request import Request, with_request
from rayclip.reports.grid import Cell, Grid, number_cell
from rayclip.reports.notes import heading
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.evaluation.forecast import Forecast, PlanComparison

_WIDTH = 120  # characters, for tables that are not printed to a terminal


@with_request
def plan(
    asked: Request,
    workers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,N…",
            help="Estimate wall time and cost on these numbers of workers.  [default: what the cluster holds]",
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0, help="Price of an hour of one GPU (without GPUs: of one core), in any currency."),
    ] = None,
    calibrate: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Measure for about this long what earlier results in --out do not cover; 0 measures nothing.",
        ),
    ] = 60.0,
) -> None:
    """Estimate what rayclip eval takes with the same arguments: cells, shards, GPU hours, wall time, cost.

    Only a few samples are evaluated, to measure their time. The plan is saved as plan.json beside the results: after
    the evaluation, the same command shows planned and actual cost side by side, and rayclip eval prints their sums.
    """
    counts = parse_counts(one_list(workers or []))

    import dataclasses

    from rayclip import api

    where = asked.where
    if len(counts) == 1:
        where = dataclasses.replace(where, pool=dataclasses.replace(where.pool, workers=counts[0]))
    found = api.plan_evaluation(
        asked.models, asked.evaluation, where, workers=counts, calibrate_s=calibrate, price=price
    )
    kept, done, runs = api.spent(where.out)
    answer = {**found.to_json(), "spent": [dataclasses.asdict(each) for each in done], "runs": runs}

    def show() -> None:
        _show(found)
        if kept is not None and any(each.done for each in done):
            _show_spent(kept, done, runs)

    hand_out(asked.json, jsons.dumps(answer, indent=1) + "\n", show)


def parse_counts(text: str | None) -> list[int]:
    """Parse `1,8,64`; None is the empty list."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--workers '{text}' are not numbers of workers: write 8, or 1,8,64.")
    return [int(part) for part in parts]


def say_spent(out: str) -> None:
    """Print one line with planned and actual cost, if the evaluation was planned."""
    from rayclip.store import PLAN, Store

    if Store(out).size(PLAN) is None:
        return

    from rayclip import api

    plan, done, runs = api.spent(out)
    if plan is None or not any(each.done for each in done):
        return
    print(f"planned: {_hours(plan.hardware, sum(e.planned for e in done))}; {_sum_line(plan, done, runs)}")


def _show(plan: "Forecast") -> None:
    unit = plan.hardware.unit
    print(
        f"{len(plan.cells) + plan.finished} cells, {plan.finished} of them done; to do: {plan.shards} shards, "
        f"{plan.samples} samples, {_hours(plan.hardware, plan.seconds)} on {plan.hardware}"
    )
    if not plan.cells:
        return
    groups: dict[tuple[str, str], list[Any]] = {}
    for cell in plan.cells.values():
        groups.setdefault((cell.model, cell.attack), []).append(cell)
    rows = []
    for (model, attack), cells in sorted(groups.items(), key=lambda item: -sum(c.seconds for c in item[1])):
        samples, seconds = sum(c.samples for c in cells), sum(c.seconds for c in cells)
        counts = [number_cell(n) for n in (len(cells), sum(c.shards for c in cells), samples)]
        times = [number_cell(x, ".3g") for x in (1000 * seconds / samples, seconds * plan.hardware.units / 3600)]
        basis = Cell(text=", ".join(sorted({c.basis for c in cells})))
        rows.append((model, [Cell(text=heading(attack)), *counts, *times, basis]))
    _print(("model", "attack", "data sets", "shards", "samples", "ms per sample", f"{unit} hours", "from"), rows)
    rows = []
    for each in plan.workers:
        wall = Cell(text=_duration(each.wall), value=each.wall)
        cost = [] if each.cost is None else [number_cell(each.cost, ".2f")]
        rows.append((str(each.workers), [wall, number_cell(each.hours, ".3g"), *cost]))
    _print(("workers", "wall time", f"{unit} hours held", *["cost"] * (plan.price is not None)), rows)


def _show_spent(plan: "Forecast", done: "list[PlanComparison]", runs: list[dict[str, Any]]) -> None:
    unit = plan.hardware.unit
    rows = []
    for each in done:
        counts = [number_cell(n) for n in (each.samples, each.done)]
        hours = [number_cell(plan.hardware.units * x / 3600, ".3g") for x in (each.planned, each.actual)]
        # Compare with the plan for the finished samples only: the others are not savings
        share = each.planned * each.done / each.samples
        ratio = number_cell(each.actual / share, ".2f") if share else Cell()
        rows.append((each.model, [Cell(text=heading(each.attack)), *counts, *hours, ratio]))
    print("planned and actual:")
    _print(("model", "attack", "samples", "done", f"planned {unit} hours", "actual", "actual/planned"), rows)
    print(_sum_line(plan, done, runs))


def _sum_line(plan: "Forecast", done: "list[PlanComparison]", runs: list[dict[str, Any]]) -> str:
    actual = _hours(plan.hardware, sum(each.actual for each in done))
    parts = [f"took {actual} for {sum(e.done for e in done)} of {sum(e.samples for e in done)} samples"]
    if runs:
        last = runs[-1]
        planned = [each for each in plan.workers if each.workers == last["workers"]]
        beside = f" (planned: {_duration(planned[0].wall)})" if planned else ""
        parts.append(f"last run {_duration(last['wall'])} on {last['workers']} workers{beside}")
    return "; ".join(parts)


def _hours(hardware: Any, seconds: float) -> str:
    return f"{seconds * hardware.units / 3600:.3g} {hardware.unit} hours"


def _duration(seconds: float) -> str:
    """Format a duration as `45 s`, `12 min`, `3 h 20 min` or `2 d 4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _print(header: tuple[str, ...], rows: list[tuple[str, list[Cell]]]) -> None:
    from rayclip.reports.to_terminal import show

    show([Grid(title="", header=header, rows=rows)], width=_WIDTH)
