"""Evaluate shards on Ray actors, which take shards of any cell and keep models loaded; or time a few samples."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError

from rayclip.data.leases import Leases
from rayclip.distributed.faults import explain
from rayclip.distributed.pool import Pool, start_actor, use_device
from rayclip.distributed.resources import PoolSize, Share, check_shared
from rayclip.evaluation import Cell, Evaluator, Shard, Shards, Store, chosen_positions
from rayclip.evaluation.batching import GPU_BATCHES
from rayclip.evaluation.costs import Costs, Hardware, PoolStatistics, peak_memory
from rayclip.evaluation.plan import cut, missing_samples, record_name, resized
from rayclip.evaluation.schedule import Schedule, ShardId
from rayclip.evaluation.shard import Done
from rayclip.evaluation.waiting import DataWait
from rayclip.progress import Display
from rayclip.types import UserError

_REPRICE = 1.25  # update the expected costs whenever the number of finished shards has grown by this factor
_SAMPLES = 8  # per cell on CPUs; GPUs get a whole batch, which takes hardly longer than one image
_MORE, _PART = 4, 2  # later measurements: 4 times as many samples, but at most half of them
_WARM_UP = 2
_NODE_S = 600.0  # an autoscaler may have to start a machine first
_PATIENCE = 3  # times the allowed time: timeout of one measurement, as the duration of a first one is unknown


class EvaluationActor:
    """A worker with one evaluator, made in `hello`: an error in the constructor would look like a lost actor."""

    def __init__(self, store: Store, size: PoolSize, share: Share) -> None:
        self._store, self._size, self._share = store, size, share

    def hello(self, written: str | None = None) -> tuple[str, Hardware]:
        """Make the evaluator; return the address of the worker's node, and its hardware.

        Raises a `UserError` if this node does not see the file `written` of the driver: both must use the same storage.
        """
        if written is not None:
            check_shared(self._store, written)
        device = torch.device(use_device(self._share.cpus))
        hardware, size = Hardware.here(device, self._share.gpus), self._size
        threads = size.threads(self._share.cpus, hardware.gpus)
        self._evaluator = Evaluator(
            self._store, device, size.batch_size, compiled=size.compiled, hardware=hardware, threads=threads
        )
        return ray.util.get_node_ip_address(), hardware

    def run(self, shard: Shard, batch_size: int | None, *, keep: bool = True) -> Done:
        return self._evaluator.run(shard, batch_size, keep=keep)

    def peak_memory(self) -> float:
        return peak_memory()


def evaluate(
    work: Sequence[Shards],
    store: Store,
    *,
    size: PoolSize,
    display: Display,
    total: int,
    leases: Leases | None = None,
) -> PoolStatistics:
    """Compute the verdicts of all shards. Raises a `UserError` as `Pool.run` does.

    Args:
        work: shards that the store does not hold yet (`evaluation.outstanding`), one entry per cell; not empty.
        total: samples of the whole evaluation, including those that have results already.
        leases: on the cells; other commands get some of those that they wait for, which are then left out.
    """
    for cell in (shards.cell for shards in work):
        store.write_json(record_name(cell), cell.record())
    pool = _EvaluationPool(work, store, size, display, total, leases)
    pool.run()
    assert pool.schedule is not None and pool.hardware is not None
    if pool.has_lost or pool.schedule.copies:  # killed workers may have left half a file
        for cell_id in {shards.cell.id for shards in work} - pool.given:
            store.delete_unfinished(f"cells/{cell_id}")
    return PoolStatistics(
        hardware=pool.hardware,
        workers=pool.most_busy,
        wall=pool.now(),
        waited=pool.waited,
        busy=pool.busy,
        loading=pool.loading,
        copies=pool.schedule.copies,
        lost=pool.schedule.lost,
    )


class _EvaluationPool(Pool):
    task = "evaluating"
    last_resort = "with one image at a time and no other beside it"

    def __init__(
        self,
        work: Sequence[Shards],
        store: Store,
        size: PoolSize,
        display: Display,
        total: int,
        leases: Leases | None = None,
    ) -> None:
        self._leases, self.given = leases, set[str]()  # cells that were given to other commands
        self._work, self._store, self._size, self._share, self._costs = list(work), store, size, Share.of(size), Costs()
        self._missing = missing_samples(work)
        super().__init__(
            display,
            shards=sum(map(len, work)),
            needs=str(self._share),
            done=total - sum(self._missing.values()),
            total=total,
            batch_size=size.largest_batch(self._share.gpus),
        )
        self._data_wait = DataWait("evaluation")
        self._left = dict(self._missing)
        self._shards_done = self._priced_at = 0
        self._seconds_left = self.busy = self.loading = 0.0
        self.hardware: Hardware | None = None

    def _give(self) -> None:
        """Give others some of the cells that they wait for and that have not begun."""
        if self._leases is None or self.schedule is None:
            return
        entries: dict[str, list[int]] = {}
        for number, shards in enumerate(self._work):
            entries.setdefault(shards.cell.id, []).append(number)
        waiting = [
            cell
            for cell, numbers in entries.items()
            if cell not in self.given and not any(map(self.schedule.has_begun, numbers))
        ]
        for cell in self._leases.give(waiting):
            self.given.add(cell)
            for number in entries[cell]:
                self.schedule.drop(number)
            self.total -= self._left[cell]
            self._left[cell] = 0

    def count_wanted(self) -> int:
        self._give()
        self._share.look()
        return self._share.wanted

    def make_actor(self) -> tuple[Any, Any]:
        share = self._share
        actor = start_actor(EvaluationActor, share.cpus, share.gpus, self._store, self._size, share)
        return actor, actor.hello.remote(record_name(self._work[0].cell))

    def join(self, about: Hardware) -> None:
        if self.schedule is None:
            self.hardware = about
            self._costs.read((shards.cell for shards in self._work), self._store, about)
            work = resized(self._work, self._size.largest_shard(about.gpus)) if about.gpus else self._work
            self._work = cut(work, self._costs, self._share.wanted, self._size.smallest_shard(about.gpus))
            self.schedule = Schedule([shards.queue(self._costs.seconds(shards.cell)) for shards in self._work])

    def call(self, actor: Any, shard: ShardId, batch_size: int) -> Any:
        self._show_cell(self._work[shard.cell].cell)
        return actor.run.remote(self._work[shard.cell][shard.number], batch_size)

    def take(self, shard: ShardId | None, answer: Done) -> None:
        self.loading += answer.loading
        if shard is None or self.schedule is None:
            return
        cell = self._work[shard.cell].cell
        self._costs.add(cell, answer.samples, answer.seconds, answer.reading)
        self.busy += answer.seconds
        self._data_wait.add(answer.reading.waiting, answer.seconds, on_gpu=bool(self.hardware and self.hardware.gpus))
        self._shards_done += 1
        self.done += answer.samples
        self._left[cell.id] -= answer.samples
        if self._leases is not None and not (self._left[cell.id] or self.has_lost or self.schedule.copies):
            self._leases.release([cell.id])
        self._seconds_left -= self._costs.seconds(cell) * answer.samples
        if self._shards_done >= _REPRICE * self._priced_at:
            self._priced_at = self._shards_done
            self.schedule.reprice([self._costs.seconds(shards.cell) for shards in self._work])
            cells = {shards.cell.id: shards.cell for shards in self._work}
            self._seconds_left = sum(self._costs.seconds(cells[key]) * left for key, left in self._left.items())
        # By the cost of the cells, since an image takes a thousand times longer under one attack than under another
        left = max(0.0, self._seconds_left) / max(1, self.ready)
        self.show(f"{cell.attack_label}: accuracy {100 * answer.right / answer.samples:.0f} %", left)
        self._show_cell(cell, answer.samples)

    def name(self, shard: ShardId) -> str:
        return f"a shard of '{self._work[shard.cell].cell.dataset}'"

    def _show_cell(self, cell: Cell, more: int = 0) -> None:
        """Update the progress bar of a running cell."""
        self.display.part(cell.id, cell.title, self._missing[cell.id], more)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The results of a calibration besides the costs."""

    hardware: Hardware  # of one worker
    start: float  # seconds until a worker has started
    wanted: int  # number of workers that fit in the cluster
    loading: dict[str, float] = field(default_factory=dict)  # seconds to load each model, by fingerprint
    memory: float = 0.0  # most bytes that the worker held


