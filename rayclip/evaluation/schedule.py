"""Who runs which shard: decisions only, without Ray, models or a clock of its own.

Shards wait in their cells; a decision looks at a few heaps of cells, never at all shards. Whoever drives the schedule
(`distributed.pool` with real actors, `simulate` with invented ones) tells it what happens and asks what to do.
"""

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

KEPT = 4  # models, and class embeddings, that a worker keeps loaded
_LONG, _NEARLY = 0.25, 0.8  # of the longest shard: so long a warm one is as good, at first and near the end
_OVERDUE = 1.5  # times its expected duration: a shard that runs so long gets a second copy


class ShardId(NamedTuple):
    """Shard `number` of cell `cell`, both counted from 0."""

    cell: int
    number: int


class Loss(NamedTuple):
    """A shard that went back to the queue, for the `times`-th time."""

    shard: ShardId
    times: int


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The shards of one cell.

    Attributes:
        samples: to be cut into shards.
        size: samples of a shard; the last one has the rest.
        needs: what a worker must have loaded, from coarse to fine: the model, its class embeddings.
        seconds: that one sample is expected to take; any unit that all queues share.
    """

    samples: int
    size: int
    needs: tuple[Hashable, ...]
    seconds: float

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def samples_of(self, number: int) -> int:
        return min(self.size, self.samples - number * self.size)


@dataclass(eq=False)
class _Cell:
    queue: Queue
    seconds: float
    fresh: int = 0  # shards before this one were handed out
    back: list[int] = field(default_factory=list)  # and these came back
    entry: int = 0  # only the newest entry in a heap counts

    @property
    def waiting(self) -> bool:
        return bool(self.back) or self.fresh < len(self.queue)

    @property
    def next(self) -> int:
        return self.back[-1] if self.back else self.fresh

    def length(self, number: int) -> float:
        return self.seconds * self.queue.samples_of(number)


@dataclass(eq=False)
class _Worker:
    recent: list[tuple[Hashable, ...]] = field(default_factory=list)  # what it has loaded, latest first
    shard: ShardId | None = None
    since: float = 0.0


class Schedule:
    """Shards to workers: longest first, what is loaded preferred, lost ones again, late ones twice.

    A worker takes the longest shard that needs what it has loaded, unless that is short beside the longest of all: the
    short ones are kept for the end, which they fill. Once the longest takes more than half of the time that is left,
    only a nearly as long one is preferred to it.

    Times are the caller's, in seconds from any start.
    """

    def __init__(self, queues: Sequence[Queue]) -> None:
        self._cells = [_Cell(queue, queue.seconds) for queue in queues]
        self._workers: dict[Hashable, _Worker] = {}
        self._running: dict[ShardId, list[Hashable]] = {}  # shards that are not done, with who runs them
        self._losses: dict[ShardId, int] = {}
        self._heaps: dict[tuple[Hashable, ...], list[tuple[float, int, int]]] = {}  # by prefix of `needs`
        self.queued = sum(len(queue) for queue in queues)
        self.copies = 0  # shards that were started once more because they were late
        self.lost = 0  # shards that came back
        self._queued_s = 0.0
        self.reprice([queue.seconds for queue in queues])

    @property
    def done(self) -> bool:
        return not self.queued and not self._running

    @property
    def running(self) -> int:
        """Shards, not copies."""
        return len(self._running)

    def join(self, worker: Hashable) -> None:
        """A new worker; it has nothing loaded."""
        self._workers[worker] = _Worker()

    def idle(self) -> list[Hashable]:
        return [name for name, worker in self._workers.items() if worker.shard is None]

    def leave(self, worker: Hashable) -> Loss | None:
        """A worker is gone. What it ran goes back to the queue, unless that is done or runs elsewhere too."""
        shard = self._workers.pop(worker).shard
        return None if shard is None else self._give_back(shard, worker)

    def fail(self, worker: Hashable) -> Loss | None:
        """A worker could not finish its shard and is free again."""
        state = self._workers[worker]
        shard, state.shard = state.shard, None
        assert shard is not None, "it was not running anything"
        return self._give_back(shard, worker)

    def finish(self, worker: Hashable) -> ShardId | None:
        """A worker has finished its shard and is free; the shard, or None if another worker's copy was first."""
        state = self._workers[worker]
        shard, state.shard = state.shard, None
        assert shard is not None, "it was not running anything"
        return None if self._running.pop(shard, None) is None else shard

    def start(self, worker: Hashable, now: float) -> ShardId | None:
        """What a free worker runs next; None if there is nothing for it to do at the moment."""
        state = self._workers[worker]
        assert state.shard is None, "it is not free"
        shard = self._take(state) if self.queued else self._late(now)
        if shard is None:
            return None
        self.copies += shard in self._running
        self._running.setdefault(shard, []).append(worker)
        state.shard, state.since = shard, now
        needs = self._cells[shard.cell].queue.needs
        state.recent = [needs, *(other for other in state.recent if other != needs)][:KEPT]
        return shard

    def expected(self, shard: ShardId) -> float:
        """How long a shard is expected to take."""
        return self._cells[shard.cell].length(shard.number)

    def losses(self, shard: ShardId) -> int:
        """How often it came back."""
        return self._losses.get(shard, 0)

    def reprice(self, seconds: Sequence[float]) -> None:
        """Better knowledge of what one sample of each cell takes. Looks at every cell: not for every decision."""
        self._heaps.clear()
        self._queued_s = 0.0
        for number, (cell, price) in enumerate(zip(self._cells, seconds, strict=True)):
            cell.seconds = price
            fresh = cell.queue.samples - min(cell.fresh * cell.queue.size, cell.queue.samples)
            self._queued_s += price * (fresh + sum(cell.queue.samples_of(n) for n in cell.back))
            self._enter(number)

    def _enter(self, number: int) -> None:
        """Put a cell in its heaps, by the length of its next shard."""
        cell = self._cells[number]
        cell.entry += 1
        if cell.waiting:
            entry = -cell.length(cell.next), number, cell.entry
            for level in range(len(cell.queue.needs) + 1):
                heapq.heappush(self._heaps.setdefault(cell.queue.needs[:level], []), entry)

    def _top(self, needs: tuple[Hashable, ...]) -> int | None:
        """Among the cells with these needs, the one whose next shard is longest."""
        heap = self._heaps.get(needs, [])
        while heap and self._cells[heap[0][1]].entry != heap[0][2]:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def _next_length(self, number: int) -> float:
        cell = self._cells[number]
        return cell.length(cell.next)

    def _take(self, worker: _Worker) -> ShardId:
        longest = self._top(())
        assert longest is not None, "something is queued"
        limit = self._next_length(longest)
        pressing = 2 * limit * len(self._workers) > self._queued_s
        for level in range(len(self._cells[longest].queue.needs), 0, -1):
            tops = {top for needs in worker.recent if (top := self._top(needs[:level])) is not None}
            warm = max(tops, key=self._next_length, default=None)
            if warm is not None and self._next_length(warm) >= (_NEARLY if pressing else _LONG) * limit:
                return self._pop(warm)
        return self._pop(longest)

    def _pop(self, number: int) -> ShardId:
        cell, length = self._cells[number], self._next_length(number)
        shard = ShardId(number, cell.next)
        if cell.back:
            cell.back.pop()
        else:
            cell.fresh += 1
        self.queued -= 1
        self._queued_s -= length
        if not cell.waiting or self._next_length(number) != length:
            self._enter(number)
        return shard

    def _give_back(self, shard: ShardId, worker: Hashable) -> Loss | None:
        holders = self._running.get(shard)
        if holders is None:
            return None
        holders.remove(worker)
        if holders:
            return None
        del self._running[shard]
        cell = self._cells[shard.cell]
        cell.back.append(shard.number)
        self.queued += 1
        self._queued_s += cell.length(shard.number)
        self._enter(shard.cell)
        self.lost += 1
        self._losses[shard] = self._losses.get(shard, 0) + 1
        return Loss(shard, self._losses[shard])

    def _late(self, now: float) -> ShardId | None:
        """The shard that is most behind its time and runs only once."""

        def behind(shard: ShardId) -> float:
            since = self._workers[self._running[shard][0]].since
            return now - since - _OVERDUE * self.expected(shard)

        alone = [shard for shard, holders in self._running.items() if len(holders) == 1]
        latest = max(alone, key=behind, default=None)
        return latest if latest is not None and behind(latest) > 0 else None
