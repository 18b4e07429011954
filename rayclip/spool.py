"""What waits for the tracker: entries on disk, oldest first, until the driver has delivered them.

Workers only write here, so that no worker needs the tracker's address or its password, and a tracker that is away stops
nobody.
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


IDS = "mlflow_ids.json"  # MLflow's id of each run that it has taken, by our key
RUNS = "runs.json"  # what the driver remembers of its runs (`logbook.Logbook`)


def logged_runs(store: Store) -> tuple[str, dict[str, str]]:
    """Where a folder's results were logged (store or server and experiment; "" for nowhere), and MLflow's id of the run
    that logged each cell, by the cell's id."""
    saved, ids = store.read_json(RUNS) or {}, store.read_json(IDS) or {}
    cells = {cell: ids[run] for cell, run in saved.get("cells", {}).items() if run in ids}
    return saved.get("tracker", ""), cells


@dataclass(frozen=True)
class Spool:
    """The entries of a result folder. Picklable."""

    store: Store

    def add(self, kind: str, run: str, content: Any) -> None:
        """An entry is there whole or not at all."""
        now = time.time_ns()
        entry = {"kind": kind, "run": run, "time_ms": now // 1_000_000, "content": content}
        self.store.write_json(f"{_FOLDER}/{now:020d}-{uuid.uuid4().hex[:8]}.json", entry)

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]]) -> None:
        """(name, value, step) triples."""
        self.add("metrics", run, [list(value) for value in values])

    def files(self, path: Path) -> dict[str, str]:
        """Keep copies of a file, or of all that a folder holds: name -> where the copy is."""
        kept = {}
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            name = str(file.relative_to(path if path.is_dir() else path.parent))
            kept[name] = _place()
            self.store.copy_in(file, kept[name])
        return kept

    def keep(self, content: bytes) -> str:
        """Keep a file's content; where the copy is."""
        self.store.write(place := _place(), content)
        return place

    def names(self) -> list[str]:
        """Of the entries that wait, oldest first."""
        return self.store.names(_FOLDER, ".json")

    def entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The waiting entries with their names, oldest first."""
        for name in self.names():
            entry = self.store.read_json(name)
            if entry is not None:
                yield name, entry

    def done(self, name: str, entry: dict[str, Any]) -> None:
        """An entry was delivered."""
        self.store.delete(name)
        if isinstance(entry["content"], dict):
            for copy in entry["content"].get("files", {}).values():
                self.store.delete(copy)

    def refuse(self, name: str, entry: dict[str, Any], reason: str) -> None:
        """Set an entry aside that the tracker will never take."""
        self.store.write_json(f"{_REFUSED}/{Path(name).name}", entry | {"reason": reason})
        self.store.delete(name)


def _place() -> str:
    return f"{_FOLDER}/files/{uuid.uuid4().hex}"
