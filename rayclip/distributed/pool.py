"""Evaluate on a pool of Ray actors, which take shards of any cell and keep models loaded.

`evaluation.schedule` decides which actor runs which shard; this module starts the actors and handles their failures.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from rayclip.distributed.actor import Joined, make_actor
from rayclip.distributed.faults import AGAIN, dead_nodes, explain, only_node, out_of_memory, times_in_words
from rayclip.distributed.pressure import MemoryPressure
from rayclip.distributed.resources import PoolSize, Share
from rayclip.evaluation import Cell, Shards, Store
from rayclip.evaluation.costs import Costs, Hardware
from rayclip.evaluation.plan import cut
from rayclip.evaluation.schedule import Schedule, ShardId
from rayclip.evaluation.shard import Done
from rayclip.progress import Display
from rayclip.store import no_room
from rayclip.types import UserError

_ATTEMPTS = 5  # attempts at a shard whose actor was lost, or whose files could not be read or written
_STARTING = 256  # actors that are requested at once, before any has started
_STARTS = 3  # actors in a row that may fail to start, other than by the loss of a node
_LOOK_S = 2.0  # between two checks of the cluster, and of late shards, while nothing happens
_SAY_S = 10.0  # without a worker, before the display says so
_REPRICE = 1.25  # update the expected costs whenever the number of finished shards has grown by this factor
_SPARE = 10  # running shards per idle worker that is kept for late or lost shards


@dataclass(frozen=True, kw_only=True)
class PoolStatistics:
    """The resources and times of an evaluation.

    Attributes:
        hardware: hardware of its first worker.
        workers: maximum number of workers busy at once.
        wall: seconds from submission to the last shard's end.
        waited: seconds from submission to the first shard's start.
        busy: worker seconds on shards, without loading.
        loading: worker seconds of loading models, class embeddings and data.
        copies: second copies started because a shard was late.
        lost: shards that were started again because their worker failed.
    """

    hardware: Hardware
    workers: int
    wall: float
    waited: float
    busy: float
    loading: float
    copies: int
    lost: int


def evaluate(work: Sequence[Shards], store: Store, *, size: PoolSize, display: Display, total: int) -> PoolStatistics:
    """Compute the verdicts of all shards.

    Args:
        work: shards that the store does not hold yet (`evaluation.outstanding`), one entry per cell; not empty.
        total: samples of the whole evaluation, including those that have results already.

    Raises:
        UserError: an actor raised it; or a shard's actor was lost `_ATTEMPTS` times.
    """
    for cell in (shards.cell for shards in work):
        store.write_json(_record(cell), cell.record())
    return _Pool(work, store, size, display, total).run()


@dataclass(eq=False)
class _Worker:
    """The driver's view of one actor."""

    actor: Any
    dead_before: set[str]  # nodes that were lost before it was requested
    node: str | None = None  # address of its node, once it is ready
    ref: Any = None  # its latest call
    ready: bool = False
    rests_until: float = 0.0


