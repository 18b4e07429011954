"""Work off a schedule on a pool of Ray actors: start them, hand out shards, replace those that are lost.

`evaluation.schedule` decides which actor runs which shard; `evaluating` and `captioning` say what a shard is.
"""

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from rayclip.distributed.faults import AGAIN, dead_nodes, explain, only_node, out_of_memory, times_in_words
from rayclip.evaluation.schedule import Loss, Schedule, ShardId
from rayclip.progress import Display
from rayclip.store import no_room
from rayclip.types import UserError

_ATTEMPTS = 5  # attempts at a shard whose actor was lost, or whose files could not be read or written
_STARTING = 256  # actors that are requested at once, before any has started
_STARTS = 3  # actors in a row that may fail to start, other than by the loss of a node
_LOOK_S = 2.0  # between two checks of the cluster, and of late shards, while nothing happens
_SAY_S = 10.0  # without a worker, before the display says so
_SPARE = 10  # running shards per idle worker that is kept for late or lost shards
_CALM_S = 60.0  # without a worker killed for memory, before one more worker is tried
_LONGEST_CALM_S = 3600.0
_REST_S = 8.0  # longest pause before a worker that ran alone is started again
_ALONE = 5  # times that a worker running alone may be killed in a row, with batches of one image


class MemoryPressure:
    """Limits on the number of workers and their batch size (for all from now on), lowered when Ray's memory monitor
    kills one.

    A worker that ran beside others is not replaced for a while. If it ran alone, the batch size is halved.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.killed = 0
        self._most: float = math.inf
        self._alone = 0  # workers running alone that were killed since a shard was last finished
        self._calm_s, self._more_at, self._starts_at = _CALM_S, math.inf, 0.0

    def most(self, now: float) -> float:
        """Return the maximum number of workers at once; infinity if there is no limit."""
        if now >= self._more_at:
            self._most += 1
            self._more_at = now + self._calm_s
        return self._most if now >= self._starts_at else 0

    def lost(self, others: int, now: float) -> bool:
        """Record that a worker was killed beside `others` workers; return False if nothing is left to try."""
        self.killed += 1
        self._most = max(1, others)
        self._more_at = now + self._calm_s
        self._calm_s = min(2 * self._calm_s, _LONGEST_CALM_S)
        if others:
            return True
        if self._alone + 1 >= _ALONE and self.batch_size == 1:
            return False
        self._starts_at = now + min(2.0**self._alone, _REST_S)
        self._alone += 1
        self.batch_size = max(1, self.batch_size // 2)
        return True

    def done(self) -> None:
        """Record that a shard was finished."""
        self._alone = 0


@dataclass(eq=False)
class _Worker:
    """The driver's view of one actor."""

    actor: Any
    dead_before: set[str]  # nodes that were lost before it was requested
    node: str | None = None  # address of its node, once it is ready
    ref: Any = None  # its latest call
    ready: bool = False
    rests_until: float = 0.0


def start_actor(kind: type, cpus: float, gpus: float, *args: Any) -> Any:
    """Request an actor and return at once; it starts when the cluster has room for it."""
    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(kind).remote(*args)


def use_device(cpus: float) -> str:
    """Return the device of this actor: `cuda` if it has been given a GPU, else `cpu`, with a thread per core."""
    if torch.cuda.is_available() and ray.get_gpu_ids():
        return "cuda"
    torch.set_num_threads(max(1, int(cpus)))
    return "cpu"


