"""The schedule against simulated workers: what the driver of a large cluster would need, and how well it fills it.

    python tests/benchmarks/scheduling.py                 # a minute
    python tests/benchmarks/scheduling.py --shards 10000 --workers 2000

Nothing is attacked here: shards are durations. Cells are models × data sets × attacks; what a sample takes is spread
log-normally over the models (sigma 0.8), the data sets (0.4) and the attacks (1.0), so that a shard of 256 images takes
5 minutes on average; what it really takes is spread around what was planned (0.2). The planner cuts long shards, so
that there are more of them in the end. One worker in a hundred vanishes at a random time, which is noticed 10 s later,
and is replaced another 120 s later. Loading a model takes 10 s, which the lower bound max(total/N, longest) does not
know.

The last line is the planner: what is outstanding of 1,280 cells of a million shards is found in a store, cut, priced
and foreseen on 2,000 workers.
"""

import argparse
import heapq
import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayclip.attacks.pgd import PGD
from rayclip.data import open_data
from rayclip.evaluation import Cell, Protocol, Store, make_cells, outstanding
from rayclip.evaluation.costs import Costs, Hardware
from rayclip.evaluation.forecast import Forecast, forecast
from rayclip.evaluation.plan import cut_cells
from rayclip.evaluation.schedule import KEPT, Queue, Schedule, ShardId

_LOOK_S = 1.0  # between two checks for late shards while workers are idle
DRIVER_BYTES = 2e9 / 1e6  # of the driver for each shard
OVERHEAD = 0.01  # of the simulated time
BOUND = 1.05  # × max(total/N, longest)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The simulated workers. Times are in seconds.

    Attributes:
        count: number of workers at the start.
        load: time to load what a worker has not loaded yet, by the coarsest need (the model).
        vanish: times at which workers are lost, by number from 0; numbers from `count` on are replacements.
        notice: time until the schedule learns of a loss.
        replace: time from then until a new worker has started; None for never.
    """

    count: int
    load: Callable[[Hashable], float] = lambda need: 0.0
    vanish: Mapping[int, float] | None = None
    notice: float = 10.0
    replace: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a simulated run. Times are simulated seconds.

    Attributes:
        makespan: time until the last shard ended.
        work: total time of all shards, each counted once.
        loading: total time that workers spent loading models.
        copies: second copies started because a shard was late.
        losses: shards that were started again because their worker was lost.
        ends: how often each shard counted as done, by cell.
    """

    makespan: float
    work: float
    loading: float
    copies: int
    losses: int
    ends: Sequence[bytearray]


def simulate(
    queues: Sequence[Queue],
    workers: Workers,
    duration: Callable[[ShardId, int], float] | None = None,
    schedule: type[Schedule] = Schedule,
) -> Outcome:
    """Simulate the schedule until every shard is done.

    Args:
        duration: true seconds of a shard on a worker; None is the duration that its queue expects.
    """
    return _Run(queues, workers, duration, schedule(queues)).to_the_end()


