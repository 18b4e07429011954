"""Schedule shards on workers: decisions only, without Ray, models or a clock of its own.

Shards are queued per cell; a decision looks at a few heaps of cells, never at all shards. The caller reports events and
asks which shard a worker runs next (`distributed.pool` with real actors, `forecast` with simulated ones).
"""

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

KEPT = 4  # models, and class embeddings, that a worker keeps loaded
# A shard of a loaded model goes first if it has at least this share of the longest shard's length; and near the end
_LONG, _NEARLY = 0.25, 0.8
_OVERDUE = 1.5  # times its expected duration: after that a shard gets a second copy


class ShardId(NamedTuple):
    """Shard `number` of cell `cell`, both counted from 0."""

    cell: int
    number: int


class Loss(NamedTuple):
    """A shard that went back to the queue for the `times`-th time."""

    shard: ShardId
    times: int


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The shards of one cell."""

    samples: int  # number of samples, which are cut into shards
    size: int  # samples per shard; the last one has the rest
    needs: tuple[Hashable, ...]  # what a worker must have loaded, coarse to fine: model, class embeddings
    seconds: float  # expected time per sample, in any unit that all queues share

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def samples_of(self, number: int) -> int:
        return min(self.size, self.samples - number * self.size)


@dataclass(eq=False)
class _Cell:
    queue: Queue
    seconds: float
    fresh: int = 0  # all shards before this one have been handed out
    back: list[int] = field(default_factory=list)  # shards that were handed out and came back
    entry: int = 0  # number of the newest heap entry; older ones are ignored

    @property
    def waiting(self) -> bool:
        return bool(self.back) or self.fresh < len(self.queue)

    @property
    def next(self) -> int:
        return self.back[-1] if self.back else self.fresh

    def length(self, number: int) -> float:
        return self.seconds * self.queue.samples_of(number)

    @property
    def next_length(self) -> float:
        return self.length(self.next)


@dataclass(eq=False)
class _Worker:
    recent: list[tuple[Hashable, ...]] = field(default_factory=list)  # what it has loaded, latest first
    shard: ShardId | None = None
    since: float = 0.0


class Schedule:
    """The assignment of shards to workers: longest first; prefer loaded models; retry lost ones; duplicate stragglers.

    A worker takes the longest shard that needs what it has loaded, unless that is short compared to the longest of all,
    since short ones fill the gaps at the end; once the longest takes more than half of the remaining time, only one
    nearly as long is preferred to it. Times are in seconds from any start.
    """

    def __init__(self, queues: Sequence[Queue]) -> None:
        self._cells = [_Cell(queue, queue.seconds) for queue in queues]
        self._workers: dict[Hashable, _Worker] = {}
        self._running: dict[ShardId, list[Hashable]] = {}  # unfinished shards, with the workers that run them
        self._losses: dict[ShardId, int] = {}
        self._heaps: dict[tuple[Hashable, ...], list[tuple[float, int, int]]] = {}  # by prefix of `needs`
        self.queued = sum(len(queue) for queue in queues)
        self.copies = 0  # second copies started because a shard was late
        self.lost = 0  # shards that went back to the queue
        self._queued_s = 0.0
        self.reprice([queue.seconds for queue in queues])

    @property
    def done(self) -> bool:
        return not self.queued and not self._running

    @property
    def running(self) -> int:
        """Return the number of running shards; copies are not counted."""
        return len(self._running)

    def join(self, worker: Hashable) -> None:
        """Add a new worker, which has nothing loaded."""
        self._workers[worker] = _Worker()

    def leave(self, worker: Hashable) -> Loss | None:
        """Remove a lost worker. Its shard goes back to the queue, unless it is done or also runs elsewhere."""
        shard = self._workers.pop(worker).shard
        return None if shard is None else self._give_back(shard, worker)

    def fail(self, worker: Hashable) -> Loss | None:
        """Record that a worker could not finish its shard and is free again."""
        return self._give_back(self._free(worker), worker)

    def finish(self, worker: Hashable) -> ShardId | None:
        """Record that a worker has finished and is free; return its shard, or None if another copy finished first."""
        shard = self._free(worker)
        return None if self._running.pop(shard, None) is None else shard

    def _free(self, worker: Hashable) -> ShardId:
        state = self._workers[worker]
        shard, state.shard = state.shard, None
        assert shard is not None, "it was not running anything"
        return shard

    def start(self, worker: Hashable, now: float) -> ShardId | None:
        """Assign a free worker its next shard; return None if there is nothing for it to do at the moment."""
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

    def has_begun(self, cell: int) -> bool:
        return self._cells[cell].fresh > 0

    def drop(self, cell: int) -> None:
        """Take out the shards of a cell that has not begun."""
        mine = self._cells[cell]
        assert not mine.fresh, "it has begun"
        self.queued -= len(mine.queue)
        self._queued_s -= mine.seconds * mine.queue.samples
        mine.fresh = len(mine.queue)
        self._enter(cell)

    def expected(self, shard: ShardId) -> float:
        """Return the expected duration of a shard."""
        return self._cells[shard.cell].length(shard.number)

    def losses(self, shard: ShardId) -> int:
        """Return how often a shard went back to the queue."""
        return self._losses.get(shard, 0)

    def reprice(self, seconds: Sequence[float]) -> None:
        """Update the expected seconds per sample of each cell. It visits every cell: too slow for every decision."""
        self._heaps.clear()
        self._queued_s = 0.0
        for number, (cell, price) in enumerate(zip(self._cells, seconds, strict=True)):
            cell.seconds = price
            fresh = cell.queue.samples - min(cell.fresh * cell.queue.size, cell.queue.samples)
            self._queued_s += price * (fresh + sum(cell.queue.samples_of(n) for n in cell.back))
            self._enter(number)

    def _enter(self, number: int) -> None:
        """Push a cell into its heaps, ordered by the length of its next shard."""
        cell = self._cells[number]
        cell.entry += 1
        if cell.waiting:
            entry = -cell.next_length, number, cell.entry
            for level in range(len(cell.queue.needs) + 1):
                heapq.heappush(self._heaps.setdefault(cell.queue.needs[:level], []), entry)

    def _top(self, needs: tuple[Hashable, ...]) -> int | None:
        """Return the cell with these needs whose next shard is longest; None if no shard is queued."""
        heap = self._heaps.get(needs, [])
        while heap and self._cells[heap[0][1]].entry != heap[0][2]:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def _take(self, worker: _Worker) -> ShardId:
        longest = self._top(())
        assert longest is not None, "something is queued"
        limit = self._cells[longest].next_length
        pressing = 2 * limit * len(self._workers) > self._queued_s
        for level in range(len(self._cells[longest].queue.needs), 0, -1):
            tops = {top for needs in worker.recent if (top := self._top(needs[:level])) is not None}
            warm = max(tops, key=lambda top: self._cells[top].next_length, default=None)
            if warm is not None and self._cells[warm].next_length >= (_NEARLY if pressing else _LONG) * limit:
                return self._pop(warm)
        return self._pop(longest)

    def _pop(self, number: int) -> ShardId:
        cell, length = self._cells[number], self._cells[number].next_length
        shard = ShardId(number, cell.next)
        if cell.back:
            cell.back.pop()
        else:
            cell.fresh += 1
        self.queued -= 1
        self._queued_s -= length
        if not cell.waiting or cell.next_length != length:
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
        """Return the shard without a second copy that is most overdue; None if none is overdue."""

        def behind(shard: ShardId) -> float:
            since = self._workers[self._running[shard][0]].since
            return now - since - _OVERDUE * self.expected(shard)

        alone = [shard for shard, holders in self._running.items() if len(holders) == 1]
        latest = max(alone, key=behind, default=None)
        return latest if latest is not None and behind(latest) > 0 else None