class Pool(ABC):
    """A pool of actors that works off a schedule. A kind of work is a subclass.

    Attributes:
        task: what it does, for the display.
        last_resort: the last that it tries when memory is short, for the error.
        needs: the resources of an actor, in words.
        done, total: what is done of it, in the display's units.
        schedule: decides which actor runs which shard; None until the first actor has said what it is.
        most_busy, waited: maximum number of actors busy at once; seconds until the first shard was started.
        has_lost: whether an actor was lost.
    """

    task: str
    last_resort: str

    def __init__(
        self, display: Display, *, shards: int, needs: str, done: int, total: int, batch_size: int = 1
    ) -> None:
        self.display, self.needs, self.done, self.total = display, needs, done, total
        self.schedule: Schedule | None = None
        self._shards = shards
        self.most_busy, self.waited, self.has_lost = 0, 0.0, False
        self._pressure = MemoryPressure(batch_size)
        self._workers: list[_Worker] = []
        self._free: list[_Worker] = []
        self._waiting: dict[Any, _Worker] = {}
        self._failed_starts = self._wanted = 0
        self._began, self._looked = time.monotonic(), 0.0

    @abstractmethod
    def count_wanted(self) -> int:
        """Return the number of actors that the cluster has room for."""

    @abstractmethod
    def make_actor(self) -> tuple[Any, Any]:
        """Request an actor; return it and a call to it, which returns the address of its node and something more."""

    def join(self, about: Any) -> None:
        """Make the schedule, if there is none yet, now that an actor has told `about` itself."""

    @abstractmethod
    def call(self, actor: Any, shard: ShardId, batch_size: int) -> Any:
        """Call an actor to run a shard, with at most so many images at a time."""

    @abstractmethod
    def take(self, shard: ShardId | None, answer: Any) -> None:
        """Take an actor's answer; the shard is None if another actor has finished it before."""

    @abstractmethod
    def name(self, shard: ShardId) -> str:
        """Return how an error calls a shard."""

    def run(self) -> None:
        """Work until every shard is done. Raise a `UserError` of an actor, or if shards, workers or memory are lost too
        often."""
        try:
            while self.schedule is None or not self.schedule.done:
                self._resize()
                for ref in self._next_ready():
                    self._collect(self._waiting.pop(ref), ref)
                self._feed()
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)

    def now(self) -> float:
        """Return the seconds since the pool was made."""
        return time.monotonic() - self._began

    @property
    def ready(self) -> int:
        """The number of actors that have started."""
        return sum(worker.ready for worker in self._workers)

    def show(self, note: str, left: float | None = None) -> None:
        """Update the display; `left` are seconds."""
        self.display.update(self.task, self.done, self.total, note, left)

    def _resize(self) -> None:
        """Start actors while shards are queued (one that does not fit yet makes the autoscaler add a node); release
        idle ones."""
        if self.now() - self._looked >= _LOOK_S or not self._workers:
            self._looked, self._wanted = self.now(), self.count_wanted()
        starting = [worker for worker in self._workers if not worker.ready]
        queued = self._shards if self.schedule is None else self.schedule.queued
        busy = len(self._waiting) - len(starting)
        enough = self.ready + max(_STARTING, self.ready)
        most = min(self._wanted, busy + queued, enough, self._pressure.most(self.now()))
        missing = range(int(most) - len(self._workers))
        dead = dead_nodes() if missing else set()
        for _ in missing:
            actor, hello = self.make_actor()
            worker = _Worker(actor=actor, dead_before=dead)
            self._workers.append(worker)
            self._ask(worker, hello)
        if not queued and self.schedule:
            spares = math.ceil(self.schedule.running / _SPARE)
            for worker in [*starting, *self._free[spares:]]:
                self._remove(worker)
        if not self.ready and self.now() > _SAY_S:
            self.show(f"waiting for a worker with {self.needs}")

    def _remove(self, worker: _Worker) -> Loss | None:
        """Remove an actor and free its resources; return its shard if that is queued again."""
        self._workers.remove(worker)
        self._waiting.pop(worker.ref, None)
        ray.kill(worker.actor)
        if not worker.ready or self.schedule is None:
            return None
        self._free = [other for other in self._free if other is not worker]
        return self.schedule.leave(worker)

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
        if self.schedule is None:
            return
        now = self.now()
        for worker in [worker for worker in self._free if worker.rests_until <= now]:
            shard = self.schedule.start(worker, now)
            if shard is None:
                return
            self.waited = self.waited or now
            self._free.remove(worker)
            # A lost worker may have run out of memory without an error that says so
            batch_size = max(1, self._pressure.batch_size >> self.schedule.losses(shard))
            self._ask(worker, self.call(worker.actor, shard, batch_size))
            self.most_busy = max(self.most_busy, self.ready - len(self._free))

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
            self._answered(worker, answer)

    def _answered(self, worker: _Worker, answer: Any) -> None:
        self._free.append(worker)
        if not worker.ready:
            worker.node, about = answer
            worker.ready, self._failed_starts = True, 0
            self.join(about)
            assert self.schedule is not None
            self.schedule.join(worker)
        elif self.schedule is not None:
            self._pressure.done()
            self.take(self.schedule.finish(worker), answer)

    def _failed(self, worker: _Worker, error: RayTaskError) -> None:
        """Handle an exception that an actor raised; the actor is still alive."""
        cause = error.cause
        if not isinstance(cause, OSError) or not worker.ready or self.schedule is None:
            raise explain(error) from None
        full = no_room(cause)
        if full is not None:
            raise full from error
        loss = self.schedule.fail(worker)
        self._free.append(worker)
        if loss is not None:
            self._check(*loss, f"could not be read or written ({str(cause).splitlines()[0][:200]})")
            worker.rests_until = self.now() + 2**loss.times

    def _pressed(self, worker: _Worker, error: OutOfMemoryError) -> None:
        """Handle an actor that Ray's memory monitor killed: its shard is tried again, if `MemoryPressure` lets it."""
        self.has_lost = True
        self._remove(worker)
        if not self._pressure.lost(len(self._workers), self.now()):
            tried = f" {times_in_words(self._pressure.killed)}, at last {self.last_resort}"
            raise out_of_memory(worker.node or only_node(), tried) from error
        self.show(f"little memory on {worker.node or 'a node'}: a worker was ended")

    def _gone(self, worker: _Worker, error: RayError) -> None:
        """Handle a lost actor: its process or node died, or cannot be reached."""
        self.has_lost = True
        loss = self._remove(worker)
        if loss is not None:
            self._check(*loss, "lost its worker (out of memory? try a smaller --batch-size)")
        if not worker.ready:
            self._failed_starts += dead_nodes() <= worker.dead_before
            if self._failed_starts >= _STARTS:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise UserError(f"workers do not start: {lines[-1].strip()[:300]}") from error

    def _check(self, shard: ShardId, times: int, why: str) -> None:
        if times >= _ATTEMPTS:
            raise UserError(f"{self.name(shard)} {why} {times} times; {AGAIN}.")