class _Run:
    def __init__(
        self,
        queues: Sequence[Queue],
        workers: Workers,
        duration: Callable[[ShardId, int], float] | None,
        schedule: Schedule,
    ) -> None:
        self.queues, self.workers, self.schedule = queues, workers, schedule
        self.duration = duration or (lambda shard, worker: self.schedule.expected(shard))
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[int], None], int]] = []
        self.posted = 0
        self.idle: list[int] = []
        self.loaded: dict[int, list[Hashable]] = {}  # by worker, for the workers that are alive
        self.took: dict[int, float] = {}  # duration of each worker's current shard
        self.work = self.loading = 0.0
        self.ends = [bytearray(len(queue)) for queue in queues]
        self.looking = False

    def to_the_end(self) -> Outcome:
        for worker in range(self.workers.count):
            self.post(0.0, self.join, worker)
        for worker, when in (self.workers.vanish or {}).items():
            self.post(when, self.vanish, worker)
        self.born = self.workers.count
        while not self.schedule.done:
            self.now, _, happen, worker = heapq.heappop(self.events)
            happen(worker)
            self.feed()
        return Outcome(
            makespan=self.now,
            work=self.work,
            loading=self.loading,
            copies=self.schedule.copies,
            losses=self.schedule.lost,
            ends=self.ends,
        )

    def post(self, after: float, happen: Callable[[int], None], worker: int) -> None:
        self.posted += 1
        heapq.heappush(self.events, (self.now + after, self.posted, happen, worker))

    def join(self, worker: int) -> None:
        self.schedule.join(worker)
        self.loaded[worker] = []
        self.idle.append(worker)

    def end(self, worker: int) -> None:
        if worker not in self.loaded:
            return
        shard = self.schedule.finish(worker)
        if shard is not None:
            self.ends[shard.cell][shard.number] += 1
            self.work += self.took[worker]
        self.idle.append(worker)

    def vanish(self, worker: int) -> None:
        if self.loaded.pop(worker, None) is not None:
            self.idle = [other for other in self.idle if other != worker]
            self.post(self.workers.notice, self.notice, worker)

    def notice(self, worker: int) -> None:
        self.schedule.leave(worker)
        if self.workers.replace is not None:
            self.post(self.workers.replace, self.join, self.born)
            self.born += 1

    def look(self, _: int) -> None:
        self.looking = False

    def feed(self) -> None:
        while self.idle:
            worker = self.idle[-1]
            shard = self.schedule.start(worker, self.now)
            if shard is None:
                if not self.looking and not self.schedule.done:
                    self.looking = True
                    self.post(max(_LOOK_S, self.now / 1000), self.look, -1)
                return
            self.idle.pop()
            self.took[worker] = self.duration(shard, worker)
            self.post(self.load(worker, shard) + self.took[worker], self.end, worker)

    def load(self, worker: int, shard: ShardId) -> float:
        need, kept = self.queues[shard.cell].needs[:1], self.loaded[worker]
        seconds = 0.0 if not need or need in kept else self.workers.load(need[0])
        self.loading += seconds
        self.loaded[worker] = [need, *(other for other in kept if other != need)][:KEPT]
        return seconds


@dataclass(frozen=True, kw_only=True)
class Result:
    outcome: Outcome
    bound: float
    real: float
    deciding: float

    @property
    def over_bound(self) -> float:
        return self.outcome.makespan / self.bound

    @property
    def overhead(self) -> float:
        """Of the makespan: the driver decides while all workers run."""
        return self.real / self.outcome.makespan


