"""Keep the last checkpoint of an unfinished trial, and export those of a finished one."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, Result

from rayclip.distributed.trials import Trial
from rayclip.models.checkpoint import FILES, LINEAGE_FILE, read_lineage
from rayclip.store import Store
from rayclip.training.loop import STATE_FILE

_PREFIX = "checkpoint_"  # of the folders, before the step; Train's have the date there


class KeptCheckpoint:
    """The last checkpoint of a trial that runs in Tune's own process, in the folder of its Train run.

    What Train itself has kept there, with several workers, comes first until another is kept.
    """

    def __init__(self, trial: Trial, storage: Store) -> None:
        self._store = storage.child(trial.train_run)

    def last(self) -> Checkpoint | None:
        system, place = self._store.filesystem()
        with contextlib.suppress(RuntimeError):  # Train has kept nothing here
            kept = Result.from_path(place, system).checkpoint
            if kept is not None:
                return kept
        mine = [name for name in self._store.folders() if name.removeprefix(_PREFIX).isdigit()]
        whole = [name for name in mine if self._store.size(f"{name}/{LINEAGE_FILE}") is not None]
        return Checkpoint(f"{place}/{whole[-1]}", system) if whole else None

    def keep(self, folder: Path, step: int) -> str:
        """Keep the checkpoint of a step instead of all others; return its path."""
        name = f"{_PREFIX}{step:012d}"
        export(folder, self._store.child(name), (STATE_FILE, *FILES))
        for other in self._store.folders():
            if other != name:
                self._store.delete_folder(other)
        for listed in self._store.names("", ".json"):  # Train's list
            self._store.delete(listed)
        return self._store.child(name).root


def export(checkpoint: Path, out: Store, files: Iterable[str] = FILES) -> None:
    """Copy a checkpoint's files to `out`, the lineage last, so that a folder with `rayclip.json` is complete."""
    for name in (name for name in files if (checkpoint / name).exists()):
        out.copy_in(checkpoint / name, name)


def export_finished(
    trial: Trial, last: Checkpoint | None, kept: Iterable[tuple[Checkpoint, dict[str, Any]]] = ()
) -> bool:
    """Write a trial's finished checkpoint to its `out`, and those of `keep_epochs` among the `kept` ones; return False
    if `last` is not the end."""
    if last is None:
        return False
    with last.as_directory() as folder:
        lineage = read_lineage(folder) or {}
        if lineage.get("step") != lineage.get("total_steps"):  # the worker stopped early and has reported why
            return False
        for saved, metrics in kept:
            if metrics["epoch"] in trial.keep_epochs and saved != last:
                with saved.as_directory() as earlier:  # an epoch's last checkpoint is the one at its end
                    export(Path(earlier), trial.at_epoch(metrics["epoch"]))
        export(Path(folder), Store(trial.out))
    return True
