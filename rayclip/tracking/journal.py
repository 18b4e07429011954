"""The journal of a result folder: runs, their params, tags, metrics and artifacts as events, one JSON object per line.

    journal/20261127-201500-1f3a9c2e.jsonl    the events of one writer, in order
    journal/files/2c26b46b68ffc68f.png        contents that events refer to
    journal/delivered-5f70bf18.json           what one MLflow experiment has taken of it (`deliverer`)

Workers and driver only append here, so no worker needs MLflow's address or password, and an unreachable server stops no
work. The events and their contents are in this room's README.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from pyarrow.fs import FileSelector
from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from rayclip.data.leases import Leases
from rayclip.store import Store
from rayclip.types import UserError, redacted

_FOLDER = "journal"
_OBJECT = 64 << 10  # bytes of a file on an object store, which is written anew for each event


# Entries of events that readers rely on, whatever the kind
_ENTRIES = {"key": str, "name": str, "address": str, "experiment": str, "complete": bool, "cells": list, "files": dict}


class _State(BaseModel):
    """Record of what one MLflow experiment has taken of a journal: MLflow's id of each run, bytes read of each file,
    and events that it refused."""

    model_config = ConfigDict(extra="allow", strict=True)
    address: str
    time_ms: int
    runs: dict[str, str] = {}
    positions: dict[str, int] = {}
    refused: list[dict[str, str]] = []


class OlderRuns(BaseModel):
    """`runs.json` of an earlier version: its runs by key, those to which all was logged, and the run of each cell."""

    model_config = ConfigDict(extra="allow", strict=True)
    tracker: str = ""
    runs: dict[str, str] = {}
    logged: list[str] = []
    cells: dict[str, str] = {}


class OlderIds(RootModel[dict[str, str]]):
    """`mlflow_ids.json` of an earlier version: MLflow's id of each run."""


_Model = TypeVar("_Model", bound=BaseModel)


class Event(NamedTuple):
    """An event, and where its line begins: file and byte."""

    kind: str
    run: str
    time_ms: int
    content: dict[str, Any]
    file: str
    begin: int


