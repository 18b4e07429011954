"""`rayclip eval`, `plan` and `retrieval`: attack models and print their accuracy or recall, and what it costs."""

import json as jsons
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rayclip.cli.command import FromZero, Positive
from rayclip.cli.options import (
    Logging,
    check_data,
    check_models,
    check_places,
    hand_out,
    print_grid,
    split,
    split_models,
)
from rayclip.cli.request import Request
from rayclip.names import attack_defaults, check_attacks
from rayclip.reports.grid import Cell, number_cell
from rayclip.reports.notes import heading
from rayclip.types import UserError
from rayclip.units import parse_budgets

if TYPE_CHECKING:
    from rayclip.evaluation.forecast import Forecast, PlanComparison


def evaluate(asked: Request, workers: Positive | None = None, local: bool = False) -> None:
    """Attack models and print a table of their clean and robust accuracy.

    \b
    Examples:
      rayclip eval --model digits --data digits --eps 32/255 --out results
      rayclip eval --model local-dir:OUT --data cifar10,food101 --attacks clean,pgd:steps=100,autoattack --eps 1/255 \\
        --out s3://BUCKET/results --cluster
      rayclip eval --model ViT-B-32:openai --data TEST.parquet --defense none,ttc --scorer template,ensemble \\
        --eps 4/255 --out results
      rayclip eval --model local-dir:OUT --protocol robustvlm --out results

    Args:
        workers: Evaluation actors, at most; a cluster's autoscaler is asked for their nodes.
            [default: a GPU, else a core, each, of all that the cluster has or may have]
        local: Evaluate in this process, without Ray: for small jobs and debuggers.
    """
    if local and (asked.cluster or workers is not None or asked.gpus_per_worker):
        raise UserError("--local has no workers: leave --cluster, --workers and --gpus-per-worker away.")
    from rayclip import progress
    from rayclip.cli import answers

    answer = answers.find(asked.words, asked.files, asked.out)
    if answer is not None:
        for level, sentence in answer.said:
            progress.say(level, sentence)
    else:
        from rayclip import api

        evaluation, where = asked.evaluation, asked.where(workers, local=local)
        with progress.listening() as said:
            rows = api.evaluate_models(asked.models, evaluation, where)
        answer = answers.Answer(rows, said)
        answers.keep(asked.words, asked.files, asked.out, answer)

    def show() -> None:
        show_rows(answer.rows)
        if asked.protocol:
            what = "; ".join(asked.differences)
            print(f"protocol {asked.protocol}" + (f", but for {what}" if what else ""))
        print(f"results: {asked.out}")
        say_spent(asked.out)

    from rayclip.reports.rows import rows_json, show_rows

    hand_out(asked.json, rows_json(answer.rows), show)


def retrieval(
    logging: Logging,
    model: Annotated[Sequence[str], typer.Option(metavar="MODEL")],
    data: str,
    out: str,
    attacks: Annotated[Sequence[str], typer.Option(metavar="ATTACKS")] = ("clean",),
    eps: Annotated[Sequence[str], typer.Option(metavar="N/255,…")] = (),
    steps: Positive = 10,
    step_size: str | None = None,
    substitutes: str = "default",
    seed: FromZero = 0,
    limit: Positive | None = None,
    resolution: Literal["native", "model"] = "model",
    resize: Literal["antialias", "plain"] = "antialias",
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel="Cluster")] = 128,
    json: Annotated[str | None, typer.Option(metavar="FILE")] = None,
    quiet: bool = False,
    json_logs: bool = False,
) -> None:
    """Evaluate recall at 1, 5, 10 of images' captions (TR) and captions' images (IR), clean and attacked.

    Args:
        data: Parquet with image and captions: a file, a folder with test*.parquet, or a prepared data set's name.
        attacks: Names with settings: clean,bert,pgd,sep,co-attack,sga:steps=10,step=0.5/255.
        step_size: Length of an attack step. [default: 1.25·eps/steps]
        limit: Use at most this many images, with all their captions.
        resolution: model: resize and take the centre; native: the images' own size, which must then be one.
        batch_size: Images per forward.
    """
    check_places(out, json)
    models, budgets = split_models(model), parse_budgets(eps)
    check_attacks(",".join(attacks), has_budget=bool(budgets), on_pairs=True)
    check_models(models)
    check_data([data], pairs=True)

    from rayclip import api
    from rayclip.attacks import parse_attacks
    from rayclip.distributed.resources import PoolSize
    from rayclip.reports.rows import rows_json

    defaults = attack_defaults(steps, step_size, substitutes) | {"stop": "final"}
    rows = api.evaluate_retrieval(
        models,
        data,
        api.Where(out=out, tracking=logging.tracking, pool=PoolSize(batch_size=batch_size), quiet=quiet),
        limit=limit,
        resolution=resolution,
        resize=resize,
        attacks=parse_attacks(",".join(attacks), defaults),
        eps=budgets,
        seed=seed,
    )

    def show() -> None:
        api.show_retrieval(rows)
        print(f"results: {out}")

    hand_out(json, rows_json(rows), show)


