"""The Ray actor that evaluates shards."""

from typing import Any, NamedTuple

import ray
import torch

from rayclip.distributed.resources import PoolSize, Share, check_shared
from rayclip.evaluation import Evaluator, Shard, Store
from rayclip.evaluation.costs import Hardware
from rayclip.evaluation.shard import Done


def make_actor(store: Store, size: PoolSize, share: Share) -> Any:
    """Request an actor and return at once; it starts when the cluster has room for it."""
    options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": 0}
    return ray.remote(**options)(EvaluationActor).remote(store, size, share)


class Joined(NamedTuple):
    """A ready actor's hardware and the address of its node."""

    hardware: Hardware
    node: str


class EvaluationActor:
    """A worker with one evaluator, made in `hello`: an error in the constructor would look like a lost actor."""

    def __init__(self, store: Store, size: PoolSize, share: Share) -> None:
        self._store, self._size, self._share = store, size, share

    def hello(self, written: str | None = None) -> Joined:
        """Make the evaluator; return the worker's hardware and node.

        Args:
            written: a file that the driver has written, to check that both use the same storage.

        Raises:
            UserError: that file cannot be seen from this node.
        """
        if written is not None:
            check_shared(self._store, written)
        device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(self._share.cpus)))
        hardware = Hardware.here(device, self._share.gpus)
        size = self._size
        self._evaluator = Evaluator(self._store, device, size.batch_size, compiled=size.compiled, hardware=hardware)
        return Joined(hardware, ray.util.get_node_ip_address())

    def run(self, shard: Shard, batch_size: int) -> Done:
        return self._evaluator.run(shard, batch_size)

    def measure(self, shard: Shard) -> Done:
        return self._evaluator.measure(shard)
