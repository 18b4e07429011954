"""Forecast an evaluation's time and price before it starts, and compare with the actual time afterwards."""

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rayclip.defenses import chain_label
from rayclip.evaluation.cell import Cell
from rayclip.evaluation.costs import Basis, Costs, Decoding, Hardware, read_timings
from rayclip.evaluation.plan import Shards, cut
from rayclip.evaluation.schedule import KEPT, Queue, Schedule
from rayclip.store import PLAN, Store
from rayclip.types import UserError

RUNS = "evaluations.json"
_SIMULATED = 100_000  # maximum shards; more of them fill any cluster evenly: wall time is total/N, or the longest shard


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """The outstanding part of one cell, and (`before`) the samples and seconds that its results had recorded before;
    what decoding its images takes, if that was measured."""

    model: str
    dataset: str
    attack: str
    samples: int
    shards: int
    seconds: float
    basis: Basis
    before: tuple[int, float] = (0, 0.0)
    decoding: Decoding | None = None


@dataclass(frozen=True, kw_only=True)
class OnWorkers:
    """Wall time and price of a plan on a number of workers."""

    workers: int
    wall: float  # seconds from start to end
    hours: float  # GPU (core) hours that are held during that time
    cost: float | None  # price of these hours; None if no price is known


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A plan: the outstanding cells with their estimated times."""

    hardware: Hardware  # of one worker
    cells: Mapping[str, PlannedCell]  # those with outstanding samples, by id
    finished: int  # number of cells that have every result
    loading: Mapping[str, float] = field(default_factory=dict)  # seconds to load each model, by fingerprint
    workers: Sequence[OnWorkers] = ()  # for each number that was asked for
    price: float | None = None  # of an hour of one GPU (core)
    memory: float = 0.0  # most bytes that a worker held while it was measured

    @property
    def shards(self) -> int:
        return sum(cell.shards for cell in self.cells.values())

    @property
    def samples(self) -> int:
        return sum(cell.samples for cell in self.cells.values())

    @property
    def seconds(self) -> float:
        """Return the seconds that one worker would take, without loading."""
        return sum(cell.seconds for cell in self.cells.values())

    @property
    def bound_by_decoding(self) -> list[PlannedCell]:
        """Return the cells whose attack waits for images, the longest first."""
        found = [cell for cell in self.cells.values() if cell.decoding is not None and cell.decoding.bounds]
        return sorted(found, key=lambda cell: -cell.seconds)

    @property
    def hours(self) -> float:
        """Return the busy GPU (core) hours, without loading and idle time."""
        return self.seconds * self.hardware.units / 3600

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(
    work: Sequence[Shards],
    costs: Costs,
    hardware: Hardware,
    *,
    workers: Sequence[int],
    finished: int,
    smallest: int,
    loading: Mapping[str, float] | None = None,
    start: float = 0.0,
    price: float | None = None,
    memory: float = 0.0,
    store: Store | None = None,
) -> Forecast:
    """Estimate the work's time and price by running it on simulated workers.

    Args:
        work: outstanding shards (`outstanding`).
        costs: estimates of the seconds per sample, from measurements.
        workers: numbers of workers to simulate; the shards of a cell are counted for the first of them.
        finished: number of cells that have every result.
        smallest: see `plan.cut`.
        loading: seconds to load each model, by fingerprint.
        start: seconds until a worker has started.
        price: of an hour of one GPU (core).
        memory: most bytes that a worker held while it was measured.
        store: the results so far; None if there are none.
    """
    loads = dict(loading or {})
    found = []
    for count in workers:
        queues = [piece.queue(costs.seconds(piece.cell)) for piece in cut(work, costs, count, smallest)]
        wall = start + simulate(queues, count, lambda model: loads.get(str(model), 0.0))
        hours = count * hardware.units * wall / 3600
        cost = None if price is None else price * hours
        found.append(OnWorkers(workers=count, wall=wall, hours=hours, cost=cost))
    first = cut(work, costs, workers[0], smallest)
    cells = {
        cell.id: PlannedCell(
            model=cell.model if not cell.defense else f"{cell.model} + {chain_label(cell.defense)}",
            dataset=cell.dataset,
            attack=cell.attack_label,
            samples=len(shards.positions),
            shards=sum(len(piece) for piece in first if piece.cell.id == cell.id),
            seconds=costs.seconds(cell) * len(shards.positions),
            basis=costs.basis(cell),
            before=(0, 0.0) if store is None else read_recorded(cell.id, store),
            decoding=costs.decoding(cell),
        )
        for shards in work
        for cell in [shards.cell]
    }
    return Forecast(
        hardware=hardware,
        cells=cells,
        finished=finished,
        loading=loads,
        workers=found,
        price=price,
        memory=memory,
    )


def simulate(queues: Sequence[Queue], workers: int, load: Callable[[Hashable], float]) -> float:
    """Return the seconds that workers need for all shards, if each takes as long as expected and none is lost.

    `load` returns the seconds to load a model that a worker has not loaded yet.
    """
    if sum(map(len, queues)) > _SIMULATED:
        total = sum(queue.seconds * queue.samples for queue in queues)
        return max(total / workers, max(queue.seconds * queue.samples_of(0) for queue in queues))
    schedule, now = Schedule(queues), 0.0
    loaded: list[list[Hashable]] = [[] for _ in range(workers)]  # models, the latest first
    ends = [(now, worker) for worker in range(workers)]
    for worker in range(workers):
        schedule.join(worker)
    while ends:
        now, worker = heapq.heappop(ends)
        if loaded[worker]:
            schedule.finish(worker)
        shard = schedule.start(worker, now) if schedule.queued else None
        if shard is not None:
            model, kept = queues[shard.cell].needs[0], loaded[worker]
            seconds = schedule.expected(shard) + (0.0 if model in kept else load(model))
            loaded[worker] = [model, *(other for other in kept if other != model)][:KEPT]
            heapq.heappush(ends, (now + seconds, worker))
    return now


@dataclass(frozen=True, kw_only=True)
class PlanComparison:
    """Planned and actual samples and worker seconds, over the cells of one model under one attack."""

    model: str
    attack: str
    cells: int
    samples: int
    planned: float
    done: int  # samples that results have recorded since
    actual: float  # worker seconds of these


def compare_with_plan(plan: Forecast, store: Store) -> list[PlanComparison]:
    """Return planned and actual numbers for every model and attack."""
    groups: dict[tuple[str, str], list[tuple[PlannedCell, int, float]]] = {}
    for name, cell in plan.cells.items():
        groups.setdefault((cell.model, cell.attack), []).append((cell, *read_recorded(name, store)))
    return [
        PlanComparison(
            model=model,
            attack=attack,
            cells=len(parts),
            samples=sum(cell.samples for cell, _, _ in parts),
            planned=sum(cell.seconds for cell, _, _ in parts),
            done=sum(max(0, min(samples - cell.before[0], cell.samples)) for cell, samples, _ in parts),
            actual=sum(max(0.0, seconds - cell.before[1]) for cell, _, seconds in parts),
        )
        for (model, attack), parts in groups.items()
    ]


def read_recorded(cell: str, store: Store) -> tuple[int, float]:
    """Return the number of a cell's samples that have results with timings, and the seconds of these results."""
    timings = read_timings(cell, store, files=None)
    return sum(timing.samples for timing in timings), sum(timing.seconds for timing in timings)


