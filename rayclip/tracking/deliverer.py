"""Deliver a journal to an MLflow experiment, while a command runs and after it."""

import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rayclip.models.checkpoint import FILES, read_lineage
from rayclip.paths import temporary_folder
from rayclip.progress import say
from rayclip.store import Store, no_room
from rayclip.tracking.address import AwayError
from rayclip.tracking.experiment import Experiment, is_away
from rayclip.tracking.journal import Event, Journal, journals_in
from rayclip.tracking.older import convert
from rayclip.tracking.registered import rank, register
from rayclip.types import redacted

_RETRY_S = 30.0  # between attempts while the server does not answer
_PATIENCE_S = 10.0  # to deliver the last events of a command


class Deliverer:
    """Replays the events that an experiment has not taken yet. What it has taken is noted beside the journal.

    Sent twice counts once: runs are looked up by the tag `rayclip.key`, metrics carry the time of their event, files
    and tables are overwritten. An event that MLflow will never take is noted with the reason, and skipped. Of several
    commands with one journal, one delivers at a time, with the events of all.
    """

    def __init__(self, journal: Journal, experiment: Experiment) -> None:
        """
        Raises:
            UserError: MLflow cannot be logged to, or does not answer and has taken nothing of this journal before."""
        self.journal, self.experiment = journal, experiment
        self._quiet_until = 0.0
        state = journal.delivered(experiment.address)
        try:
            experiment.contact()
        except AwayError:
            if state is None:
                raise
            self._rest()
        self._ids: dict[str, str] = {}  # MLflow's id of each run
        self.refused: list[dict[str, str]] = []
        self._positions: dict[str, int] = {}
        self._measured: dict[tuple[str, str, int], float] = {}  # values by run, metric and step
        self._queue: list[Event] = []
        self._catch_up()
        self.deliver()

    def _catch_up(self) -> None:
        """Take over what has been delivered, by this command or others."""
        state = self.journal.delivered(self.experiment.address) or {}
        self._ids, self.refused = state.get("runs", {}), state.get("refused", [])
        waiting, delivered = self._queue + self.journal.read(self._positions), state.get("positions", {})
        self._queue = []
        for event in waiting:
            if event.begin >= delivered.get(event.file, 0):
                self._queue.append(event)
            elif event.kind == "metrics":
                with suppress(KeyError, TypeError, ValueError):  # one that was refused
                    self._measured |= self._new_values(event)

    def deliver(self, *, patient: bool = False) -> int:
        """Send what waits, unless MLflow did not answer a moment ago; return how many events are left. If another
        command delivers just now it is left to that, unless `patient`."""
        self._queue += self.journal.read(self._positions)
        if self._resting() or not self._queue:
            return len(self._queue)
        with self.journal.alone(patient=patient) as is_alone:
            if is_alone:
                self._catch_up()
                self._send_all()
        return len(self._queue)

    def _send_all(self) -> None:
        # Runs first: the clocks of the machines that write may differ
        self._queue.sort(key=lambda event: event.kind != "start")
        done = 0
        try:
            for event in self._queue:
                try:
                    self._send(event)
                except Exception as error:
                    if no_room(error):
                        raise
                    if is_away(error):
                        self._rest()
                        break
                    reason = str(error)
                    self.refused.append({"file": event.file, "event": event.kind, "run": event.run, "reason": reason})
                    say("warning", f"MLflow refuses what was to be logged ({redacted(reason)[:160]})")
                done += 1
        finally:
            del self._queue[:done]
            if done:
                self._note()

    def close(self) -> int:
        """Try for some seconds to send what waits; return how many events are left."""
        left = self.deliver(patient=True)
        deadline = time.monotonic() + _PATIENCE_S
        while left and time.monotonic() < deadline:
            time.sleep(1.0)
            self._quiet_until = 0.0
            left = self.deliver(patient=True)
        return left

    def has(self, run: str) -> bool:
        """Return whether a run is in MLflow, or will be; one that was deleted there is delivered again."""
        if run not in self._ids:
            self._catch_up()
        if run not in self._ids:
            return any(event.kind == "start" and event.run == run for event in self._queue)
        if self._resting():
            return True  # its id is known, so it did exist
        try:
            if self.experiment.exists(self._ids[run]):
                return True
        except Exception as error:
            if not is_away(error):
                raise
            self._rest()
            return True
        again = [event for event in self.journal.read({}) if event.run == run]
        is_ours = any(event.kind == "start" for event in again)  # else an earlier version logged it
        with self.journal.alone():
            self._catch_up()
            self._ids.pop(run, None)
            self._measured = {key: value for key, value in self._measured.items() if key[0] != run}
            self._queue = [event for event in self._queue if event.run != run] + again * is_ours
            self._note()
            self._send_all()
        return is_ours

    @property
    def runs(self) -> list[str]:
        """The runs that MLflow has taken."""
        return list(self._ids)

    def _resting(self) -> bool:
        return time.monotonic() < self._quiet_until

    def _rest(self) -> None:
        self._quiet_until = time.monotonic() + _RETRY_S

    def _note(self) -> None:
        positions = dict(self._positions)
        for event in self._queue:
            positions[event.file] = min(positions[event.file], event.begin)
        state = {"runs": self._ids, "positions": positions, "refused": self.refused}
        self.journal.note_delivered(self.experiment.address, state)

    def _send(self, event: Event) -> None:
        log, content = self.experiment, event.content
        if event.kind == "known":
            return
        if event.kind == "start":
            if event.run not in self._ids:
                self._ids[event.run] = log.start(
                    content["name"],
                    key=event.run,
                    parent=self._ids.get(content["parent"]),
                    params=content["params"],
                    tags=content["tags"],
                    time_ms=event.time_ms,
                )
            return
        if event.run not in self._ids:
            raise ValueError("its run was refused, or logged elsewhere by an earlier version")
        run = self._ids[event.run]
        match event.kind:
            case "metrics":
                values = self._new_values(event)
                log.metrics(run, [(name, value, step) for (_, name, step), value in values.items()], event.time_ms)
                self._measured |= values
            case "table":
                log.table(run, content["rows"], content["name"])
            case "describe":
                log.describe(None if content["study"] else run, content["text"])
            case "artifact":
                with temporary_folder() as place:  # under the names that they have in MLflow
                    for name, kept in content["files"].items():
                        Store(str(place)).write(name, self._content(kept))
                    log.artifact(run, place, content["folder"])
            case "image":
                log.image(run, content["key"], self._content(content["file"]))
            case "data":
                log.data(run, content["name"], content["digest"], content["context"], content["about"])
            case "checkpoint":
                register(log, run, self._checkpoint(content["place"]), content["folder"], content["about"])
            case "rank":
                rank(log, content["protocol"], content["accuracies"])
            case "finish":
                log.finish(run, failed=content["failed"], time_ms=event.time_ms)
            case other:
                raise ValueError(f"the event '{other}' is unknown")

    def _new_values(self, event: Event) -> dict[tuple[str, str, int], float]:
        """Return the values that have not been logged yet, by run, metric and step; not those of `train/…` that a
        resumed training measures again, the same up to rounding."""
        values = {(event.run, name, step): value for name, value, step in event.content["values"]}
        seen = self._measured
        return {k: v for k, v in values.items() if k not in seen or (seen[k] != v and not k[1].startswith("train/"))}

    def _content(self, name: str) -> bytes:
        content = self.journal.store.read(name)
        if content is None:
            raise ValueError(f"{name} is not there")
        return content

    def _checkpoint(self, place: str) -> Path:
        """Return a local folder with a checkpoint's files."""
        store = self.journal.store
        is_elsewhere = "://" in place or place.startswith("/")
        found = store.parent if place == ".." else Store(place) if is_elsewhere else store.child(place)
        if read_lineage(found.root) is None:
            raise ValueError(f"{found.root} holds no checkpoint")
        return found.node_copy(FILES)


class Delivery(NamedTuple):
    """State of a delivery to an experiment: the number of runs, and of events that it did not take."""

    results: str
    experiment: str
    runs: int
    refused: int


def deliver_results(place: str, uri: str, experiment: str | None) -> list[Delivery]:
    """Deliver the journals of a result folder to any MLflow; what is there already is left alone.

    Raises a `UserError` if there is no journal, or MLflow cannot be logged to or does not answer.

    Args:
        experiment: name; None is the one that the commands gave it, else the folder's name.
    """
    found = []
    for journal in journals_in(place):
        convert(journal)
        name = experiment or journal.history().experiment or journal.store.name
        deliverer = Deliverer(journal, Experiment(uri, name))
        for run in deliverer.runs:
            deliverer.has(run)
        left = deliverer.close()
        if left:
            raise AwayError(f"MLflow at '{uri}' does not answer: {left} events of {journal.store.root} still wait.")
        found.append(Delivery(journal.store.root, name, len(deliverer.runs), len(deliverer.refused)))
    return found
