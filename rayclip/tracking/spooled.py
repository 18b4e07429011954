"""Tracker for an unreliable server: entries that MLflow cannot take now wait on disk and are delivered later, once."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayclip.progress import say
from rayclip.store import Store, no_room
from rayclip.tracking.address import AwayError
from rayclip.tracking.mlflow_tracker import KEY, MlflowTracker, is_away, source_tags
from rayclip.tracking.names import key
from rayclip.tracking.registry import rank, register
from rayclip.tracking.spool import IDS, Spool
from rayclip.types import redacted

_RETRY_S = 30.0  # between attempts while the server does not answer
_PATIENCE_S = 10.0  # to deliver the last entries of a command


class SpooledTracker:
    """The driver's `types.Tracker`: queues entries on disk and sends them, with those of workers, to `MlflowTracker`.

    Anything may be sent twice (a killed driver cannot know what has arrived) but counts once: runs are looked up by
    their key before they are created again, a metric's steps only increase, and files and tables are overwritten.
    """

    def __init__(self, mlflow: MlflowTracker, spool: Spool, *, known: bool) -> None:
        """
        Args:
            known: an earlier command has logged from this folder to this tracker, so it may be unreachable now.

        Raises:
            UserError: MLflow cannot be logged to, or the very first connection fails.
        """
        self.spool, self._mlflow = spool, mlflow
        self._ids: dict[str, str] = spool.store.read_json(IDS) or {}  # MLflow's id of each run it has taken
        waiting = dict(spool.entries())
        self._old = set(waiting)  # an earlier driver may have sent these
        self._starting = {entry["run"] for entry in waiting.values() if entry["kind"] == "start"}
        self._names: dict[str, set[str]] = {}  # metrics that a run had when this driver first used it
        self._last: dict[tuple[str, str], tuple[int, float]] = {}  # step and value of each metric
        self._quiet_until = 0.0
        try:
            mlflow.contact()
        except AwayError:
            if not known:
                raise
            self._lost()
        self.deliver()

    @property
    def address(self) -> str:
        return self._mlflow.address

    def exists(self, run: str) -> bool:
        if run not in self._ids:
            return run in self._starting
        try:
            return self._mlflow.exists(self._ids[run])
        except Exception as error:
            if not is_away(error):
                raise
            self._lost()
            return True  # the id is known, so it did exist

    def start(
        self,
        run: str,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        written = {name: redacted(str(value)) for name, value in (params or {}).items()}
        told = {name: redacted(value) for name, value in {**source_tags(), **(tags or {})}.items()}
        self.spool.add("start", run, {"name": redacted(name), "parent": parent, "params": written, "tags": told})
        self._starting.add(run)
        self.deliver()

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]]) -> None:
        self.spool.metrics(run, values)
        self.deliver()

    def describe(self, run: str, text: str, *, study: bool = False) -> None:
        self.spool.add("describe", run, {"text": redacted(text), "study": study})
        self.deliver()

    def artifact(self, run: str, path: Path, folder: str = "") -> None:
        self.spool.add("artifact", run, {"folder": folder, "files": self.spool.files(path)})
        self.deliver()

    def image(self, run: str, key: str, png: bytes) -> None:
        self.spool.add("image", run, {"key": key, "files": {"png": self.spool.keep(png)}})
        self.deliver()

    def data(self, run: str, name: str, digest: str, context: str, about: Mapping[str, Any]) -> None:
        told = {key: redacted(value) if isinstance(value, str) else value for key, value in about.items()}
        self.spool.add("data", run, {"name": name, "digest": digest, "context": context, "about": told})
        self.deliver()

    def checkpoint(self, run: str, path: Path, folder: str, about: Mapping[str, Any]) -> None:
        if self.deliver() == 0 and run in self._ids and not self._resting():
            try:  # without a copy in the spool, since it is large
                register(self._mlflow, self._ids[run], path, folder, about)
                return
            except Exception as error:  # `deliver` handles the other errors
                if no_room(error):
                    raise
                if is_away(error):
                    self._lost()
        self.spool.add("checkpoint", run, {"folder": folder, "about": dict(about), "files": self.spool.files(path)})

    def rank(self, run: str, protocol: str, accuracies: Mapping[str, float]) -> None:
        self.spool.add("rank", run, {"protocol": protocol, "accuracies": dict(accuracies)})
        self.deliver()

    def table(self, run: str, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        self.spool.add("table", run, {"name": name, "rows": [dict(row) for row in rows]})
        self.deliver()

    def finish(self, run: str, *, failed: bool = False) -> None:
        self.spool.add("finish", run, failed)
        self.deliver()

    def deliver(self) -> int:
        """Send the waiting entries unless MLflow was unreachable a moment ago; return how many are left."""
        if self._resting():
            return len(self.spool.names())
        left = 0
        for name, entry in self.spool.entries():
            run, is_start = entry["run"], entry["kind"] == "start"
            if not is_start and run not in self._ids and run in self._starting:
                left += 1  # its start was written by a machine whose clock is ahead
                continue
            try:
                if is_start:
                    self._begin(run, entry, again=name in self._old)
                elif run in self._ids:
                    self._send(self._ids[run], entry)
                else:
                    raise ValueError("its run was refused")
            except Exception as error:
                self._old.add(name)
                if no_room(error):
                    raise
                if is_away(error):
                    self._lost()
                    return len(self.spool.names())
                self._starting -= {run} if is_start else set()
                self.spool.refuse(name, entry, str(error))
                say("warning", f"MLflow refuses what was to be logged ({redacted(str(error))[:160]})")
            else:
                self.spool.done(name, entry)
        return left

    def close(self) -> int:
        """Try for some seconds to send the waiting entries; return how many are left."""
        deadline = time.monotonic() + _PATIENCE_S
        left = self.deliver()
        while left and time.monotonic() < deadline:
            time.sleep(1.0)
            self._quiet_until = 0.0
            left = self.deliver()
        return left

    def _resting(self) -> bool:
        return time.monotonic() < self._quiet_until

    def _lost(self) -> None:
        self._quiet_until = time.monotonic() + _RETRY_S

    def _begin(self, run: str, entry: dict[str, Any], *, again: bool) -> None:
        content = entry["content"]
        found = self._mlflow.find(run) if again else None
        if found is None:
            found = self._mlflow.start(
                content["name"],
                parent=self._ids.get(content["parent"]),
                params=content["params"],
                tags=content["tags"] | {KEY: run},
                time_ms=entry["time_ms"],
            )
            self._names[found] = set()
        self._ids[run] = found
        self.spool.store.write_json(IDS, self._ids)

    def _send(self, run: str, entry: dict[str, Any]) -> None:
        """Send an entry to MLflow; `run` is MLflow's id."""
        content, log = entry["content"], self._mlflow
        match entry["kind"]:
            case "metrics":
                named = [(key(name), value, step) for name, value, step in content]
                values = [each for each in named if self._is_new(run, *each)]
                log.metrics(run, values, time_ms=entry["time_ms"])
                self._last |= {(run, name): (step, value) for name, value, step in values}
            case "table":
                log.table(run, content["rows"], content["name"])
            case "describe":
                log.describe(None if content["study"] else run, content["text"])
            case "artifact":
                with self._copies(content["files"]) as place:
                    log.artifact(run, place, content["folder"])
            case "image":
                log.image(run, content["key"], self.spool.store.read(content["files"]["png"]) or b"")
            case "data":
                log.data(run, content["name"], content["digest"], content["context"], content["about"])
            case "checkpoint":
                with self._copies(content["files"]) as place:
                    register(log, run, place, content["folder"], content["about"])
            case "rank":
                rank(log, content["protocol"], content["accuracies"])
            case "finish":
                log.finish(run, failed=content, time_ms=entry["time_ms"])

    @contextmanager
    def _copies(self, files: Mapping[str, str]) -> Iterator[Path]:
        """Yield a temporary folder with copies of spooled files under their original names."""
        with tempfile.TemporaryDirectory(prefix="rayclip-") as place:
            for name, copy in files.items():
                Store(place).write(name, self.spool.store.read(copy) or b"")
            yield Path(place)

    def _is_new(self, run: str, name: str, value: float, step: int) -> bool:
        """Return whether a value has to be sent.

        Training that resumes from a checkpoint measures some steps again, with the same values up to rounding: these
        are skipped. Any other metric may get a new value at the same step.
        """
        if run not in self._names:
            self._names[run] = self._mlflow.names(run)
        if (run, name) not in self._last:
            self._last[run, name] = self._mlflow.last(run, name) if name in self._names[run] else (-1, 0.0)
        last_step, last_value = self._last[run, name]
        return step > last_step or (step == last_step and value != last_value and not name.startswith("train/"))
