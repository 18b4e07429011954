"""Cache of finished evaluations: repeating a `rayclip eval` command prints its result again, without torch or Ray.

An answer is stored beside the results as `answers/<hash of the command>.json`, with the state of every file that the
command names. If one of them changed, results are missing, or events wait for MLflow, the evaluation is run again.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rayclip import PROTOCOL, code_version
from rayclip.paths import expand_home
from rayclip.progress import Level
from rayclip.store import Store
from rayclip.tracking.address import join_address
from rayclip.tracking.journal import waits
from rayclip.types import Row, UserError

_MOST_FILES = 10_000  # below a folder; for larger folders the state is not recorded and no answer is kept
_DAMAGED = (UserError, ValueError, KeyError, TypeError, AttributeError, OSError)


class Answer(NamedTuple):
    """Result of an evaluation: its rows, and the messages shown during it."""

    rows: list[Row]
    said: list[tuple[Level, str]]


def find(words: Mapping[str, Any], places: Sequence[str], out: str) -> Answer | None:
    """Return the stored answer to an evaluation; None if there is none or it may be outdated.

    Args:
        words: all settings that decide the results and where they are logged.
        places: the models, data sets and files among them, as the user wrote them.
        out: folder of the results.
    """
    store = Store(out)
    if not store.is_local or _waits(words, store):
        return None
    try:
        kept = store.read_json(_name(words), dict)
        if kept is None or kept["files"] != _state(places):
            return None
        if any(store.names(f"cells/{cell}", ".parquet") != names for cell, names in kept["cells"].items()):
            return None
        return Answer([Row(**row) for row in kept["rows"]], [(level, text) for level, text in kept["said"]])
    except _DAMAGED:  # the results themselves are there
        return None


def keep(words: Mapping[str, Any], places: Sequence[str], out: str, answer: Answer) -> None:
    """Store an answer so that `find` returns it for the same settings."""
    store, files = Store(out), _state(places)
    if not store.is_local or files is None or _waits(words, store):
        return
    cells = {row.cell: store.names(f"cells/{row.cell}", ".parquet") for row in answer.rows if not row.is_worst}
    rows = [dataclasses.asdict(row) for row in answer.rows]
    record = {"files": files, "cells": cells, "said": answer.said, "rows": rows}
    with contextlib.suppress(OSError):  # no room for it is no reason to withhold the table
        store.write_json(_name(words), record)


def _waits(words: Mapping[str, Any], store: Store) -> bool:
    """Return whether MLflow has yet to take what an evaluation logged."""
    return words["tracking"] is not None and waits(store, join_address(*words["tracking"]))


def _name(words: Mapping[str, Any]) -> str:
    decisive = json.dumps([PROTOCOL, code_version(), words], sort_keys=True)
    return f"answers/{hashlib.sha256(decisive.encode()).hexdigest()[:16]}.json"


def _state(places: Sequence[str]) -> dict[str, list[int]] | None:
    """Return size and modification time of every file in the places; None if changes to one could go unnoticed."""
    found: dict[str, list[int]] = {}
    for text in {expand_home(place) for place in places if place}:
        if "://" in text or text.startswith(("hf-hub:", "hf:", "zoo:", "prompted:", "mix:")):
            return None
        for path in {Path(text), Path(text.partition(":")[2] or text)}:  # `local-dir:PATH`, `NAME:FILE`
            files = list(itertools.islice(_files(path), _MOST_FILES + 1))
            if len(files) > _MOST_FILES:
                return None
            for file in files:
                status = file.stat()
                found[str(file.absolute())] = [status.st_size, status.st_mtime_ns]
    return found


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
    elif path.exists():
        yield path