def keep_plan(plan: Forecast, store: Store) -> None:
    """Write the plan for a later comparison. For a cell that has begun, the earlier plan is kept."""
    if not plan.cells:
        return
    earlier = read_plan(store)
    cells = dict(earlier.cells) if earlier else {}
    begun = {name for name, cell in cells.items() if read_recorded(name, store)[0] > cell.before[0]}
    cells |= {name: cell for name, cell in plan.cells.items() if name not in begun}
    store.write_json(PLAN, {**plan.to_json(), "cells": {name: asdict(cell) for name, cell in cells.items()}})


def read_plan(store: Store) -> Forecast | None:
    """Return the plan that was kept; None if there is none. Raise a `UserError` if it is damaged."""
    stored = store.read(PLAN)
    try:
        return None if stored is None else TypeAdapter(Forecast).validate_json(stored)
    except ValidationError as error:
        raise UserError(f"{store.root}/{PLAN} is damaged: delete it and plan again.") from error


def common_hardware(cells: Iterable[Cell], store: Store) -> Hardware | None:
    """Return the hardware that most of the earlier results, by seconds, were computed with; None if unknown."""
    seconds: dict[Hardware, float] = {}
    for cell in cells:
        for timing in read_timings(cell.id, store):
            seconds[timing.hardware] = seconds.get(timing.hardware, 0.0) + timing.seconds
    return max(seconds, key=lambda hardware: seconds[hardware], default=None)
