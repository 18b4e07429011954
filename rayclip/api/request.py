"""Requests: what to evaluate, where the work runs, and where results are written and logged."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayclip.api.logbook import Logbook
from rayclip.attacks import Attack
from rayclip.data.sampling import Subset
from rayclip.defenses import DRAWS, Aim, Chain
from rayclip.distributed.resources import PoolSize
from rayclip.evaluation import Protocol, Store
from rayclip.evaluation.cell import MadeAgainst
from rayclip.models.resizing import Resize
from rayclip.models.scorers import DEFAULT, Scorer
from rayclip.paths import check_folder
from rayclip.tracking.address import default_uri, join_address
from rayclip.tracking.deliverer import Deliverer
from rayclip.tracking.experiment import Experiment
from rayclip.tracking.journal import Journal, waits
from rayclip.tracking.older import convert


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Settings of an evaluation: data sets, attacks, protocol, defences and scorers.

    Attributes:
        data: data specifications (`open_data`, split `test`).
        attacks: with their settings.
        protocol: budget, seed, resolution, template.
        defenses: chains of test-time defences to wrap each model in; the empty chain is the model itself.
        aims: how attacks treat the defence of a defended model (ignore it or go through it).
        scorers: ways to score an image against a class.
        made_against: what image attacks optimise against where the scorer is not the template: the scorer itself, or
            the template.
        limit: maximum number of samples per data set.
        subset: the samples that `limit` keeps.
        native: data sets that are attacked at their own resolution where the protocol has another.
        native_resize: how these are resized inside the model's forward.
    """

    data: Sequence[str]
    attacks: Sequence[Attack]
    protocol: Protocol
    limit: int | None = None
    subset: Subset = "even"
    defenses: Sequence[Chain] = ((),)
    aims: Sequence[Aim] = (Aim(), Aim(gradient="bpda", draws=DRAWS))
    scorers: Sequence[Scorer] = (DEFAULT,)
    made_against: Sequence[MadeAgainst] = ("own",)
    native: Sequence[str] = ()
    native_resize: Resize = "antialias"

    def by_resolution(self) -> "list[Evaluation]":
        """Return the evaluation of the data at the protocol's resolution, and that of its `native` data sets."""
        native = [spec for spec in self.data if spec in self.native]
        if not native:
            return [self]
        others = replace(self, data=[spec for spec in self.data if spec not in native], native=())
        protocol = replace(self.protocol, resolution="native", resize=self.native_resize)
        return [replace(self, data=native, protocol=protocol, native=()), *([others] if others.data else [])]


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Address and name of an MLflow experiment, and the question of the study in Markdown; connected to after
    validation."""

    uri: str
    experiment: str
    about: str = ""

    @classmethod
    def choose(cls, uri: str | None, experiment: str, about: str = "") -> "Tracking":
        """Return the experiment at `uri`, else `MLFLOW_TRACKING_URI`, else an SQLite file in the working directory."""
        return cls(uri=uri or default_uri(), experiment=experiment, about=about)


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where work runs, where results are written and where they are logged.

    Attributes:
        out: folder of all results; for evaluations also an object-store URI.
        tracking: MLflow store and experiment; None keeps the journal of runs beside the results and sends nothing.
        cluster: True uses a running Ray cluster, False a private Ray; None evaluates in this process, without Ray.
        pool: size of the pool of evaluation actors.
        train_workers: Ray Train workers per trial.
        least_workers: minimum to continue a trial with while the cluster has no room for all; None waits for all.
        save_adversarial: also save the adversarial images of each cell as a prepared data set,
            `OUT/adversarial/NAME` (`evaluation.saving`); verdicts are the same with and without it.
        quiet: show no progress.
        verbose: show the output of Ray and its workers.
    """

    out: str
    tracking: Tracking | None = None
    cluster: bool | None = False
    pool: PoolSize = dataclasses.field(default_factory=PoolSize)
    train_workers: int = 1
    least_workers: int | None = None
    save_adversarial: bool = False
    quiet: bool = False
    verbose: bool = False

    def has_to_log(self, store: Store, key: str) -> bool:
        """Return whether earlier commands left something to log: events that wait, or a run of this key that did not
        end."""
        if self.tracking is None:
            return False
        history = Journal(store).history()
        begun = key in history.runs and history.runs[key] not in history.complete
        return begun or waits(store, join_address(self.tracking.uri, self.tracking.experiment))

    def logbook(self, store: Store) -> Logbook:
        """Connect to the tracker, as the first step after the arguments have been validated.

        Raises a `UserError` if MLflow cannot be reached, and no earlier command on this store has reached it.
        """
        check_folder("the folder of the results,", self.out)
        journal, tracking = Journal(store), self.tracking
        convert(journal)
        if tracking is None:
            return Logbook(journal)
        deliverer = Deliverer(journal, Experiment(tracking.uri, tracking.experiment))
        return Logbook(journal, deliverer, tracking.experiment, tracking.about)
