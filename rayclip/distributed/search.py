"""Search for clean and robust accuracy jointly: ASHA stops trials that fall behind, and a Pareto front is reported.

ASHA (Li et al. 2020, arXiv 1810.05934) compares the trials that have reached a rung and lets the best of them continue.
It needs one number per trial, the mean of the two accuracies or one of them. The front is computed from both.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from rayclip.attacks import Attack
from rayclip.data import open_data
from rayclip.distributed.trials import Trial
from rayclip.evaluation import Evaluator, Protocol, Shard, Store, chosen_positions, collect_rows, make_cells
from rayclip.evaluation.aggregate import worst_accuracy
from rayclip.evaluation.front import Score
from rayclip.models import load_model
from rayclip.models.loading import WEIGHTS_FILE
from rayclip.paths import temporary_folder
from rayclip.types import Ranking

SCORES = "search.json"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A validation that measures a checkpoint on held-out data. Picklable, since it runs in the Train workers.

    Attributes:
        data: data specification, of which the split `test` is used: pass `NAME#validation`.
        attacks: `clean` first. With several other attacks, a sample must be right under all of them within one budget;
            several budgets have equal weight.
        limit: maximum number of samples; None for all.
        by: what `score` is.
    """

    data: str
    attacks: Sequence[Attack]
    protocol: Protocol
    limit: int | None = None
    by: Ranking = "mean"

    def __call__(self, folder: Path, device: torch.device) -> dict[str, float]:
        """Return `clean` and `robust` accuracy in percent, and `score`, which trials are compared by."""
        spec = f"{'local-dir' if (folder / WEIGHTS_FILE).is_file() else 'prompted'}:{folder}"
        data = open_data(self.data, "test", self.protocol.names)
        positions = chosen_positions(len(data), self.limit)
        models = [(spec, load_model(spec).fingerprint())]
        cells = make_cells(models, [(self.data, data)], self.attacks, self.protocol)
        with temporary_folder() as place:
            store = Store(str(place))
            evaluator = Evaluator(store, device)
            for cell in cells:
                evaluator.run(Shard(cell=cell, positions=tuple(positions.tolist())))
            rows = collect_rows(cells, {self.data: positions}, store)
        clean, worst = rows[0].top1, worst_accuracy(rows)
        robust = clean if worst is None else worst
        return {"clean": clean, "robust": robust, "score": Score(epoch=0, clean=clean, robust=robust).by(self.by)}


class _CooperativeASHA(ASHAScheduler):
    """An ASHA scheduler that asks a trial to stop; the trial's workers stop themselves at their next report."""

    def __init__(self, ask_to_stop: Callable[[int], None], **settings: Any) -> None:
        super().__init__(**settings)
        self._ask_to_stop, self._asked = ask_to_stop, set[str]()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.trial_id not in self._asked and super().on_trial_result(tune_controller, trial, result) == self.STOP:
            self._asked.add(trial.trial_id)
            self._ask_to_stop(trial.config["index"])
        return self.CONTINUE


def make_asha(trials: Sequence[Trial], reduction: float) -> Callable[[Callable[[int], None]], TrialScheduler]:
    """Return a `scheduler` for `run_trials`: ASHA with η = `reduction`; about one in η trials passes a rung."""
    return lambda ask_to_stop: _CooperativeASHA(
        ask_to_stop,
        time_attr="epoch",
        metric="score",
        mode="max",
        max_t=max(trial.config.recipe.epochs for trial in trials),
        reduction_factor=reduction,
        stop_last_trials=False,  # stopped at its last epoch, it would not leave its checkpoint
    )


class Scores(dict[str, Score]):
    """The last score of each trial, by name; kept in the results folder, so that what has ended is not run again."""

    def __init__(self, trials: Sequence[Trial], store: Store) -> None:
        self._digests = {trial.name: trial.config.digest() for trial in trials}
        self._saved, self._store = store.read_json(SCORES, dict) or {}, store
        found = ((name, digest) for name, digest in self._digests.items() if digest in self._saved)
        super().__init__({name: Score(**self._saved[digest]) for name, digest in found})

    @property
    def ended(self) -> set[str]:
        """The names of the trials that have finished or were stopped."""
        return {name for name, score in self.items() if score.ended}

    def keep(self, name: str, score: Score) -> None:
        self[name] = score
        self._saved[self._digests[name]] = asdict(score)
        self._store.write_json(SCORES, self._saved)
