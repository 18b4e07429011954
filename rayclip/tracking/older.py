"""Convert the records of an earlier version, which kept a queue in place of a journal."""

from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from rayclip.tracking.journal import Journal, OlderIds, OlderRuns, read_state
from rayclip.types import UserError

_RUNS = "runs.json"  # {"tracker": address, "runs": {key: run}, "logged": [key], "cells": {cell id: run}}
_IDS = "mlflow_ids.json"  # {run: MLflow's id}


class _Entry(BaseModel):
    """An entry of the queue."""

    model_config = ConfigDict(extra="allow", strict=True)
    kind: str
    run: str
    time_ms: int
    content: Any


def convert(journal: Journal) -> None:
    """Turn what an earlier version left in a result folder into events: its runs, and the entries that still wait.

    The runs are known in the experiment that they were logged to; only what waits can be delivered elsewhere.
    """
    store = journal.store
    waiting = store.names("spool", ".json")
    saved = read_state(store, _RUNS, OlderRuns) or OlderRuns()
    if not waiting and not saved.runs:
        return
    keys = {run: key for key, run in saved.runs.items()}
    cells = {run: [cell for cell, other in saved.cells.items() if other == run] for run in keys}
    entries = [entry for name in waiting if (entry := read_state(store, name, _Entry))]
    starts = {entry.run for entry in entries if entry.kind == "start"}
    address = saved.tracker
    experiment = address.partition(" ")[2]
    for run, key in keys.items():
        if run not in starts:
            known: dict[str, Any] = {
                "key": key,
                "address": address,
                "experiment": experiment,
                "cells": cells.get(run, []),
            }
            journal.add("known", run, complete=key in saved.logged, **known)
    if address and journal.delivered(address) is None:
        ids = (read_state(store, _IDS, OlderIds) or OlderIds({})).root
        journal.note_delivered(address, {"runs": ids, "positions": {}, "refused": []})
    for name, entry in zip(waiting, entries, strict=True):
        run, key = entry.run, keys.get(entry.run, entry.run)
        content = entry.content
        try:
            match entry.kind:
                case "start":
                    content |= {"key": key, "experiment": experiment, "cells": cells.get(run, [])}
                case "metrics":
                    content = {"values": content}
                case "finish":
                    content = {"failed": content, "complete": key in saved.logged}
                case "image":
                    content = {"key": content["key"], "file": content["files"]["png"]}
                case "checkpoint":
                    place = f"journal/checkpoints/{run}-{content['folder']}"
                    for file, copy in content.pop("files").items():
                        store.write(f"{place}/{PurePosixPath(file).name}", store.read(copy) or b"")
                        store.delete(copy)
                    content["place"] = place
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{store.root}/{name} is damaged: delete it and run again.") from error
        journal.add(entry.kind, run, time_ms=entry.time_ms, **content)
        store.delete(name)
    store.delete(_RUNS)
    store.delete(_IDS)
