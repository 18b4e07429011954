"""Search for clean and robust accuracy jointly: ASHA stops trials that fall behind, and a Pareto front is reported.

ASHA (Li et al. 2020, arXiv 1810.05934) compares the trials that have reached a rung and lets the best of them continue.
It needs one number per trial, the mean of the two accuracies. The front is computed from both accuracies.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray.tune.schedulers import ASHAScheduler

from rayclip.attacks import Attack
from rayclip.data import open_data
from rayclip.distributed.trials import MetricLog, Trial, Workers
from rayclip.distributed.tuning import run_trials
from rayclip.evaluation import Evaluator, Protocol, Shard, Store, chosen_positions, collect_rows, make_cells
from rayclip.evaluation.aggregate import worst_accuracy
from rayclip.evaluation.front import Score
from rayclip.models import load_model
from rayclip.models.loading import WEIGHTS_FILE
from rayclip.progress import Display

SCORES = "search.json"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A validation that measures a checkpoint on held-out data. Picklable, since it runs in the Train workers.

    Attributes:
        data: data specification, of which the split `test` is used: pass `NAME#validation`.
        attacks: `clean` first. With several other attacks, a sample must be right under all of them within one budget;
            several budgets have equal weight.
        limit: maximum number of samples; None for all.
    """

    data: str
    attacks: Sequence[Attack]
    protocol: Protocol
    limit: int | None = None

    def __call__(self, folder: Path, device: torch.device) -> dict[str, float]:
        """Return `clean` and `robust` accuracy in percent, and their mean `score`."""
        spec = f"{'local-dir' if (folder / WEIGHTS_FILE).is_file() else 'prompted'}:{folder}"
        data = open_data(self.data, "test", self.protocol.names)
        models = [(spec, load_model(spec).fingerprint())]
        cells = make_cells(models, [(self.data, data)], self.attacks, self.protocol)
        positions = chosen_positions(len(data), self.limit)
        with tempfile.TemporaryDirectory(prefix="rayclip-") as place:
            store = Store(place)
            evaluator = Evaluator(store, device)
            for cell in cells:
                evaluator.run(Shard(cell=cell, positions=tuple(positions.tolist())))
            rows = collect_rows(cells, {self.data: positions}, store)
        clean, worst = rows[0].top1, worst_accuracy(rows)
        robust = clean if worst is None else worst
        return {"clean": clean, "robust": robust, "score": (clean + robust) / 2}


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


def read_scores(trials: Sequence[Trial], store: Store) -> dict[str, Score]:
    """Return the stored scores of the trials, by name."""
    saved = store.read_json(SCORES) or {}
    return {t.name: Score(**saved[t.config.digest()]) for t in trials if t.config.digest() in saved}


def unfinished_trials(trials: Sequence[Trial], store: Store) -> list[Trial]:
    """Return the trials that have neither finished nor been stopped."""
    scores = read_scores(trials, store)
    return [trial for trial in trials if not (trial.name in scores and scores[trial.name].ended)]


def run_search(
    trials: Sequence[Trial],
    validation: Validation,
    *,
    store: Store,
    reduction: float,
    workers: int,
    least_workers: int | None,
    log: MetricLog | None,
    display: Display,
    on_finish: Callable[[Trial, str | None], None],
    on_report: Callable[[], None],
) -> tuple[dict[str, Score], dict[str, str]]:
    """Run the trials of a search; return the last score of each, and the errors of those that failed, by name.

    Trials that ended in an earlier run are remembered in `store` and not run again; the others resume.

    Args:
        validation: measures each checkpoint.
        store: where scores and unfinished runs are kept.
        reduction: ASHA's η: about one in η trials passes each rung.
        workers, least_workers: Train workers per trial, and the minimum to continue with (`Workers`).
        log, on_finish, on_report: as of `run_trials`.
    """
    saved, scores = store.read_json(SCORES) or {}, read_scores(trials, store)

    def keep(trial: Trial, score: Score) -> None:
        scores[trial.name], saved[trial.config.digest()] = score, asdict(score)
        store.write_json(SCORES, saved)

    def on_measure(trial: Trial, result: dict[str, Any]) -> None:
        keep(trial, Score(epoch=result["epoch"], clean=result["clean"], robust=result["robust"]))
        if log is not None and trial.run is not None:
            values = [(f"search/{name}", result[name], result["step"]) for name in ("clean", "robust", "score")]
            log.metrics(trial.run, values)

    def on_end(trial: Trial, error: str | None) -> None:
        if error is None and trial.name in scores:
            keep(trial, replace(scores[trial.name], ended=True))
        on_finish(trial, error)

    todo = unfinished_trials(trials, store)
    errors: dict[str, str] = {}
    if todo:
        errors = run_trials(
            todo,
            workers=Workers.for_cluster(workers, least_workers),
            storage=store.child("unfinished"),
            log=log,
            display=display,
            on_finish=on_end,
            on_report=on_report,
            measure=validation,
            on_measure=on_measure,
            # A trial finishes by itself: if ASHA stopped it at its last epoch, it would not leave its checkpoint.
            scheduler=lambda ask_to_stop: _CooperativeASHA(
                ask_to_stop,
                time_attr="epoch",
                metric="score",
                mode="max",
                max_t=max(t.config.recipe.epochs for t in trials),
                reduction_factor=reduction,
                stop_last_trials=False,
            ),
        )
    return scores, errors
