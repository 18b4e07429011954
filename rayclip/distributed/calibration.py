"""Measure briefly how long samples take, on one evaluation actor of the cluster that will run the evaluation."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from rayclip.distributed.evaluating import EvaluationActor
from rayclip.distributed.faults import explain
from rayclip.distributed.pool import start_actor
from rayclip.distributed.resources import PoolSize, Share
from rayclip.evaluation import Cell, Shard, Shards, Store, chosen_positions
from rayclip.evaluation.costs import Costs, Hardware
from rayclip.progress import Display
from rayclip.types import UserError

_SAMPLES = 8  # per cell on CPUs; GPUs get a whole batch, which takes hardly longer than one image
_MORE, _PART = 4, 10  # later measurements: 4 times as many samples, but at most one in ten
_WARM_UP = 2
_NODE_S = 600.0  # an autoscaler may have to start a machine first
_PATIENCE = 3  # times the allowed time: timeout of one measurement, as the duration of a first one is unknown


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The results of a calibration besides the costs."""

    hardware: Hardware  # of one worker
    start: float  # seconds until a worker has started
    wanted: int  # number of workers that fit in the cluster
    loading: dict[str, float] = field(default_factory=dict)  # seconds to load each model, by fingerprint


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
        few = size.batch_size if hardware.gpus else _SAMPLES
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
                costs.add(cell, done.samples, done.seconds)  # not the first forwards, which are slower
        return found
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