def make_queues(
    shards: int,
    rng: np.random.Generator,
    *,
    workers: int,
    size: int = 256,
    mean_s: float = 300.0,
    kinds: Sequence[int] = (10, 16, 8),
) -> list[Queue]:
    """About `shards` shards of `mean_s` seconds on average, before long ones are cut as the planner does."""
    spread = [rng.lognormal(0, sigma, n) for sigma, n in zip((0.8, 0.4, 1.0), kinds, strict=True)]
    cells = list(itertools.product(*(range(n) for n in kinds)))
    seconds = np.array([np.prod([s[i] for s, i in zip(spread, cell, strict=True)]) for cell in cells])
    sets = rng.lognormal(0, 0.5, kinds[1])  # how large the data sets are
    samples = np.array([sets[cell[1]] for cell in cells])
    samples = np.maximum(1, samples / samples.sum() * (shards - len(cells) / 2) * size).astype(int)
    seconds *= mean_s * shards / (seconds * samples).sum()
    pieces = cut_cells(samples.tolist(), seconds.tolist(), [size] * len(cells), workers, size // 16)
    return [
        Queue(samples=n, size=each, needs=(cell[0], cell[1]), seconds=float(s))
        for cell, s, parts in zip(cells, seconds, pieces, strict=True)
        for n, each in parts
    ]


def measure(queues: Sequence[Queue], count: int, rng: np.random.Generator, *, loss: float = 0.01) -> Result:
    noise = [rng.lognormal(0, 0.2, len(queue)).astype(np.float32) for queue in queues]

    def duration(shard: ShardId, worker: int) -> float:
        queue = queues[shard.cell]
        return queue.seconds * queue.samples_of(shard.number) * float(noise[shard.cell][shard.number])

    every = [duration(ShardId(c, n), 0) for c, queue in enumerate(queues) for n in range(len(queue))]
    total, longest = sum(every), max(every)
    bound = max(total / count, longest)
    del every
    lost = rng.choice(count, round(loss * count), replace=False)
    workers = Workers(
        count=count,
        load=lambda model: 10.0,
        vanish={int(w): float(rng.uniform(0, bound)) for w in lost},
        replace=120.0,
    )
    began = time.process_time()
    Timed.deciding = 0.0
    outcome = simulate(queues, workers, duration, Timed)
    return Result(outcome=outcome, bound=bound, real=time.process_time() - began, deciding=Timed.deciding)


class Timed(Schedule):
    """A schedule that measures the real seconds that its decisions take."""

    deciding = 0.0

    def start(self, worker, now):
        began = time.perf_counter()
        try:
            return super().start(worker, now)
        finally:
            Timed.deciding += time.perf_counter() - began

    def finish(self, worker):
        began = time.perf_counter()
        try:
            return super().finish(worker)
        finally:
            Timed.deciding += time.perf_counter() - began


def plan(shards: int, workers: int, rng: np.random.Generator) -> tuple[Forecast, float]:
    """A plan of about so many shards, and the real seconds that it took."""
    some = tiny_cells(10, 16, 8)
    samples = rng.lognormal(0, 0.5, 16)
    samples = (samples / samples.sum() * shards / (10 * 8) * 256).astype(int)
    positions = {cell.data: np.arange(samples[number // 8 % 16]) for number, cell in enumerate(some)}
    with tempfile.TemporaryDirectory() as place:
        store, costs = Store(place), Costs()
        for cell in some[::3]:
            costs.add(cell, 256, float(rng.lognormal(0, 1.0)))
        began = time.perf_counter()
        work = outstanding(some, positions, store, 256)
        hardware = Hardware(name="H100", gpus=1.0, cores=1)
        found = forecast(work, costs, hardware, workers=[workers], finished=0, smallest=16, price=2.5)
        return found, time.perf_counter() - began


def tiny_cells(models: int, datasets: int, attacks: int) -> list[Cell]:
    """Cells of nothing, which differ as real ones do."""
    chosen = [PGD(steps=10 * (n + 1)) for n in range(attacks)]
    (any_cell,) = make_cells([("m", "m")], [("digits", open_data("digits", "test"))], chosen[:1], Protocol(eps=1 / 255))
    return [
        replace(any_cell, model_fingerprint=f"m{m}", data=f"d{d}", data_fingerprint=f"d{d}", attack=attack)
        for m, d, attack in itertools.product(range(models), range(datasets), chosen)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    cases = [(10_000, 100), (10_000, 500), (10_000, 1000), (10_000, 2000), (1_000_000, 2000)]
    if args.shards or args.workers:
        cases = [(args.shards or 10_000, args.workers or 2000)]
    print("shards     workers  makespan     /bound        deciding      loop     lost  copies  peak memory")
    for shards, count in cases:
        for seed in range(args.seeds if shards < 100_000 else 1):
            rng = np.random.default_rng(seed)
            queues = make_queues(shards, rng, workers=count)
            r = measure(queues, count, rng)
            o = r.outcome
            assert all(set(ends) == {1} for ends in o.ends), "every shard counts once"
            print(
                f"{sum(map(len, queues)):<10} {count:<8} {o.makespan:<9.0f} s  {r.over_bound:<7.4f}  "
                f"{r.deciding:6.2f} s ({r.deciding / o.makespan:.3%})  {r.real:6.2f} s  {o.losses:<5} {o.copies:<6}  "
                f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
            )
    if not (args.shards or args.workers):
        found, seconds = plan(1_000_000, 2000, np.random.default_rng(0))
        (foreseen,) = found.workers
        print(
            f"planned: {len(found.cells)} cells, {found.shards} shards, {foreseen.wall:.0f} s on {foreseen.workers} "
            f"workers; in {seconds:.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
        )


if __name__ == "__main__":
    main()
