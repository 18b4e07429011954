"""Queue of log entries on disk that the driver delivers to the tracker, oldest first.

Workers only write here, so no worker needs the tracker's address or password, and an unreachable tracker stops no work.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayclip.store import Store

_FOLDER = "spool"
_REFUSED = f"{_FOLDER}/refused"


IDS = "mlflow_ids.json"  # our key of each delivered run -> MLflow's run id
RUNS = "runs.json"  # the driver's record of its runs (`logbook.Logbook`)


def logged_runs(store: Store) -> tuple[str, dict[str, str]]:
    """Return where a folder's results were logged (store or server, and experiment; "" for nowhere), and the MLflow id
    of the run that logged each cell, by cell id."""
    saved, ids = store.read_json(RUNS) or {}, store.read_json(IDS) or {}
    cells = {cell: ids[run] for cell, run in saved.get("cells", {}).items() if run in ids}
    return saved.get("tracker", ""), cells


@dataclass(frozen=True)
class Spool:
    """The queue of a result folder. Picklable."""

    store: Store

    def add(self, kind: str, run: str, content: Any) -> None:
        """Add an entry, atomically."""
        now = time.time_ns()
        entry = {"kind": kind, "run": run, "time_ms": now // 1_000_000, "content": content}
        self.store.write_json(f"{_FOLDER}/{now:020d}-{uuid.uuid4().hex[:8]}.json", entry)

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]]) -> None:
        """Add (name, value, step) triples."""
        self.add("metrics", run, [list(value) for value in values])

    def files(self, path: Path) -> dict[str, str]:
        """Copy a file, or all files of a folder, into the queue; return name -> place of the copy."""
        kept = {}
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            name = str(file.relative_to(path if path.is_dir() else path.parent))
            kept[name] = _place()
            self.store.copy_in(file, kept[name])
        return kept

    def keep(self, content: bytes) -> str:
        """Store a file's content in the queue; return its place."""
        self.store.write(place := _place(), content)
        return place

    def names(self) -> list[str]:
        """Return the names of the waiting entries, oldest first."""
        return self.store.names(_FOLDER, ".json")

    def entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the waiting entries with their names, oldest first."""
        for name in self.names():
            entry = self.store.read_json(name)
            if entry is not None:
                yield name, entry

    def done(self, name: str, entry: dict[str, Any]) -> None:
        """Remove a delivered entry and the file copies that belong to it."""
        self.store.delete(name)
        if isinstance(entry["content"], dict):
            for copy in entry["content"].get("files", {}).values():
                self.store.delete(copy)

    def refuse(self, name: str, entry: dict[str, Any], reason: str) -> None:
        """Set aside an entry that the tracker will never accept, with the reason."""
        self.store.write_json(f"{_REFUSED}/{Path(name).name}", entry | {"reason": reason})
        self.store.delete(name)


def _place() -> str:
    return f"{_FOLDER}/files/{uuid.uuid4().hex}"