def plan(
    asked: Request,
    workers: Annotated[Sequence[str], typer.Option(metavar="N,N…")] = (),
    price: Annotated[float | None, typer.Option(min=0)] = None,
    calibrate: Annotated[float, typer.Option(min=0, metavar="SECONDS")] = 60.0,
) -> None:
    """Estimate what rayclip eval takes with the same arguments: cells, shards, GPU hours, wall time, cost.

    Only a few samples are evaluated, to measure their time. The plan is saved as plan.json beside the results: after
    the evaluation, the same command shows planned and actual cost side by side, and rayclip eval prints their sums.

    Args:
        workers: Estimate wall time and cost on these numbers of workers. [default: what the cluster holds]
        price: Price of an hour of one GPU (without GPUs: of one core), in any currency.
        calibrate: Measure for about this long what earlier results in --out do not cover; 0 measures nothing.
    """
    counts = parse_counts(workers)

    import dataclasses

    from rayclip import api

    where = asked.where(counts[0] if len(counts) == 1 else None)
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


def parse_counts(values: Sequence[str]) -> list[int]:
    """Parse `--workers 1,8,64`."""
    parts = split(values)
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--workers '{','.join(values)}' are not numbers of workers: write 8, or 1,8,64.")
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
        basis = ", ".join(sorted({c.basis for c in cells}))
        pace = 1000 * seconds / samples
        own = seconds * plan.hardware.units / 3600
        rows.append((model, heading(attack), len(cells), sum(c.shards for c in cells), samples, pace, own, basis))
    print_grid(("model", "attack", "data sets", "shards", "samples", "ms per sample", f"{unit} hours", "from"), rows)
    walls = []
    for each in plan.workers:
        cost = [] if each.cost is None else [number_cell(each.cost, ".2f")]
        wall = Cell(text=_duration(each.wall), value=each.wall)
        walls.append((str(each.workers), wall, each.hours, *cost))
    print_grid(("workers", "wall time", f"{unit} hours held", *["cost"] * (plan.price is not None)), walls)


def _show_spent(plan: "Forecast", done: "list[PlanComparison]", runs: list[dict[str, Any]]) -> None:
    unit = plan.hardware.unit
    rows = []
    for each in done:
        hours = [plan.hardware.units * seconds / 3600 for seconds in (each.planned, each.actual)]
        # Compare with the plan for the finished samples only: the others are not savings
        share = each.planned * each.done / each.samples
        ratio = number_cell(each.actual / share, ".2f") if share else Cell()
        rows.append((each.model, heading(each.attack), each.samples, each.done, *hours, ratio))
    print("planned and actual:")
    print_grid(("model", "attack", "samples", "done", f"planned {unit} hours", "actual", "actual/planned"), rows)
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
