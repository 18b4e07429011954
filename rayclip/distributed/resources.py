"""Work out how many evaluation actors fit in a cluster, and the resources of each."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rayclip.store import Store
from rayclip.types import UserError

_SEEN_S = 10.0  # until a file that the driver has written is visible on every node
_MOST = "autoscales-to-"  # GPU, CPU: labels of the head node that say how far the cluster may grow; Ray does not tell


@dataclass(frozen=True, kw_only=True)
class PoolSize:
    """The settings of a pool of evaluation actors.

    Attributes:
        workers: maximum number of actors; None is one per GPU or per core that the cluster has or may add.
        gpus: GPUs per actor, may be a fraction; None is one if there are GPUs.
        batch_size: images per forward.
        shard_size: maximum images per result file.
        compiled: whether actors attack compiled models.
    """

    workers: int | None = None
    gpus: float | None = None
    batch_size: int = 128
    shard_size: int = 256
    compiled: bool = False

    @property
    def smallest_shard(self) -> int:
        """Return the minimum images per shard when shards are cut to balance the load: fewer would underuse a GPU."""
        return max(1, self.batch_size // 8)


class Share:
    """The resources of each actor on the connected cluster, and the number of actors wanted. Picklable.

    Attributes:
        cpus, gpus: resources of one actor.
        wanted: number of actors wanted, as of the last `look`.
    """

    def __init__(self, workers: int | None, cpus: float, gpus: float) -> None:
        self._workers, self.cpus, self.gpus, self.wanted = workers, cpus, gpus, workers or 1

    @classmethod
    def of(cls, size: PoolSize) -> "Share":
        """Return the share for the cluster in its present state. Raise a `UserError` if no node can ever have an
        actor's GPUs."""
        nodes, most, reach = _nodes(), _autoscaled(), within_reach()
        gpus = size.gpus if size.gpus is not None else (1.0 if reach["GPU"] >= 1 else 0.0)
        if gpus > reach["GPU"]:
            raise UserError(
                f"an evaluation worker wants {gpus:g} GPUs but the cluster has {reach['GPU']:g}: lower "
                f"--gpus-per-worker, or label the head of a cluster that grows, as cluster/ does ({_MOST}GPU=N)."
            )
        share = cls(size.workers, _cpus(nodes, most, size.workers, gpus), gpus)
        share.look()
        return share

    def look(self) -> None:
        """Count the cluster's resources again, since nodes come and go."""
        if self._workers is None:
            self.wanted = max(1, sum(self._held(node) for node in _nodes()), self._held(_autoscaled()))

    def _held(self, resources: Mapping[str, float]) -> int:
        slack = 1e-6  # for rounding, such as of thirds of a GPU
        by_cpu = math.floor(resources.get("CPU", 0.0) / self.cpus + slack)
        return min(by_cpu, math.floor(resources.get("GPU", 0.0) / self.gpus + slack)) if self.gpus else by_cpu

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU{'' if self.gpus == 1 else 's'}" if self.gpus else f"{self.cpus:g} CPUs"


def _cpus(nodes: list[Mapping[str, float]], most: Mapping[str, float], workers: int | None, gpus: float) -> float:
    """Return the CPUs of one actor: with GPUs, a node's are divided among its actors; else a core each, or all shared
    by `workers`."""
    if gpus:
        having = [n for n in (*nodes, most) if n.get("GPU", 0) > 0]
        dealt = [n.get("CPU", 0.0) // max(1, math.floor(n["GPU"] / gpus + 1e-6)) for n in having]
        return max(1.0, min(dealt, default=1.0))
    total = max(sum(node.get("CPU", 0.0) for node in nodes), most.get("CPU", 0.0))
    if workers is None or not total:
        return 1.0
    if workers > total:
        return total / workers
    return max(1.0, min(total // workers, max((n.get("CPU", 0.0) for n in nodes), default=1.0)))


def within_reach() -> dict[str, float]:
    """Return GPUs and CPUs of the connected cluster: what it has now, or may grow to if that is more."""
    nodes, most = _nodes(), _autoscaled()
    return {what: max(sum(n.get(what, 0.0) for n in nodes), most.get(what, 0.0)) for what in ("GPU", "CPU")}


def _nodes() -> list[Mapping[str, float]]:
    import ray  # PoolSize is of use without it, too

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _autoscaled() -> Mapping[str, float]:
    """Return the resources that the cluster may grow to, by its head's labels; empty without labels."""
    import ray

    found: dict[str, float] = {}
    for labels in (node.get("Labels", {}) for node in ray.nodes() if node["Alive"]):
        for name in (name for name in labels if name.startswith(_MOST)):
            if not labels[name].isdigit():
                raise UserError(f"the cluster's head has the label {name}={labels[name]}: give it a whole number.")
            found[name.removeprefix(_MOST)] = float(labels[name])
    return found


def check_shared(store: Store, written: str) -> None:
    """Raise a `UserError` if this process does not see the driver's storage, in which the driver has written a file."""
    import ray

    began = time.monotonic()
    while store.size(written) is None:
        if time.monotonic() - began > _SEEN_S:
            raise UserError(
                f"{store.root} is another folder on node {ray.util.get_node_ip_address()}: give as --out one that all "
                "nodes share, or an object store's URI such as s3://BUCKET/results."
            )
        time.sleep(0.5)
