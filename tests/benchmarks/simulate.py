"""Run the schedule on simulated workers that are late or lost: without models or Ray, a week takes seconds."""

import heapq
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from rayclip.evaluation.schedule import KEPT, Queue, Schedule, ShardId

_LOOK_S = 1.0  # between two checks for late shards while workers are idle


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
