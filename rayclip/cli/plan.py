"""`rayclip plan`: estimate the cost of an evaluation beforehand, and compare it with the actual cost afterwards."""

import json as jsons
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayclip.cli.options import hand_out, one_list
from rayclip.cli.request import Request, with_request
from rayclip.types import UserError

if TYPE_CHECKING:
    from rayclip.evaluation.forecast import Forecast, Spent

_WIDTH = 120  # characters, for tables that are not printed to a terminal


@with_request
def plan(
    asked: Request,
    workers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,N…", help="Foresee wall time and cost on so many workers.  [default: what the cluster holds]"
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of an hour of one GPU (without GPUs: of one core), in any currency.")
    ] = None,
    calibrate: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Measure for about so long what earlier results in --out say nothing about; 0 measures nothing.",
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
    table = _table("model", "attack", "data sets", "shards", "samples", "ms a sample", f"{unit} hours", "from")
    groups: dict[tuple[str, str], list[Any]] = {}
    for cell in plan.cells.values():
        groups.setdefault((cell.model, cell.attack), []).append(cell)
    for (model, attack), cells in sorted(groups.items(), key=lambda item: -sum(c.seconds for c in item[1])):
        samples, seconds = sum(c.samples for c in cells), sum(c.seconds for c in cells)
        basis = ", ".join(sorted({c.basis for c in cells}))
        shards = sum(c.shards for c in cells)
        numbers = (len(cells), shards, samples, f"{1000 * seconds / samples:.3g}")
        table.add_row(model, attack, *map(str, numbers), f"{seconds * plan.hardware.units / 3600:.3g}", basis)
    _print(table)
    table = _table("workers", "wall time", f"{unit} hours held", *(["cost"] if plan.price is not None else []))
    for each in plan.workers:
        cost = [] if each.cost is None else [f"{each.cost:.2f}"]
        table.add_row(str(each.workers), _duration(each.wall), f"{each.hours:.3g}", *cost)
    _print(table)


def _show_spent(plan: "Forecast", done: "list[Spent]", runs: list[dict[str, Any]]) -> None:
    unit = plan.hardware.unit
    table = _table("model", "attack", "samples", "done", f"planned {unit} hours", "actual", "actual/planned")
    for each in done:
        hours = (plan.hardware.units * seconds / 3600 for seconds in (each.planned, each.actual))
        # Compare with the plan for the finished samples only: the others are not savings
        share = each.planned * each.done / each.samples
        ratio = f"{each.actual / share:.2f}" if share else ""
        table.add_row(each.model, each.attack, str(each.samples), str(each.done), *(f"{h:.3g}" for h in hours), ratio)
    print("planned and actual:")
    _print(table)
    print(_sum_line(plan, done, runs))


def _sum_line(plan: "Forecast", done: "list[Spent]", runs: list[dict[str, Any]]) -> str:
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


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "attack", "from") else "right")
    return table


def _print(table: Any) -> None:
    from rayclip import terminal

    console = terminal.console()
    console.print(table, width=None if console.is_terminal else _WIDTH)
