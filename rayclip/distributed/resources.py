"""How many evaluation actors a cluster holds, and how large each is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from rayclip.types import UserError


@dataclass(frozen=True, kw_only=True)
class PoolSize:
    """The pool's actors.

    Attributes:
        workers: at most so many at once; None is an actor a GPU, or on CPUs an actor a core, of what the cluster has or
            its autoscaler may add.
        gpus: of one actor, a fraction too; None is one where there are GPUs.
        batch_size: images per forward.
        shard_size: images per result file, at most.
        compiled: they attack compiled models.
    """

    workers: int | None = None
    gpus: float | None = None
    batch_size: int = 128
    shard_size: int = 256
    compiled: bool = False

    @property
    def smallest_shard(self) -> int:
        """Images below which no shard is cut to even the load: less would leave a GPU with too little to do."""
        return max(1, self.batch_size // 8)


class Share:
    """What each actor takes of the connected cluster, and how many are wanted of it. Picklable.

    Attributes:
        cpus, gpus: of one actor.
        wanted: actors, as of the last `look`.
    """

    def __init__(self, workers: int | None, cpus: float, gpus: float) -> None:
        self._workers, self.cpus, self.gpus, self.wanted = workers, cpus, gpus, workers or 1

    @classmethod
    def of(cls, size: PoolSize) -> "Share":
        """For the cluster as it is.

        Raises:
            UserError: no node has, or can ever have, what one actor is to have.
        """
        nodes, most = _nodes(), _autoscaled()
        all_gpus = max(_total(nodes, "GPU"), most.get("GPU", 0.0))
        gpus = size.gpus if size.gpus is not None else (1.0 if all_gpus >= 1 else 0.0)
        if gpus > all_gpus:
            raise UserError(
                f"an evaluation worker wants {gpus:g} GPUs but the cluster has {all_gpus:g}: lower --gpus-per-worker."
            )
        share = cls(size.workers, _cpus(nodes, most, size.workers, gpus), gpus)
        share.look()
        return share

    def look(self) -> None:
        """Count again what the cluster holds: nodes come and go."""
        if self._workers is None:
            most = [_autoscaled()]
            held = sum(self._held(node) for node in _nodes())
            self.wanted = max(1, held, *(self._held(all_nodes) for all_nodes in most if all_nodes))

    def _held(self, resources: Mapping[str, float]) -> int:
        slack = 1e-6  # thirds of a GPU
        by_cpu = math.floor(resources.get("CPU", 0.0) / self.cpus + slack)
        return min(by_cpu, math.floor(resources.get("GPU", 0.0) / self.gpus + slack)) if self.gpus else by_cpu

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU{'' if self.gpus == 1 else 's'}" if self.gpus else f"{self.cpus:g} CPUs"


def _cpus(nodes: list[Mapping[str, float]], most: Mapping[str, float], workers: int | None, gpus: float) -> float:
    """CPUs of one actor: all of a node's are dealt out to the actors that its GPUs hold; without GPUs a core each, or
    all cores to the workers that were asked for."""
    if gpus:
        dealt = [n.get("CPU", 0.0) // max(1, math.floor(n["GPU"] / gpus + 1e-6)) for n in nodes if n.get("GPU", 0) > 0]
        return max(1.0, min(dealt, default=1.0))
    total = max(_total(nodes, "CPU"), most.get("CPU", 0.0))
    if workers is None or not total:
        return 1.0
    if workers > total:
        return total / workers
    return max(1.0, min(total // workers, max((n.get("CPU", 0.0) for n in nodes), default=1.0)))


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _total(nodes: list[Mapping[str, float]], what: str) -> float:
    return sum(node.get(what, 0.0) for node in nodes)


def _autoscaled() -> Mapping[str, float]:
    """What the cluster's autoscaler may grow it to; nothing where there is none, or it names no limit."""
    from ray._private.state import state

    try:
        return state.get_max_resources_from_cluster_config() or {}
    except AttributeError:  # not part of Ray's promises
        return {}