class Journal:
    """Append events to the journal of a result folder, and read it. Picklable; every copy appends to its own file."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._file: str | None = None
        self._written = b""  # to that file, on an object store
        self._leases = Leases(store)

    def __reduce__(self) -> tuple[type, tuple[Store]]:
        return Journal, (self.store,)

    def add(self, kind: str, run: str, *, time_ms: int | None = None, **content: Any) -> None:
        """Append an event, without secrets; after an `OSError` (no room), or if killed here, it does not exist."""
        event = {"event": kind, "run": run, "time_ms": time_ms or time.time_ns() // 1_000_000, **content}
        line = json.dumps(_clean(event), ensure_ascii=False).encode() + b"\n"
        if self._file is None or len(self._written) > _OBJECT:
            now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            self._file, self._written = f"{_FOLDER}/{now}-{uuid.uuid4().hex[:8]}.jsonl", b""
        file, self._file = self._file, None  # if this fails, the next event does not follow an incomplete line
        if self.store.is_local:
            self.store.append(file, line)
        else:
            self._written += line
            self.store.write(file, self._written)
        self._file = file

    def alone(self, *, patient: bool = True) -> AbstractContextManager[bool]:
        """Be the only command that opens runs in this journal, or delivers it, in a block, after waiting for that; one
        that is not `patient` may get False instead."""
        return self._leases.hold("journal", "logging", patient=patient)

    def metrics(self, run: str, values: Sequence[tuple[str, float, int]]) -> None:
        """Append (name, value, step) triples."""
        self.add("metrics", run, values=[list(value) for value in values])

    def keep(self, content: bytes, ending: str = "") -> str:
        """Store the content of a file, once; return its name, for an event to refer to."""
        name = f"{_FOLDER}/files/{hashlib.sha256(content).hexdigest()[:16]}{ending}"
        if self.store.size(name) is None:
            self.store.write(name, content)
        return name

    def relative(self, place: str) -> str:
        """Return the place of a checkpoint as seen from the result folder, so that both can be moved together."""
        if place == self.store.parent.root:
            return ".."
        return place.removeprefix(f"{self.store.root}/")

    def read(self, positions: dict[str, int]) -> list[Event]:
        """Return the events behind the positions (bytes read by file), which are moved on, by time.

        A damaged line is no event.
        """
        found = []
        system, root = self.store.filesystem()
        files = system.get_file_info(FileSelector(f"{root}/{_FOLDER}", allow_not_found=True))  # with their sizes
        for file in sorted(files, key=lambda file: file.base_name):
            name = f"{_FOLDER}/{file.base_name}"
            begin = positions.get(name, 0)
            if not (file.is_file and name.endswith(".jsonl") and file.size > begin):
                continue
            with self.store.open(name) as opened:
                opened.seek(begin)
                lines = opened.read().split(b"\n")
            for line in lines[:-1]:  # behind the last end of a line there is nothing, or an incomplete one
                try:
                    content = _clean(json.loads(line))
                    kind, run, time_ms = (content.pop(key) for key in ("event", "run", "time_ms"))
                    if _is_whole(kind, content):
                        found.append(Event(str(kind), str(run), int(time_ms), content, name, begin))
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    pass
                begin += len(line) + 1
            positions[name] = begin
        return sorted(found, key=lambda event: event.time_ms)

    def history(self, address: str | None = None) -> "History":
        """Return what the journal says of its runs; those of an earlier version only if they are at this MLflow address
        (`Experiment.address`, None for any)."""
        found = History(address)
        found.read_on(self)
        return found

    def delivered(self, address: str) -> dict[str, Any] | None:
        """Return what the MLflow experiment at an address has taken; None if it has never been delivered to."""
        found = read_state(self.store, _delivered(address), _State)
        return None if found is None else found.model_dump()

    def note_delivered(self, address: str, state: Mapping[str, Any]) -> None:
        self.store.write_json(
            _delivered(address), {"address": address, "time_ms": time.time_ns() // 1_000_000, **state}
        )


@dataclass
class History:
    """The runs of a journal; those of an earlier version only if they are at `address` (None for any)."""

    address: str | None = None
    runs: dict[str, str] = field(default_factory=dict)  # by key, the run that was started last
    complete: set[str] = field(default_factory=set)  # runs to which everything has been logged
    cells: dict[str, str] = field(default_factory=dict)  # by cell id, the last run that logged it
    experiment: str = ""  # name that the commands gave it, if any
    _latest: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)  # contents
    _positions: dict[str, int] = field(default_factory=dict)

    def read_on(self, journal: Journal) -> None:
        """Take what has been added to the journal, by any command."""
        for event in journal.read(self._positions):
            self._take(event)

    def _take(self, event: Event) -> None:
        content = event.content
        if event.kind == "start" or (event.kind == "known" and self.address in (None, content["address"])):
            self.runs[content.get("key", event.run)] = event.run
            self.cells |= dict.fromkeys(content.get("cells", ()), event.run)
            self.experiment = content.get("experiment") or self.experiment
        if content.get("complete"):
            self.complete.add(event.run)
        self.is_new(event.kind, event.run, content)

    def is_new(self, kind: str, run: str, content: Mapping[str, Any]) -> bool:
        """Note an event; return whether it says something else than the last one of the kind about the same thing."""
        about = (kind, run, str(content.get("name", content.get("key"))), *content.get("files", ()))
        before, self._latest[about] = self._latest.get(about), _clean(content)
        return before != self._latest[about]


def journals_in(place: str) -> list[Journal]:
    """Return the journals of a result folder or URI and of its parts. Raise a `UserError` if there are none."""
    root = Store(place)
    stores = [root, *(root.child(name) for name in root.folders())]
    found = [Journal(s) for s in stores if s.names(_FOLDER, ".jsonl") or s.names("spool", ".json")]
    if not found:
        raise UserError(
            f"{root.root} has no journal of runs: give a folder that rayclip train, eval, retrieval, interpolate or a "
            "sweep has written."
        )
    return found


def waits(store: Store, address: str) -> bool:
    """Return whether an MLflow experiment has yet to take events of a result folder."""
    positions = ((Journal(store).delivered(address)) or {}).get("positions", {})
    older = store.names("spool", ".json") or store.size("runs.json") is not None
    return bool(older or Journal(store).read(dict(positions)))


def logged_runs(store: Store) -> tuple[str, dict[str, str]]:
    """Return the MLflow address that the results in a folder were logged to last ("" for none), and by cell id the
    MLflow id of the run that logged it."""
    if (older := read_state(store, "runs.json", OlderRuns)) is not None:
        address, cells = older.tracker, older.cells
        ids = (read_state(store, "mlflow_ids.json", OlderIds) or OlderIds({})).root
    else:
        states = [state for name in store.names(_FOLDER, ".json") if (state := read_state(store, name, _State))]
        if not states:
            return "", {}
        last = max(states, key=lambda state: state.time_ms)
        address, ids, cells = last.address, last.runs, Journal(store).history(last.address).cells
    return address, {cell: ids[run] for cell, run in cells.items() if run in ids}


def read_state(store: Store, name: str, kind: type[_Model]) -> _Model | None:
    """Read a file about what MLflow has; None if there is none. Raises `UserError` if it is damaged."""
    text = store.read(name)
    try:
        return None if text is None else kind.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            f"{store.root}/{name} is damaged: delete it and run again; what MLflow has is not logged twice."
        ) from error


def _is_whole(kind: object, content: Mapping[str, Any]) -> bool:
    """Return whether an event has the entries that readers rely on."""
    right = all(isinstance(content.get(key, one_of()), one_of) for key, one_of in _ENTRIES.items())
    named = right and all(isinstance(cell, str) for cell in content.get("cells", ()))
    return named and (kind != "known" or "address" in content)


def _delivered(address: str) -> str:
    return f"{_FOLDER}/delivered-{hashlib.sha256(address.encode()).hexdigest()[:8]}.json"


def _clean(value: Any) -> Any:
    """Return a JSON value without secrets; bytes of file names that are no UTF-8 are escaped."""
    match value:
        case str():
            return redacted(value.encode("utf-8", "backslashreplace").decode())
        case Mapping():
            return {_clean(key): _clean(each) for key, each in value.items()}
        case list() | tuple():
            return [_clean(each) for each in value]
    return value
