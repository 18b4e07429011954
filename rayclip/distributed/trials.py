"""Describe trials: each is a Ray Train run on one or several workers and ends as one checkpoint folder.

A Train run is named after the digest of its configuration, by which a driver that is started again resumes it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import ray
import torch

from rayclip.distributed.connect import in_submitted_job, ray_cluster
from rayclip.distributed.resources import within_reach
from rayclip.models.checkpoint import read_lineage
from rayclip.store import Store
from rayclip.training import TrainConfig
from rayclip.types import UserError

TUNE_CPUS = 0.1  # CPUs of the Tune function that waits for a Train run
RUN_PREFIX = "train-"  # begins the names of Train runs
_PRECISION = "precision.json"  # what `auto` was resolved to


class MetricLog(Protocol):
    """Takes the metrics of runs. Picklable, since rank 0 of each trial gets it."""

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]]) -> None:
        """Log (name, value, step) triples to a run."""


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Notes that the processes of a trial write for each other, in the storage that they share.

    Kinds are `failure`: an error that another attempt would not fix; `pressure`: how often Ray's memory monitor has
    killed a worker, and the node of the last one; `node-RANK`: the address of a rank's node, which cannot be asked once
    it has been killed; `starved`: one of Train's own processes ran out of memory; `stop`: a request to stop.

    Attributes:
        run: name of the trial's Train run.
    """

    storage: Store
    run: str

    def read(self, kind: str) -> str | None:
        """Return a note; None if there is none."""
        note = self.storage.read(f"{self.run}.{kind}")
        return None if note is None else note.decode()

    def write(self, kind: str, text: str) -> None:
        self.storage.write(f"{self.run}.{kind}", text.encode())

    def clear(self, *kinds: str) -> None:
        for kind in kinds:
            self.storage.delete(f"{self.run}.{kind}")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of one trial, and their resources."""

    count: int = 1  # Train workers (DDP ranks)
    # With which a trial goes on from its last checkpoint while the cluster has no room for `count`; it uses the others
    # again within a minute of their return. None waits for all of them.
    least: int | None = None
    gpus: float = 0.0  # per worker; 0 runs on the CPU
    cpus: float = 0.9  # per worker: two trials and Tune's 0.1 CPU for each fit on two cores

    @classmethod
    def for_cluster(cls, count: int = 1, least: int | None = None) -> "Workers":
        """Return workers with one GPU each if the cluster has GPUs or can add some, else without."""
        return cls(count=count, least=least, gpus=1.0 if within_reach()["GPU"] >= 1 else 0.0)

    @property
    def elastic(self) -> bool:
        return self.least is not None and self.least < self.count

    def threads(self, trials: int) -> int:
        """Return the CPU threads per worker when `trials` trials share the cluster's cores."""
        cores = within_reach()["CPU"]
        return max(1, int(cores / (min(trials, self.trials_at_once()) * self.count)))

    def trials_at_once(self) -> int:
        """Return how many trials fit in the cluster, with the nodes that it can add."""
        reach = within_reach()
        by_cpu = reach["CPU"] / (self.count * self.cpus + TUNE_CPUS)
        by_gpu = reach["GPU"] / (self.count * self.gpus) if self.gpus else by_cpu
        return max(1, int(min(by_cpu, by_gpu)))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training run of a sweep.

    Attributes:
        name: name in tables, runs and the progress display.
        out: folder or URI of the finished checkpoint, which driver and workers share.
        run: the tracker's run to log to.
        keep_epochs: epochs whose checkpoints are also kept, as `OUT/epoch-N`; the configuration must save them.
        key: what its run is found by again, where its name may change; default: the name.
    """

    name: str
    config: TrainConfig
    out: str
    run: str | None = None
    keep_epochs: tuple[int, ...] = ()
    key: str = ""

    @property
    def run_key(self) -> str:
        return self.key or self.name

    def at_epoch(self, epoch: int) -> Store:
        """Return where the checkpoint after `epoch` epochs is, one of `keep_epochs` or the last."""
        out = Store(self.out)
        return out if epoch == self.config.recipe.epochs else out.child(f"epoch-{epoch}")

    @property
    def model(self) -> str:
        """Return the model specification of the finished checkpoint."""
        return self.model_at(self.config.recipe.epochs)

    def model_at(self, epoch: int) -> str:
        """Return the model specification of the checkpoint after `epoch` epochs."""
        return f"{'prompted' if self.config.method.trains == 'prompt' else 'local-dir'}:{self.at_epoch(epoch).root}"

    @property
    def train_run(self) -> str:
        """Return the name of the trial's Train run."""
        return f"{RUN_PREFIX}{self.config.digest()}"

    def notes(self, storage: Store) -> Notes:
        """Return the notes that the trial's processes write for each other, beside its unfinished run in `storage`."""
        return Notes(storage=storage, run=self.train_run)

    def is_finished(self) -> bool:
        """Return whether `out` holds the finished checkpoint of this configuration. Raise a `UserError` if it holds
        another."""
        lineage = read_lineage(self.out)
        if lineage is None:
            return False
        if lineage.get("digest") != self.config.digest():
            what = "other settings or data"
            if (lineage.get("config") or {}).get("precision") == "auto":
                what = "an earlier version, which did not note in which precision it was trained"
            raise UserError(f"{self.out} holds a checkpoint of {what}: choose another --out, or delete it.")
        return True


@contextlib.contextmanager
def resolve_precision(
    trials: Sequence[Trial], store: Store, *, cluster: bool, verbose: bool = False
) -> Iterator[list[Trial]]:
    """Yield the trials with the precision `auto` resolved: bf16 if workers have GPUs, else fp32.

    Weights depend on it, so that it has to be known before anything is looked up or logged; what an earlier start has
    decided (`save_precision`, in `store`) stays. A running cluster is asked, and stays connected in the block;
    otherwise this machine's GPUs decide, and no Ray is started.
    """
    with contextlib.ExitStack() as stack:
        if any(trial.config.precision == "auto" for trial in trials):
            decided = (store.read_json(_PRECISION, dict) or {}).get("auto")
            if decided not in ("fp32", "bf16"):
                if running := cluster or in_submitted_job() or ray.is_initialized():
                    stack.enter_context(ray_cluster(cluster=cluster, verbose=verbose))
                has_gpus = Workers.for_cluster().gpus > 0 if running else torch.cuda.is_available()
                decided = "bf16" if has_gpus else "fp32"
            trials = [dataclasses.replace(t, config=t.config.decided(on_gpu=decided == "bf16")) for t in trials]
        yield list(trials)


def save_precision(trials: Sequence[Trial], store: Store) -> None:
    """Note the precision that runs begin in, for `resolve_precision` of later starts in the same folder."""
    store.write_json(_PRECISION, {"auto": trials[0].config.precision})


def find_abandoned_runs(trials: Sequence[Trial], storage: Store) -> list[str]:
    """Return the names of unfinished Train runs in `storage` that belong to none of the trials."""
    own = {trial.train_run for trial in trials}
    return [name for name in storage.folders() if name.startswith(RUN_PREFIX) and name not in own]