def calibrate(
    work: Sequence[Shards],
    cells: Sequence[Cell],
    costs: Costs,
    store: Store,
    size: PoolSize,
    *,
    seconds: float,
    display: Display,
) -> Calibration:
    """Add the timings of earlier results to `costs`, and measure a few samples of the cells that have none.

    One cell of each kind (equal in all but the data) comes first, cheap ones before expensive ones; then cells on other
    data; then more samples of all. One that is expected to take longer than the remaining time is not measured. Raises
    a `UserError` of the actor, or if no worker starts in time.

    Args:
        work: outstanding shards.
        cells: all cells whose earlier results may be read, finished ones included.
        seconds: approximate time for all measurements together.
    """
    began = time.monotonic()
    share = Share.of(size)
    actor = start_actor(EvaluationActor, share.cpus, share.gpus, store, size, share)
    try:
        answer = _get(actor.hello.remote(), _NODE_S)
        if answer is None:
            raise UserError(f"no worker with {share} came within {_NODE_S / 60:.0f} minutes.")
        node, hardware = answer
        found = Calibration(hardware=hardware, start=time.monotonic() - began, wanted=share.wanted)
        costs.read({cell.id: cell for cell in cells}.values(), store, hardware)
        end = time.monotonic() + seconds
        few = (size.batch_size or GPU_BATCHES[0]) if hardware.gpus else _SAMPLES
        for skip, some in ((("measured", "same kind"), False), (("measured",), False), ((), True)):
            for number, shards in enumerate(sorted(work, key=lambda shards: shards.cell.cost)):
                cell, left = shards.cell, end - time.monotonic()
                count = min(_MORE * few, len(shards.positions) // _PART) if some else min(few, len(shards.positions))
                if costs.basis(cell) in skip or not count or left <= 0:
                    continue
                if costs.measured and costs.seconds(cell) * count > left:
                    continue
                display.update("calibrating", number, len(work), cell.attack_label)
                is_new = cell.model_fingerprint not in found.loading
                for samples in (_WARM_UP, count) if is_new else (count,):
                    chosen = shards.positions[chosen_positions(len(shards.positions), samples)]
                    shard = Shard(cell=cell, positions=tuple(chosen.tolist()))
                    done = _get(actor.run.remote(shard, None, keep=False), max(30.0, _PATIENCE * seconds), node)
                    if done is None:
                        return found
                    found.loading.setdefault(cell.model_fingerprint, done.loading)
                costs.add(cell, done.samples, done.seconds, done.reading)  # not the first forwards, which are slower
        return replace(found, memory=_get(actor.peak_memory.remote(), _NODE_S, node) or 0.0)
    finally:
        ray.kill(actor)


def _get(ref: Any, seconds: float, node: str | None = None) -> Any:
    """Return the answer to a call; None if it takes too long."""
    try:
        return ray.get(ref, timeout=seconds)
    except GetTimeoutError:
        return None
    except RayError as error:
        raise explain(error, node) from error