class _Pool:
    def __init__(self, work: Sequence[Shards], store: Store, size: PoolSize, display: Display, total: int) -> None:
        self._work, self._store, self._size, self._display = list(work), store, size, display
        self._total = total
        self._missing = {shards.cell.id: len(shards.positions) for shards in work}
        self._left = dict(self._missing)
        self._samples_done, self._seconds_left = total - sum(self._missing.values()), 0.0
        self._share, self._pressure = Share.of(size), MemoryPressure(size.batch_size)
        self._workers: list[_Worker] = []
        self._free: list[_Worker] = []
        self._waiting: dict[Any, _Worker] = {}
        self._costs = Costs()
        self._schedule: Schedule | None = None  # made when the first worker reports its hardware
        self._hardware: Hardware | None = None
        self._has_lost = False
        self._failed_starts = self._shards_done = self._priced_at = self._most = 0
        self._began = time.monotonic()
        self._waited = self._busy = self._loading = self._looked = 0.0

    def run(self) -> PoolStatistics:
        try:
            while self._schedule is None or not self._schedule.done:
                self._resize()
                for ref in self._next_ready():
                    self._collect(self._waiting.pop(ref), ref)
                self._feed()
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)
        if self._has_lost or self._schedule.copies:  # killed workers may have left half a file
            for shards in self._work:
                self._store.delete_unfinished(f"cells/{shards.cell.id}")
        assert self._hardware is not None
        return PoolStatistics(
            hardware=self._hardware,
            workers=self._most,
            wall=self._now(),
            waited=self._waited,
            busy=self._busy,
            loading=self._loading,
            copies=self._schedule.copies,
            lost=self._schedule.lost,
        )

    def _now(self) -> float:
        return time.monotonic() - self._began

    # ------------------------------------------------------------------------------------------ the number of actors

    def _resize(self) -> None:
        """Start actors while shards are queued, and release idle ones at the end.

        An actor that does not fit yet makes the autoscaler add a node.
        """
        if self._now() - self._looked >= _LOOK_S or not self._workers:
            self._looked = self._now()
            self._share.look()
        queued = self._schedule.queued if self._schedule else sum(len(shards) for shards in self._work)
        busy = len(self._waiting) - len(self._starting())
        ready = len(self._workers) - len(self._starting())
        most = min(self._share.wanted, busy + queued, ready + max(_STARTING, ready), self._pressure.most(self._now()))
        missing = range(int(most) - len(self._workers))
        dead = dead_nodes() if missing else set()
        for _ in missing:
            worker = _Worker(actor=make_actor(self._store, self._size, self._share), dead_before=dead)
            self._workers.append(worker)
            self._ask(worker, worker.actor.hello.remote(_record(self._work[0].cell)))
        if not queued and self._schedule:
            spares = math.ceil(self._schedule.running / _SPARE)
            for worker in [*self._starting(), *self._free[spares:]]:
                self._release(worker)
        if not any(worker.ready for worker in self._workers) and self._now() > _SAY_S:
            note = f"waiting for a worker with {self._share}"
            self._display.update("evaluating", self._samples_done, self._total, note)

    def _starting(self) -> list[_Worker]:
        return [worker for worker in self._workers if not worker.ready]

    def _release(self, worker: _Worker) -> None:
        """Remove an actor and free its resources in the cluster."""
        self._workers.remove(worker)
        self._waiting.pop(worker.ref, None)
        if worker.ready and self._schedule:
            self._free.remove(worker)
            self._schedule.leave(worker)
        ray.kill(worker.actor)

    # ---------------------------------------------------------------------------------------------- calls and results

    def _ask(self, worker: _Worker, ref: Any) -> None:
        worker.ref = ref
        self._waiting[ref] = worker

    def _next_ready(self) -> list[Any]:
        """Wait up to `_LOOK_S` seconds for a call to finish; return all that have finished."""
        refs = list(self._waiting)
        if not refs:
            time.sleep(0.1)  # all workers are resting
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=_LOOK_S)
        if ready and len(refs) > 1:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return ready

    def _feed(self) -> None:
        if self._schedule is None:
            return
        now = self._now()
        for worker in [worker for worker in self._free if worker.rests_until <= now]:
            shard = self._schedule.start(worker, now)
            if shard is None:
                return
            self._waited = self._waited or now
            self._free.remove(worker)
            # A lost worker may have run out of memory without an error that says so
            batch_size = max(1, self._pressure.batch_size >> self._schedule.losses(shard))
            self._ask(worker, worker.actor.run.remote(self._work[shard.cell][shard.number], batch_size))
            self._show(self._work[shard.cell].cell)
            self._most = max(self._most, len(self._waiting) - len(self._starting()))

    def _collect(self, worker: _Worker, ref: Any) -> None:
        """Handle an actor's answer, or its failure."""
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            self._failed(worker, error)
        except OutOfMemoryError as error:
            self._pressed(worker, error)
        except RayError as error:
            self._gone(worker, error)
        else:
            if isinstance(answer, Joined):
                worker.node = answer.node
                self._joined(worker, answer.hardware)
            else:
                self._finished(worker, answer)

    def _joined(self, worker: _Worker, hardware: Hardware) -> None:
        self._failed_starts = 0
        if self._schedule is None:
            self._hardware = hardware
            self._costs.read((shards.cell for shards in self._work), self._store, hardware)
            self._work = cut(self._work, self._costs, self._share.wanted, self._size.smallest_shard)
            self._schedule = Schedule([shards.queue(self._costs.seconds(shards.cell)) for shards in self._work])
        worker.ready = True
        self._schedule.join(worker)
        self._free.append(worker)

    def _finished(self, worker: _Worker, done: Done) -> None:
        assert self._schedule is not None
        shard = self._schedule.finish(worker)
        self._free.append(worker)
        self._loading += done.loading
        self._pressure.done()
        if shard is None:
            return
        cell = self._work[shard.cell].cell
        self._costs.add(cell, done.samples, done.seconds)
        self._busy += done.seconds
        self._shards_done += 1
        self._samples_done += done.samples
        self._left[cell.id] -= done.samples
        self._seconds_left -= self._costs.seconds(cell) * done.samples
        if self._shards_done >= _REPRICE * self._priced_at:
            self._priced_at = self._shards_done
            self._schedule.reprice([self._costs.seconds(shards.cell) for shards in self._work])
            cells = {shards.cell.id: shards.cell for shards in self._work}
            self._seconds_left = sum(self._costs.seconds(cells[key]) * left for key, left in self._left.items())
        note = f"{cell.attack_label}: accuracy {100 * done.right / done.samples:.0f} %"
        # By the cost of the cells, since an image takes a thousand times longer under one attack than under another
        left = max(0.0, self._seconds_left) / max(1, len(self._workers) - len(self._starting()))
        self._display.update("evaluating", self._samples_done, self._total, note, left)
        self._show(cell, done.samples)

    def _show(self, cell: Cell, more: int = 0) -> None:
        """Update the progress bar of a running cell."""
        self._display.part(cell.id, cell.title, self._missing[cell.id], more)

    def _failed(self, worker: _Worker, error: RayTaskError) -> None:
        """Handle an exception that an actor raised; the actor is still alive."""
        cause = error.cause
        if not isinstance(cause, OSError) or not worker.ready:
            raise explain(error) from None
        full = no_room(cause)
        if full is not None:
            raise full from error
        assert self._schedule is not None
        loss = self._schedule.fail(worker)
        self._free.append(worker)
        if loss is not None:
            self._check(loss.shard, loss.times, f"could not be read or written ({str(cause).splitlines()[0][:200]})")
            worker.rests_until = self._now() + 2**loss.times

    def _pressed(self, worker: _Worker, error: OutOfMemoryError) -> None:
        """Handle an actor that Ray's memory monitor killed.

        Its shard goes back to the queue without a limit on attempts; `MemoryPressure` decides when to give up.
        """
        self._has_lost = True
        self._workers.remove(worker)
        ray.kill(worker.actor)
        if worker.ready and self._schedule is not None:
            self._schedule.leave(worker)
        if not self._pressure.lost(len(self._workers), self._now()):
            tried = f" {times_in_words(self._pressure.killed)}, at last with one image at a time and no other beside it"
            raise out_of_memory(worker.node or only_node(), tried) from error
        note = f"little memory on {worker.node or 'a node'}: a worker was ended"
        self._display.update("evaluating", self._samples_done, self._total, note)

    def _gone(self, worker: _Worker, error: RayError) -> None:
        """Handle a lost actor: its process or node died, or cannot be reached."""
        self._has_lost = True
        self._workers.remove(worker)
        ray.kill(worker.actor)
        if not worker.ready:
            self._failed_starts += dead_nodes() <= worker.dead_before
            if self._failed_starts >= _STARTS:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise UserError(f"evaluation workers do not start: {lines[-1].strip()[:300]}") from error
            return
        assert self._schedule is not None
        loss = self._schedule.leave(worker)
        if loss is not None:
            why = "lost its worker (out of memory? try a smaller --batch-size)"
            self._check(loss.shard, loss.times, why)

    def _check(self, shard: ShardId, times: int, why: str) -> None:
        if times >= _ATTEMPTS:
            dataset = self._work[shard.cell].cell.dataset
            raise UserError(f"a shard of '{dataset}' {why} {times} times; {AGAIN}.")


def _record(cell: Cell) -> str:
    """Return the name of the file that describes a cell."""
    return f"cells/{cell.id}/cell.json"
