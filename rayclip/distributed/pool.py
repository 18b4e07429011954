"""Evaluation actors: a pool that takes shards from any cell and keeps models warm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

from rayclip.evaluation import Cell, Evaluator, Shard, Store, missing_shards
from rayclip.progress import Display
from rayclip.types import UserError

_ATTEMPTS = 3  # of a shard whose actor was lost


@dataclass(frozen=True, kw_only=True)
class PoolSize:
    """The pool's actors. None is chosen from the cluster: an actor a GPU, or on CPUs an actor a core.

    `compiled`: they attack compiled models.
    """

    workers: int | None = None
    gpus: float | None = None
    batch_size: int = 128
    shard_size: int = 256
    compiled: bool = False

    def resolve(self) -> tuple[int, float, float]:
        """(actors, CPUs of one, GPUs of one) on the connected cluster."""
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0.0)
        per_actor = self.gpus if self.gpus is not None else (1.0 if gpus >= 1 else 0.0)
        if per_actor > gpus:
            raise UserError(
                f"an evaluation worker wants {per_actor:g} GPUs but the cluster has {gpus:g}: lower --gpus-per-worker."
            )
        cpus = resources.get("CPU", 1.0)
        workers = self.workers or max(1, int(gpus / per_actor) if per_actor else int(cpus))
        return workers, max(1.0, cpus // workers) if cpus >= workers else cpus / workers, per_actor


def evaluate(
    cells: Sequence[Cell], positions: dict[str, np.ndarray], store: Store, *, size: PoolSize, display: Display
) -> None:
    """Compute every verdict that the store does not hold yet.

    Args:
        positions: the samples to evaluate, by data specification.

    Raises:
        UserError: from an actor, as it is; or a shard whose actor was lost `_ATTEMPTS` times.
    """
    cells = list({cell.id: cell for cell in cells}.values())  # two names of one model
    todo = [s for cell in cells for s in missing_shards(cell, positions[cell.data], store, size.shard_size)]
    if not todo:
        return
    pool = _Pool(todo, store, size, display, total=sum(len(positions[c.data]) for c in cells))
    for cell in cells:
        store.write_json(
            f"cells/{cell.id}/cell.json",
            {
                "model": cell.model,
                "model_fingerprint": cell.model_fingerprint,
                "dataset": cell.dataset,
                "data_fingerprint": cell.data_fingerprint,
                "class_names": cell.class_names,
                "protocol": cell.describe(),
            },
        )
    pool.run()


class _Pool:
    def __init__(self, shards: list[Shard], store: Store, size: PoolSize, display: Display, total: int) -> None:
        self._queue = sorted(shards, key=lambda s: -s.cost)  # longest first: no straggler starts last
        self._store, self._display, self._total = store, display, total
        self._done = total - sum(len(s.positions) for s in shards)
        workers, cpus, gpus = size.resolve()
        self._workers = min(workers, len(shards))
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Actor)
        self._settings = (store, size.batch_size, max(1, int(cpus)), size.compiled)
        self._attempts: dict[str, int] = {}
        self._warm: dict[Any, str] = {}  # actor -> fingerprint of the model it ran last

    def run(self) -> None:
        running: dict[Any, tuple[Any, Shard]] = {}
        try:
            for _ in range(self._workers):
                self._start(self._new_actor(), running)
            while running:
                (ready, *_), _ = ray.wait(list(running), num_returns=1)
                actor, shard = running.pop(ready)
                if self._collect(ready, shard):
                    self._start(actor, running)
                else:
                    self._warm.pop(actor)
                    self._start(self._new_actor(), running)
        finally:
            for actor in self._warm:
                ray.kill(actor)

    def _new_actor(self) -> Any:
        actor = self._actor.remote(*self._settings)
        self._warm[actor] = ""
        return actor

    def _start(self, actor: Any, running: dict[Any, tuple[Any, Shard]]) -> None:
        """Give an actor the longest shard of the model it has loaded, else the longest of all."""
        if not self._queue:
            return
        warm = (i for i, s in enumerate(self._queue) if s.cell.model_fingerprint == self._warm[actor])
        shard = self._queue.pop(next(warm, 0))
        self._warm[actor] = shard.cell.model_fingerprint
        running[actor.run.remote(shard)] = actor, shard

    def _collect(self, ready: Any, shard: Shard) -> bool:
        """Take note of a finished shard; False if its actor was lost and the shard went back to the queue."""
        try:
            right = ray.get(ready)
        except RayTaskError as error:
            if isinstance(error.cause, UserError | FloatingPointError):
                raise UserError(str(error.cause)) from None
            raise
        except (RayActorError, ActorDiedError, ActorUnavailableError) as error:
            self._attempts[shard.name] = self._attempts.get(shard.name, 0) + 1
            if self._attempts[shard.name] >= _ATTEMPTS:
                raise UserError(
                    f"a shard of '{shard.cell.dataset}' lost its worker {_ATTEMPTS} times (out of memory? "
                    "try a smaller --batch-size); run again to go on from here."
                ) from error
            self._queue.insert(0, shard)
            return False
        self._done += len(shard.positions)
        note = f"{shard.cell.attack_label} {100 * right / len(shard.positions):.0f} %"
        self._display.update("evaluating", self._done, self._total, note)
        return True


class _Actor:
    """Holds one evaluator."""

    def __init__(self, store: Store, batch_size: int, threads: int, compiled: bool) -> None:
        device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        if device == "cpu":
            torch.set_num_threads(threads)
        self._evaluator = Evaluator(store, device, batch_size, compiled=compiled)

    def run(self, shard: Shard) -> int:
        return self._evaluator.run(shard)
